"""The report of the experiments: tables and curves computed from the runs' folders."""

import base64
import html
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import markdown

from checkpoints.files import atomic_write
from dataloader import make_task
from experiments import text_sections
from experiments.escaping import code, fenced, plain
from experiments.plan import ExperimentsConfig
from experiments.results import Row, Section
from experiments.sections import (
    alpha,
    cost,
    curves,
    grid,
    layers,
    methods,
    prompts,
    rates,
    shares,
    zero_shot,
)
from train import TrainConfig

TITLE = "# LoRA on"  # the model follows
# The page runs no script and loads nothing, whatever texts it holds.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:; base-uri 'none'; form-action 'none'">
<title>"""
# The questions whose runs differ in cost.
PRICED = ("curves", "prompts", "layers", "answers", "targets")
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 14px }
th, td { border-bottom: 1px solid #bbb; padding: .3em .7em; text-align: right }
th:first-child, td:first-child, pre { text-align: left } td { vertical-align: top }
img { max-width: 100% }
pre { overflow-x: auto; background: #f4f4f4; padding: .7em; font-size: 13px }
td pre { white-space: pre-wrap; overflow-wrap: anywhere; width: 22em; margin: 0 }"""
SECTIONS: dict[str, Callable[[Sequence[Row], TrainConfig], Section]] = {
    "shares": shares, "zero_shot": zero_shot, "curves": curves, "alpha": alpha,
    "prompts": prompts, "grid": grid, "rates": rates, "methods": methods, "layers": layers,
    "answers": text_sections.answers, "targets": text_sections.targets,
}


def sections(
    questions: Mapping[str, Sequence[Row]], config: TrainConfig, asked: Collection[str]
) -> dict[str, Section]:
    """Return a section for each question in `asked` and for each whose runs are all finished."""
    shown = {name: rows for name, rows in questions.items()
             if name in asked or all(job.finished for row in rows for job in row.jobs)}
    found = {name: SECTIONS[name](rows, config) for name, rows in shown.items()}
    priced = [row for name in PRICED for row in shown.get(name, ()) if row.runs]
    return found | ({"cost": cost(priced)} if priced else {})


def head(questions: Mapping[str, Sequence[Row]], config: TrainConfig, command: str) -> list[str]:
    """Return the lines on model, data, machine, scores and the command."""
    runs = [run for rows in questions.values() for row in rows for run in row.runs]
    known = [{"device": run.saved.device, "dtype": run.saved.dtype, **run.saved.facts}
             for run in runs]
    used = []
    for name in ("device", "processor", "threads", "dtype", "torch", "commit"):
        values = dict.fromkeys(str(each[name]) for each in known if each.get(name) is not None)
        used += [f"{name} {plain(', '.join(values))}"] if any(values) else []
    machine = f" The runs used: {'; '.join(used)}." if used else ""
    task = make_task(config.task)
    return [f"{TITLE} {plain(Path(config.init_from).name)}: {config.task.replace('_', ' ')}", "",
            f"Model {code(config.init_from)}, data {code(config.dataset)}, {config.max_iters} "
            f"steps of {config.window} {task.noun}.{machine}", "",
            f"{task.explain_scores()} The best checkpoint is the one with the lowest validation "
            "loss. Each run reads the test split once, at its end.", "", *fenced([command])]


def check_folder(folder: Path) -> None:
    """Raise ValueError if `folder` cannot hold a report, or holds somebody else's files.

    A report of this program is known by its title; the pictures beside a `report.md` are its own.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"report_dir={str(folder)!r}: {there} is no folder that can be written to")
    titles = {"report.md": TITLE, "report.html": f"<title>{TITLE[2:]}"}
    foreign = {name for name, title in titles.items() if not has_title(folder / name, title)}
    if "report.md" in foreign:
        foreign |= {f"{name}.png" for name in SECTIONS}
    for name in sorted(foreign):
        if (folder / name).exists():
            raise ValueError(f"report_dir={str(folder)!r} holds a {name} that this program did "
                             "not write; choose another folder")


def has_title(path: Path, title: str) -> bool:
    """Return whether a file has `title` near its beginning."""
    return path.is_file() and title.encode() in path.read_bytes()[:2000]


def write_report(
    questions: Mapping[str, Sequence[Row]], config: ExperimentsConfig, command: str,
    asked: Collection[str],
) -> Path:
    """Write `report.md`, its pictures, and `report.html` with the pictures inside.

    The report answers the questions in `asked` even if some of their runs are not finished.
    Returns the path of `report.md`. Raises ValueError as `check_folder` does, OSError if the
    files cannot be written.
    """
    folder, lines = Path(config.report_dir), head(questions, config, command)
    check_folder(folder)
    found = sections(questions, config, asked)
    for name, section in found.items():
        lines += ["", f"## {section.title}", "", section.basis, "", *section.lines]
        if section.figure:
            lines += ["", f"![{section.title}]({name}.png)"]
    text = "\n".join(lines) + "\n"
    with atomic_write(folder / "report.md") as path:  # first: it says whose the pictures are
        path.write_text(text, "utf-8")
    for name, section in found.items():
        if section.figure:
            section.figure.suptitle(section.basis, fontsize="small")
            with atomic_write(folder / f"{name}.png") as path:
                section.figure.savefig(path, dpi=150, format="png")
    with atomic_write(folder / "report.html") as path:
        path.write_text(to_html(text, folder), "utf-8")
    return folder / "report.md"


def to_html(text: str, folder: Path) -> str:
    """Return the report as one HTML page with its pictures inside."""
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "md_in_html"])

    def inline(match: re.Match) -> str:
        picture = base64.b64encode((folder / match[2]).read_bytes()).decode()
        return f'{match[1]}src="data:image/png;base64,{picture}"'

    body = re.sub(r'(<img [^<>]*)src="(\w+\.png)"', inline, body)
    title = html.escape(text.partition("\n")[0].lstrip("# "))
    return f"{PAGE}{title}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
