"""What the runs of an experiment left in their folders, as rows of the report's tables."""

import html
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from checkpoints.files import read_json
from dataloader import find_task
from experiments.jobs import Job
from runtime.run_folder import read_metrics, read_run
from train import TrainConfig


class TrainedRun(NamedTuple):
    """A finished run of `train.py`, as its folder tells it."""

    about: dict[str, Any]
    metrics: list[dict[str, float]]
    results: dict[str, dict[str, Any]]  # of the best and the last checkpoint
    predictions: dict[str, list[dict[str, Any]]]  # likewise, of each test example
    checkpoint_bytes: int

    @property
    def validation_loss(self) -> float:
        """The loss for which the best checkpoint was chosen; step 0 is no candidate."""
        return min(line["validation_loss"] for line in self.metrics
                   if "validation_loss" in line and line["iteration"] > 0)


class Row(NamedTuple):
    """A variant in a table: what it is called, what it changes, its jobs, and what failed."""

    label: str
    changes: Mapping[str, Any]
    jobs: Sequence[Job]
    errors: Mapping[str, str]  # by the job's name

    @property
    def trains(self) -> bool:
        """Whether its runs train, or ask the model as it is."""
        return "lora_rank" in self.changes

    @property
    def runs(self) -> list[TrainedRun]:
        """Its training runs that have ended."""
        return [load_run(job.folder) for job in self.jobs if self.trains and job.finished]

    @property
    def untrained(self) -> list[Path]:
        """The results of its jobs of `generate.py`, as far as they have ended."""
        return [path for job in self.jobs for path in job.folder.glob(job.result)]

    @property
    def seeds(self) -> str:
        """How many runs stand behind the row; of an incomplete one, why."""
        number = sum(job.finished for job in self.jobs)
        if number == len(self.jobs):
            return str(number)
        return f"{number} of {len(self.jobs)}: {self.trouble}"

    @property
    def trouble(self) -> str:
        """What keeps the first unfinished run from being finished."""
        job = next(job for job in self.jobs if not job.finished)
        return plain(f"failed: {self.errors[job.name]}" if job.name in self.errors else job.state)


class Section(NamedTuple):
    """What answers a question; `basis` is the examples and the seeds that it rests on."""

    title: str
    basis: str
    lines: list[str]
    figure: Figure | None = None


@cache
def load_run(folder: Path) -> TrainedRun:
    results, predictions = {}, {}
    for name in ("best", "last"):
        results[name] = read_json(folder / name / "results.json")
        predictions[name] = read_predictions(folder / name / "predictions.jsonl")
    weights = sum(path.stat().st_size for path in (folder / "best").glob("[!.]*.safetensors"))
    return TrainedRun(
        read_run(str(folder)), read_metrics(folder), results, predictions, weights)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def predictions_beside(results: Path) -> list[dict[str, Any]]:
    """Return the predictions that a file of results sums up."""
    name = "predictions" + results.stem.removeprefix("results") + ".jsonl"
    return read_predictions(results.with_name(name))


def plain(text: str) -> str:
    """Make any text fit into a cell of a table, to be read as it stands."""
    return re.sub(r"([|*_`\[\\])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean of the seeds and, of several, their standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def losses(row: Row) -> list[float]:
    return [run.validation_loss for run in row.runs]


def commands(rows: Sequence[Row]) -> list[str]:
    """Return the exact commands behind a table, folded away."""
    summary = "the exact commands, first seed; the others differ in seed and out_dir"
    return ["", f'<details markdown="1"><summary>{summary}</summary>', "",
            *fenced(row.jobs[0].command for row in rows), "", "</details>"]


def fenced(lines: Iterable[str]) -> list[str]:
    return ["~~~~", *lines, "~~~~"]


def basis(rows: Sequence[Row]) -> str:
    """Say what every number of a section rests on."""
    runs = [run for row in rows for run in row.runs]
    sizes = {f"n = {run.results['best']['n']:,} test and {run.about['validation_reviews']:,} "
             f"validation {find_task(run.about['settings']['task']).noun}" for run in runs}
    seeds = dict.fromkeys(str(job.settings.get("seed", TrainConfig.seed))
                          for row in rows for job in row.jobs if job.finished)
    return f"{'; '.join(sorted(sizes)) or 'n = 0'}; seeds {', '.join(seeds) or 'none yet'}."
