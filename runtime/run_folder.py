"""A run's folder: its settings, its metrics and plot, whether it is finished, who may write to it.

`config.json` holds the settings, `metrics.jsonl` a line for each log, `loss.png` their plot,
`trainer_state.pt` the state to resume from, `best/` and `last/` the checkpoints with their scores,
and `finished.json` says that the run is complete.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from checkpoints.files import atomic_write, read_json, remove_leftovers, write_json
from checkpoints.trainer_state import STATE_FILE
from configurator import ROOT
from runtime.device import device_name, resolve_dtype
from runtime.tracking import Tracker

CONFIG_FILE, METRICS_FILE, FINISHED_FILE = "config.json", "metrics.jsonl", "finished.json"
# These change what a run reports, not what it computes.
FREE_SETTINGS = {
    "out_dir", "overwrite", "log_interval", "always_save_checkpoint", "wandb_project", "wandb_mode",
    "baseline",
}
Config = TypeVar("Config")


@dataclass(frozen=True)
class FolderConfig:
    """The setting that names a run's folder."""

    out_dir: Annotated[str, "folder of the run"] = "out"


@dataclass(frozen=True)
class NewFolderConfig(FolderConfig):
    """Settings of a script that starts a run in a folder."""

    overwrite: Annotated[bool, "replace a run of other settings in out_dir"] = False


@dataclass(frozen=True)
class SavedRun:
    """What `config.json` says about a run: its settings, and the machine and model it had."""

    settings: Mapping[str, Any]
    device: str
    dtype: str  # what "auto" resolved to
    processes: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)  # processor, versions, parameters, ...

    def config(self, cls: type[Config]) -> Config:
        """Return the settings as `cls`; a setting that the run does not name has its default.

        Raises ValueError for a value of another type than the default's.
        """
        known = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
        values = {name: value for name, value in self.settings.items() if name in known}
        for name, value in values.items():
            expected = type(known[name])
            if type(value) is not expected and (type(value), expected) != (int, float):
                raise ValueError(f"{CONFIG_FILE}: {name}={value!r:.80} must be of type "
                                 f"{expected.__name__}")
        return cls(**values)


def read_run(out_dir: str) -> SavedRun:
    """Read the `config.json` of a fine-tuning run.

    Raises FileNotFoundError if there is none, ValueError if it belongs to something else.
    """
    path = Path(out_dir, CONFIG_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"out_dir={out_dir!r} holds no run: there is no {path}")
    run = read_json(path)
    if not isinstance(settings := run.get("settings", {}), dict):
        raise ValueError(f"{path}: settings must be an object, not {settings!r:.80}")
    missing = {"settings", "device", "dtype"} - run.keys()
    if missing := missing | ({"init_from", "lora_rank"} - settings.keys()):
        raise ValueError(f"{path} is not a fine-tuning run's: it lacks "
                         f"{', '.join(sorted(missing))}")
    named = {name: run.pop(name) for name in ("settings", "device", "dtype")}
    return SavedRun(**named, processes=run.pop("processes", 1), facts=run)


def run_dtype(run: SavedRun | None, name: str, device: torch.device) -> torch.dtype:
    """Resolve the dtype called `name`; auto is that of a saved `run` on hardware like its own."""
    same = run is not None and name == "auto" and run.device == device_name(device)
    return resolve_dtype(run.dtype if same else name, device)


def changed_settings(
    saved: Mapping[str, Any], config: Any, ignore: Collection[str] = ()
) -> str:
    """Name the settings that would change what a run computes, with both values.

    A setting that `saved` lacks had its default: it was added later.
    """
    saved = {field.name: field.default for field in fields(config)} | dict(saved)
    return ", ".join(
        f"{name}={saved[name]!r}, now {value!r}" for name, value in asdict(config).items()
        if name not in FREE_SETTINGS and name not in ignore and saved[name] != value
    )


def refuse_loss(config: NewFolderConfig) -> None:
    """Raise ValueError if a new run in `out_dir` would lose work, unless `overwrite` allows it.

    A finished run of the same settings may be repeated, and so may one that was killed before it
    saved its first state: both end with the same result.
    """
    folder = Path(config.out_dir)
    saved = [name for name in (STATE_FILE, "best", "last") if (folder / name).exists()]
    if config.overwrite or not saved:
        return
    changed = changed_settings(read_run(config.out_dir).settings, config)
    if changed:
        held = f"a run of other settings ({changed}); choose another out_dir"
    elif STATE_FILE in saved and not is_finished(folder):
        held = "an unfinished run; resume it with init_from=resume"
    else:
        return
    raise ValueError(f"out_dir={config.out_dir!r} holds {held}, or overwrite=True to replace it")


def lock_folder(folder: Path) -> FileLock:
    """Keep other runs out of `folder` until the lock is released or this process ends.

    Removes the temporary files of killed runs. Raises ValueError if another run holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
        remove_leftovers(folder)
    except Timeout:
        raise ValueError(f"out_dir={str(folder)!r} is in use by another run") from None
    except NotImplementedError:  # as on some network drives
        print(f"{folder} cannot be locked here: let no other run write to it", file=sys.stderr)
    return lock


def start_folder(config: FolderConfig, **facts: Any) -> None:
    """Remove what an earlier run left in `out_dir`, and write the settings of the new one."""
    folder = Path(config.out_dir)
    # The state goes first: without it, nobody can resume from a folder that is half removed.
    for name in (STATE_FILE, FINISHED_FILE, METRICS_FILE, "loss.png"):
        (folder / name).unlink(missing_ok=True)
    for name in ("base", "best", "last"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_json(folder / CONFIG_FILE,
               {"settings": asdict(config), **facts, "commit": git_commit()})  # type: ignore


def forget_results(folder: Path) -> None:
    """Remove the scores and predictions of a checkpoint that is about to be replaced."""
    for pattern in ("results*.json", "predictions*.jsonl"):
        for path in folder.glob(pattern):
            path.unlink()


def git_commit() -> str | None:
    """Return the commit of this code, or None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # git is not installed
        return None


class MetricsLog:
    """Append to `metrics.jsonl` and to the tracker; without a folder, do nothing."""

    def __init__(self, folder: Path | None, tracker: Tracker | None = None) -> None:
        self.folder, self.tracker = folder, tracker or Tracker()

    def log(self, iteration: int, **values: float) -> None:
        if self.folder is None:
            return
        with open(self.folder / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self.tracker.log(values, iteration)

    def close(self) -> None:
        if self.folder is not None:
            try:
                plot_losses(self.folder)
            except OSError as error:  # a full disk must not hide the error that ended the run
                print(error, file=sys.stderr)
        self.tracker.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl`, without one that a crash cut short.

    Raises ValueError, naming the line, if it holds anything else.
    """
    path, metrics = folder / METRICS_FILE, []
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            metrics += [json.loads(line)] if line.endswith("}") else []
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return metrics


def mark_finished(folder: Path, iteration: int) -> None:
    """Record that the run has trained `iteration` steps and scored its checkpoints."""
    write_json(folder / FINISHED_FILE, {"iteration": iteration})


def is_finished(folder: Path) -> bool:
    """Return whether a run has its record and its metrics, or an older run its last test score."""
    metrics = read_metrics(folder)
    recorded = (folder / FINISHED_FILE).is_file() and bool(metrics)
    return recorded or any(key.startswith("test_") and key.endswith("_last")
                           for line in metrics for key in line)


def reopen(folder: Path, iteration: int, evaluated: bool) -> None:
    """Continue a run at a state saved at `iteration`: it is not finished, and later lines go."""
    (folder / FINISHED_FILE).unlink(missing_ok=True)
    lines = [
        json.dumps(line) + "\n" for line in read_metrics(folder)
        if line["iteration"] < iteration + (evaluated and "validation_loss" in line)
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
    metrics = read_metrics(folder)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, style in (("train_loss", "-"), ("validation_loss", "o--")):
        lines = [line for line in metrics if key in line]
        steps, losses = [line["iteration"] for line in lines], [line[key] for line in lines]
        axes.plot(steps, losses, style, label=key.replace("_", " "))
    axes.set(xlabel="optimizer steps", ylabel="loss (nats a token)", title=folder.name)
    axes.set_yscale("log")  # a few steps teach the format, the long rest the task
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    with atomic_write(folder / "loss.png") as path:
        figure.savefig(path, dpi=150)
