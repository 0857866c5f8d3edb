"""Sections on runs that somebody selects: a comparison of any of them, and one at any strength."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from experiments.answerers import Answerer
from experiments.escaping import plain
from experiments.figures import over_strength, spectra, validation_curves
from experiments.finished_runs import TrainedRun
from experiments.jobs import job_of
from experiments.results import Row, Section
from experiments.sections import accuracy_table
from experiments.text_sections import metrics_table
from tasks.registry import find_task
from tasks.scores import markdown_table

COLUMNS = 16  # of singular values in a table
LOSS = "validation_loss"
STRENGTHS = [i / 10 for i in range(21)]
MEASURED, EXAMPLES = [i / 4 for i in range(9)], 200  # of the accuracy, which takes longer


def comparison(runs: Mapping[Path, TrainedRun]) -> Section:
    """Return the validation curves of runs of any tasks, and the report's table of each task.

    Raises ValueError if there is no run.
    """
    if not runs:
        raise ValueError("Choose a run.")
    rows = [Row(str(folder), {"lora_rank": run.config.lora_rank}, [job_of(folder, run.config)], {})
            for folder, run in runs.items()]
    series = [(str(folder), [run.metrics]) for folder, run in runs.items()]
    logged = {key for run in runs.values() for line in run.metrics for key in line}
    key = "validation_accuracy" if "validation_accuracy" in logged else "train_loss"
    title = key.replace("_", " ")
    lines = curve_table(runs, [LOSS, key] if key != "train_loss" else [LOSS])
    for name in dict.fromkeys(run.config.task for run in runs.values()):
        task = find_task(name)
        of_task = [row for row in rows if row.runs and row.runs[0].config.task == name]
        if of_task:
            lines += ["", *(accuracy_table(of_task, of_task[0]) if task.answers == "word"
                            else metrics_table(of_task, task.metrics))]
    return Section("Curves", "", lines, validation_curves(series, key, title, first=1))


def curve_table(runs: Mapping[Path, TrainedRun], keys: list[str]) -> list[str]:
    """Return a table with the values of `keys` at each validation after step 0."""
    steps = sorted({line["iteration"] for run in runs.values() for line in run.metrics
                    if LOSS in line and line["iteration"] > 0})
    lines = [["", *(f"step {step}" for step in steps)]]
    for folder, run in runs.items():
        for key in keys:
            values = {line["iteration"]: line[key] for line in run.metrics if key in line}
            lines.append([f"{plain(str(folder))}: {key.replace('_', ' ')}",
                          *(f"{values[step]:.4f}" if step in values else "" for step in steps)])
    return markdown_table(lines)


def chances_section(run: Answerer, text: str, here: float) -> Section:
    """Show the last label's probability over the factor of ΔW, and mark the factor `here`."""
    title = f"P({run.task.labels[-1]})"
    chances = {factor: run.chance_at(factor, text) for factor in STRENGTHS}
    return Section(f"{title} over s", "", strength_table(title, chances),
                   over_strength(chances, title, here=here))


def accuracy_section(run: Answerer, track: Callable[..., Iterable[float]] = iter) -> Section:
    """Show the accuracy on validation examples over the factor of ΔW; `track` shows progress.

    Raises ValueError for a task without labels.
    """
    if not run.task.choices:
        raise ValueError(f"task={run.task.name} has no labels to count.")
    n = len(run.loader.spread("validation", EXAMPLES))
    accuracies = {factor: run.accuracy_at(factor, EXAMPLES) for factor in track(MEASURED)}
    return Section(f"Accuracy over s, {n} validation {run.task.noun}", "",
                   strength_table("accuracy", accuracies),
                   over_strength(accuracies, "validation accuracy", n))


def strength_table(title: str, values: Mapping[float, float]) -> list[str]:
    return markdown_table([["s", *(f"{factor:g}" for factor in values)],
                           [title, *(f"{value:.4f}" for value in values.values())]])


def spectrum_section(parts: Mapping[str, list[list[float]]]) -> Section:
    """Show the singular values of ΔW by part of the block, with a line for each layer."""
    rank = max(len(values) for layers in parts.values() for values in layers)
    lines = [["", *(f"σ{i}" for i in range(1, min(rank, COLUMNS) + 1))]]
    for part, layers in parts.items():
        lines += [[f"{plain(part)}, layer {i}", *(f"{value:.3f}" for value in values[:COLUMNS])]
                  for i, values in enumerate(layers)]
    basis = f"The table has the first {COLUMNS} of {rank}." if rank > COLUMNS else ""
    return Section("The singular values of ΔW", basis, markdown_table(lines), spectra(parts))
