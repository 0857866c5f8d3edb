"""The rows of the report's tables, and what their cells hold."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from experiments.escaping import fenced, plain
from experiments.finished_runs import Scores, TrainedRun, load_run
from experiments.jobs import Job
from tasks.registry import find_task
from train import TrainConfig


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
    def untrained(self) -> list[Scores]:
        """The base model's scores, from its finished jobs of `generate.py`."""
        return [job.scores() for job in self.jobs if not self.trains and job.finished]

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


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean over the seeds and, if there are several, their standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def losses(row: Row) -> list[float]:
    return [run.validation_loss for run in row.runs]


def commands(rows: Sequence[Row]) -> list[str]:
    """Return the exact commands behind a table, in a folded block."""
    summary = "the exact commands, first seed; the others differ in seed, shots_seed, out_dir"
    return ["", f'<details markdown="1"><summary>{summary}</summary>', "",
            *fenced(row.jobs[0].command for row in rows), "", "</details>"]


def basis(rows: Sequence[Row]) -> str:
    """Return the examples and seeds behind every number of a section."""
    runs = [run for row in rows for run in row.runs]
    sizes = {f"n = {run.results['best']['n']:,} test and "
             f"{run.saved.facts['validation_reviews']:,} validation "
             f"{find_task(run.config.task).noun}" for run in runs}
    seeds = dict.fromkeys(str(job.settings.get("seed", TrainConfig.seed))
                          for row in rows for job in row.jobs if job.finished)
    return f"{'; '.join(sorted(sizes)) or 'n = 0'}; seeds {', '.join(seeds) or 'none yet'}."
