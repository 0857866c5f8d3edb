"""Fill the skeleton of the second course's report with a student's own runs.

Tables, curves and commands come from the runs' folders; what they mean is the student's to write.
"""

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.files import atomic_write, read_json, writable_folder
from runtime.metrics import PLOT_FILE, read_metrics, training_seconds
from runtime.run_folder import CONFIG_FILE, SavedRun, is_finished, read_run
from tasks.registry import make_task
from tasks.scores import markdown_table
from train import TrainConfig

PROSE = "*Write here.*"
SHOWN = ("init_from", "method", "lora_rank", "lora_alpha", "lora_targets", "learning_rate",
         "max_iters", "batch_size", "gradient_accumulation_steps", "seed")


class Section(NamedTuple):
    """A criterion of the course: its weight in percent, and what the student should say."""

    title: str
    weight: int
    asks: str


SECTIONS = {  # the weights are examples: a teacher sets those of his course here
    "choice": Section("Choice of the model", 15, "Which architecture and training data does it "
                      "have, and why do they suit the task?"),
    "data": Section("Data and preprocessing", 15, "What is in the data, how was it cleaned and "
                    "split, what was cut?"),
    "integration": Section("Integration of LoRA", 20, "Which layers are adapted, and why these?"),
    "configuration": Section("Configuration", 15, "Why these settings? What did you try?"),
    "results": Section("Results against the baseline", 25, "Which differences are larger than "
                       "their intervals? Show right and wrong answers."),
    "limits": Section("Limitations", 10, "What do these numbers not show?"),
}


class StudentRun(NamedTuple):
    """A run's folder, its saved settings, and the scores of its checkpoints by name."""

    folder: Path
    saved: SavedRun
    scores: Mapping[str, Mapping[str, Any]]


def find_runs(out: Path) -> list[StudentRun]:
    """Return the finished runs in `out` or under it. Raises ValueError if there is none."""
    runs = []
    for config in sorted(out.rglob(CONFIG_FILE)):
        if is_finished(config.parent):
            scores = {name: read_json(path) for name in ("base", "best", "last")
                      if (path := config.parent / name / "results.json").is_file()}
            runs.append(StudentRun(config.parent, read_run(str(config.parent)), scores))
    if not runs:
        raise ValueError(f"{out} holds no finished run; train one with python train.py")
    return runs


def setting_rows(runs: Sequence[StudentRun]) -> list[list[str]]:
    """Return the table of the runs' settings and of the weights they trained."""
    rows = [["run", *SHOWN, "trained weights", "minutes"]]
    for run in runs:
        count = run.saved.facts.get("parameters", {})
        config = run.saved.config(TrainConfig)
        seconds = training_seconds(read_metrics(run.folder), config.window, config.max_iters)
        rows.append([
            run.folder.name, *(str(getattr(config, name)) for name in SHOWN),
            f"{count['trained']:,} of {count['total']:,}" if count else "unknown",
            f"{seconds / 60:.1f}"])
    return rows


def score_tables(runs: Sequence[StudentRun]) -> Iterator[list[str]]:
    """Yield a table of scores for each task of the runs; other tasks have other scores."""
    by_task: dict[str, list[list[str]]] = {}
    for run in runs:
        name = str(run.saved.settings.get("task", "sentiment"))
        task = make_task(name)
        for checkpoint, results in run.scores.items():
            cells = task.columns(results)
            rows = by_task.setdefault(name, [["run", "checkpoint", *cells]])
            rows.append([run.folder.name, checkpoint, *cells.values()])
    for name, rows in by_task.items():
        yield [f"Task `{name}`, test split:", *markdown_table(rows), ""]


def commands(runs: Sequence[StudentRun]) -> list[str]:
    """Return the lines that repeat the runs, each with all of its settings."""
    return [shlex.join(["python", "train.py", *(f"{name}={value}" for name, value in
                                                run.saved.settings.items())]) for run in runs]


def figures(runs: Sequence[StudentRun], folder: Path) -> list[str]:
    """Copy the curves of the runs to `folder`; return the lines that show them."""
    lines = []
    for number, run in enumerate(runs, 1):
        if (run.folder / PLOT_FILE).is_file():
            name = f"loss-{number}.png"
            with atomic_write(folder / name) as temporary:
                shutil.copyfile(run.folder / PLOT_FILE, temporary)
            lines += [f"![Losses of {run.folder.name}]({name})", ""]
    return lines


def write_course_report(out: Path, folder: Path) -> Path:
    """Write `report.md` and its figures to `folder`; return its path.

    Raises ValueError if `out` holds no finished run, or if a report is there already: it may hold
    a student's text.
    """
    runs, path = find_runs(out), folder / "report.md"
    if path.exists():
        raise ValueError(f"{path} is there already and may hold your text; choose another out_dir")
    writable_folder(folder)
    filled = {
        "configuration": [*markdown_table(setting_rows(runs)), "", "~~~~", *commands(runs), "~~~~",
                          ""],
        "results": [*(line for table in score_tables(runs) for line in table),
                    *figures(runs, folder)]}
    lines = ["# Report", "", "| section | weight |", "|---|---|"]
    lines += [f"| {each.title} | {each.weight} % |" for each in SECTIONS.values()]
    for key, section in SECTIONS.items():
        lines += ["", f"## {section.title}", "", f"*{section.asks}*", "", *filled.get(key, []),
                  PROSE]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
    return path
