"""The report of the experiments: tables and curves computed from the runs' folders."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from experiments import page, text_sections
from experiments.escaping import code, fenced, plain
from experiments.page import write_page
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
from experiments.shot_section import shots
from tasks.registry import make_task
from train import TrainConfig

TITLE = "# LoRA on"  # the model follows
# The questions whose runs differ in cost.
PRICED = ("curves", "prompts", "layers", "answers", "targets")
SECTIONS: dict[str, Callable[[Sequence[Row], TrainConfig], Section]] = {
    "shares": shares, "zero_shot": zero_shot, "curves": curves, "alpha": alpha,
    "prompts": prompts, "grid": grid, "rates": rates, "methods": methods, "layers": layers,
    "shots": shots, "answers": text_sections.answers, "targets": text_sections.targets,
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


def write_report(
    questions: Mapping[str, Sequence[Row]], config: ExperimentsConfig, command: str,
    asked: Collection[str],
) -> Path:
    """Write `report.md`, its pictures, and `report.html` with the pictures inside.

    The report answers the questions in `asked` even if some of their runs are not finished.
    Returns the path of `report.md`. Raises ValueError as `check_folder` does, OSError if the
    files cannot be written.
    """
    lines = head(questions, config, command)
    return write_page(Path(config.report_dir), TITLE, lines, sections(questions, config, asked),
                      set(SECTIONS))


def check_folder(folder: Path) -> None:
    """Raise ValueError if `folder` cannot hold a report, or holds somebody else's files."""
    page.check_folder(folder, TITLE, set(SECTIONS))
