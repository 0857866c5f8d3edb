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
    if contenders := report.get("contenders"):
        names = list(contenders)
        keys = list(contenders[names[0]])
        lines += markdown_table([["", *names], *([key.replace("_", " ")] + [
            f"{contenders[name][key]:,.4g}" for name in names] for key in keys)])
        titles = ["ours against", "times faster", "in the rounds", "of its memory"]
        lines += markdown_table([titles, *(
            [key, f"{ratio:.2f}", "{:.2f} to {:.2f}".format(*report["spreads"][key]),
             f"{report['memory_ratios'][key]:.2f}"] for key, ratio in report["ratios"].items())])
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


def plot(report: dict[str, Any]) -> Figure:
    """Plot the reviews per second of each contender, and our cost along each axis."""
    contenders, growing = report.get("contenders", {}), alone(report)
    verbs = list(report.get("peaks", {}))
    number = len(verbs) + len(growing)
    figure = Figure(figsize=(8, 2.8 * number), layout="constrained")
    panels = iter(figure.subplots(number, squeeze=False)[:, 0])
    for verb, panel in zip(verbs, panels):  # noqa: B905  growth takes the rest
        speeds = [row[f"{verb}_reviews_per_second"] for row in contenders.values()]
        panel.bar_label(panel.barh(list(contenders), speeds), fmt="{:.1f}", padding=3)
        panel.set(title=verb, xlabel="reviews a second", xlim=(0, 1.15 * max(speeds)))
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
