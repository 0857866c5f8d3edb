"""A run's metrics: `metrics.jsonl`, a line for each log, and `loss.png`, their plot."""

import json
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoints.files import atomic_write
from runtime.tracking import Tracker

METRICS_FILE, PLOT_FILE = "metrics.jsonl", "loss.png"
AT_THE_END = ("test_", "final_")  # metrics that a run logs at its end


class MetricsLog:
    """Append to `metrics.jsonl` and to the tracker; without a folder, do nothing."""

    def __init__(self, folder: Path | None, tracker: Tracker | None = None) -> None:
        self.folder, self.tracker, self.plotted = folder, tracker or Tracker(), False
        if folder is not None:
            end_last_line(folder / METRICS_FILE)

    def log(self, iteration: int, **values: float) -> None:
        if self.folder is None:
            return
        with open(self.folder / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self.tracker.log(values, iteration)
        self.plotted = False

    def close(self) -> None:
        if self.folder is not None and not self.plotted:
            self.plot()
        self.tracker.close()

    def plot(self) -> None:
        try:
            plot_losses(self.folder)
            self.plotted = True
        except OSError as error:  # a full disk must not hide the error that ended the run
            print(error, file=sys.stderr)


def end_last_line(path: Path) -> None:
    """End a line that a crash cut short, so that the next one does not continue it."""
    if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with open(path, "a") as file:
            file.write("\n")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl`, without one that a crash cut short.

    Raises ValueError, naming the line, if it holds anything else.
    """
    path, metrics = folder / METRICS_FILE, []
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line) if line.endswith("}") else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if values and not isinstance(values.get("iteration"), int):
            raise ValueError(f"{path}:{number}: a line must name its iteration")
        if values and not all(isinstance(value, int | float) for value in values.values()):
            raise ValueError(f"{path}:{number}: all values must be numbers")
        metrics += [values] if values else []
    return metrics


def forget_later_metrics(folder: Path, iteration: int, evaluated: bool) -> None:
    """Drop what was logged after a state saved at `iteration`, and the scores of the run's end.

    `evaluated` tells whether the state includes the validation at `iteration`.
    """
    lines = [
        json.dumps(line) + "\n" for line in read_metrics(folder)
        if line["iteration"] < iteration + (evaluated and "validation_loss" in line)
        and not any(key.startswith(AT_THE_END) for key in line)
    ]
    with atomic_write(folder / METRICS_FILE) as temporary:
        temporary.write_text("".join(lines), "utf-8")


def training_seconds(
    metrics: Sequence[Mapping[str, float]], window: int, max_iters: int
) -> float:
    """Return the seconds that `max_iters` steps of `window` examples took, without validations."""
    seconds = [window / line["reviews_per_second"] for line in metrics
               if "reviews_per_second" in line]
    return max_iters * statistics.mean(seconds) if seconds else 0.0


def plot_losses(folder: Path) -> None:
    """Draw `loss.png`: training and validation loss over the optimizer steps."""
    from matplotlib.figure import Figure  # slow to import; most processes draw nothing
    from matplotlib.ticker import LogLocator, NullFormatter

    metrics = read_metrics(folder)
    figure = Figure(figsize=(7, 4))  # its margins are fixed: to find them would double the time
    axes = figure.add_axes((0.13, 0.12, 0.84, 0.8))
    for key, style in (("train_loss", "-"), ("validation_loss", "o--")):
        lines = [line for line in metrics if key in line]
        steps, losses = [line["iteration"] for line in lines], [line[key] for line in lines]
        axes.plot(steps, losses, style, label=key.replace("_", " "))
    axes.set(xlabel="optimizer steps", ylabel="loss (nats a token)")
    axes.set_title(folder.name, parse_math=False)
    axes.set_yscale("log")  # a few steps teach the format, the long rest the task
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    with atomic_write(folder / PLOT_FILE) as path, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the folder's name may hold an emoji
        figure.savefig(path, dpi=150)
