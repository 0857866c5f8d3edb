"""The benchmark's report: bench.json, bench.md and bench.png."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from checkpoints.files import atomic_write, read_json, write_json
from tasks.scores import markdown_table


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown tables."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = ["# Speed and memory", "", f"`{report['command']}` on {machine}.", ""]
    for verb, peaks in report.get("peaks", {}).items():
        lines += [f"{verb}, {dtype}: peak of `F.linear` {peak['plain'] / 1e9:.0f} GFLOP/s, "
                  f"the best {peak['best'] / 1e9:.0f}.  " for dtype, peak in peaks.items()]
    for rows in (report[part] for part in ("contenders", "generation") if part in report):
        lines += markdown_table([["", *rows], *(
            [key.replace("_", " "), *(f"{row[key]:,.4g}" for row in rows.values())]
            for key in next(iter(rows.values())))])
    if ratios := report.get("ratios"):
        titles = ["ours against", "times faster", "in the rounds", "of its memory"]
        lines += markdown_table([titles, *(
            [key, f"{ratio:.2f}", "{:.2f} to {:.2f}".format(*report["spreads"][key]),
             f"{report['memory_ratios'][key]:.2f}"] for key, ratio in ratios.items())])
    if memory := report.get("memory"):
        keys = list(next(iter(memory.values())))
        lines += markdown_table([["GB in a step", *keys], *(
            [name, *(f"{row[key]:.2f}" for key in keys)] for name, row in memory.items())])
    for axis, points in alone(report).items():
        keys = list(next(iter(points.values())))
        lines += markdown_table([[axis.replace("_", " "), *keys], *(
            [value, *(f"{point[key]:,.{2 if key.startswith('times') else 1}f}" for key in keys)]
            for value, point in points.items())])
    return "\n".join(lines) + "\n"


def alone(report: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return what was measured of ours alone, by axis: the methods, the examples, the growth."""
    named = {"method": "methods", "shots": "shots"}
    found = {axis: report[part] for axis, part in named.items() if part in report}
    return found | report.get("growth", {})


def bars(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """Return each contender's speed by (what was measured, its unit), and estimated memory."""
    parts = {"contenders": "reviews_per_second", "generation": "tokens_per_second"}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for part, suffix in parts.items():
        for name, row in report.get(part, {}).items():
            for key in (key for key in row if key.endswith(suffix)):
                what, unit = key.removesuffix(f"_{suffix}"), suffix.replace("_per_", " a ")
                found.setdefault((what.replace("_", " "), unit), {})[name] = row[key]
    if memory := report.get("memory"):
        found["memory of a step", "GB"] = {name: row["total"] for name, row in memory.items()}
    return found


def plot(report: dict[str, Any]) -> Figure:
    """Plot the speed of each contender, and our cost along each axis."""
    compared, growing = bars(report), alone(report)
    number = len(compared) + len(growing)
    figure = Figure(figsize=(8, 2.8 * number), layout="constrained")
    panels = iter(figure.subplots(number, squeeze=False)[:, 0])
    for ((what, unit), rows), panel in zip(compared.items(), panels):  # noqa: B905  growth's follow
        panel.bar_label(panel.barh(list(rows), list(rows.values())), fmt="{:.1f}", padding=3)
        panel.set(title=what, xlabel=unit, xlim=(0, 1.15 * max(rows.values())))
    for (axis, points), panel in zip(growing.items(), panels, strict=True):
        styles = ("o", "s") if axis == "method" else ("o-", "s--")
        for verb, style in zip(("train", "score"), styles, strict=True):
            times = [p[f"{verb}_ms"] for p in points.values() if f"{verb}_ms" in p]
            panel.plot(list(points)[: len(times)], times, style, label=verb)
        panel.set(xlabel=axis.replace("_", " "), ylabel="ms a review", ylim=(0, None))
        panel.legend()
    return figure


def check_folder(folder: Path) -> None:
    """Raise ValueError if `folder` holds files of others that a report would overwrite."""
    files = [folder / f"bench.{suffix}" for suffix in ("json", "md", "png")]
    ours = files[0].is_file() and "machine" in read_json(files[0])
    if not ours and (foreign := [path.name for path in files if path.exists()]):
        raise ValueError(f"out_dir={str(folder)!r} holds a {foreign[0]} that this program did not "
                         "write; choose another folder")


def write(report: dict[str, Any], out_dir: Path) -> None:
    write_json(out_dir / "bench.json", report)
    with atomic_write(out_dir / "bench.md") as path:
        path.write_text(markdown(report), "utf-8")
    with atomic_write(out_dir / "bench.png") as path:
        plot(report).savefig(path, dpi=150, format="png")
