"""Read the folders of an experiment's runs into the rows of the report's tables."""

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
from runtime.run_folder import SavedRun, read_metrics, read_run
from train import TrainConfig


class TrainedRun(NamedTuple):
    """What the folder of a finished run of `train.py` holds."""

    saved: SavedRun
    metrics: list[dict[str, float]]
    results: dict[str, dict[str, Any]]  # of the best and the last checkpoint
    predictions: dict[str, list[dict[str, Any]]]  # of both, for each test example
    checkpoint_bytes: int

    @property
    def config(self) -> TrainConfig:
        return self.saved.config(TrainConfig)

    @property
    def validation_loss(self) -> float:
        """The lowest loss after step 0, which chose the best checkpoint."""
        return min(line["validation_loss"] for line in self.metrics
                   if "validation_loss" in line and line["iteration"] > 0)


class Row(NamedTuple):
    """A variant in a table: its label, the settings it changes, its jobs, and their errors."""

    label: str
    changes: Mapping[str, Any]
    jobs: Sequence[Job]
    errors: Mapping[str, str]  # by the job's name

    @property
    def trains(self) -> bool:
        """Whether its runs train; if not, generate.py scores the base model."""
        return "lora_rank" in self.changes

    @property
    def runs(self) -> list[TrainedRun]:
        """Its finished training runs."""
        return [load_run(job.folder) for job in self.jobs if self.trains and job.finished]

    @property
    def untrained(self) -> list[Path]:
        """The result files of its finished jobs of `generate.py`."""
        return [path for job in self.jobs for path in job.folder.glob(job.result)]

    @property
    def seeds(self) -> str:
        """The number of finished runs; if some are not, also the reason."""
        number = sum(job.finished for job in self.jobs)
        if number == len(self.jobs):
            return str(number)
        return f"{number} of {len(self.jobs)}: {self.trouble}"

    @property
    def trouble(self) -> str:
        """The error of the first unfinished run, or its state."""
        job = next(job for job in self.jobs if not job.finished)
        return plain(f"failed: {self.errors[job.name]}" if job.name in self.errors else job.state)


class Section(NamedTuple):
    """The answer to a question; `basis` names the examples and seeds behind it."""

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
    """Return the predictions that a file of results summarizes."""
    name = "predictions" + results.stem.removeprefix("results") + ".jsonl"
    return read_predictions(results.with_name(name))


def plain(text: str) -> str:
    """Escape any text, so that a table's cell shows it verbatim, in one line."""
    return re.sub(r"([|*_`\[\\])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean over the seeds and, if there are several, their standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def losses(row: Row) -> list[float]:
    return [run.validation_loss for run in row.runs]


def commands(rows: Sequence[Row]) -> list[str]:
    """Return the exact commands behind a table, in a folded block."""
    summary = "the exact commands, first seed; the others differ in seed and out_dir"
    return ["", f'<details markdown="1"><summary>{summary}</summary>', "",
            *fenced(row.jobs[0].command for row in rows), "", "</details>"]


def fenced(lines: Iterable[str]) -> list[str]:
    return ["~~~~", *lines, "~~~~"]


def basis(rows: Sequence[Row]) -> str:
    """Return the examples and seeds behind every number of a section."""
    runs = [run for row in rows for run in row.runs]
    sizes = {f"n = {run.results['best']['n']:,} test and "
             f"{run.saved.facts['validation_reviews']:,} validation "
             f"{find_task(run.config.task).noun}" for run in runs}
    seeds = dict.fromkeys(str(job.settings.get("seed", TrainConfig.seed))
                          for row in rows for job in row.jobs if job.finished)
    return f"{'; '.join(sorted(sizes)) or 'n = 0'}; seeds {', '.join(seeds) or 'none yet'}."
