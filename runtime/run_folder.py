"""A run's folder: its settings, metrics and plot, and who may write to it."""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from checkpoints.files import atomic_write, read_json, remove_leftovers, write_json
from configurator import ROOT
from runtime.tracking import start_wandb

FINISHED = '_last"'  # so ends the name of the metric that a run logs last
# They change what a run reports, not what it computes.
FREE_SETTINGS = {
    "out_dir", "overwrite", "log_interval", "always_save_checkpoint", "wandb_project", "wandb_mode",
    "baseline",
}
# What it takes to rebuild a run's model and to ask its questions again.
NEEDED_SETTINGS = {
    "init_from", "task", "dataset", "prompt", "block_size", "train_size", "test_size", "seed",
    "dropout",
    "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_qkv",
}


def read_run(out_dir: str) -> dict[str, Any]:
    """Return the `config.json` of a run.

    Raises FileNotFoundError if there is none, ValueError if it is not a run's or too old a one's.
    """
    path = Path(out_dir, "config.json")
    if not path.is_file():
        raise FileNotFoundError(f"out_dir={out_dir!r} holds no run: there is no {path}")
    run = read_json(path)
    missing = {"settings", "device", "dtype"} - run.keys()
    missing |= NEEDED_SETTINGS - run.get("settings", {}).keys()
    if missing:
        raise ValueError(f"{path} is not of this version: it lacks {', '.join(sorted(missing))}")
    return run


def changed_settings(settings: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Name the settings that would change what a run computes, with both values."""
    return ", ".join(
        f"{name}={settings.get(name)!r}, now {value!r}"
        for name, value in other.items()
        if name not in FREE_SETTINGS and settings.get(name) != value
    )


def refuse_loss(settings: Mapping[str, Any]) -> None:
    """Raise ValueError if starting anew in `out_dir` would lose work, unless told to overwrite.

    A finished run of the same settings may be repeated, and so may one that was killed before its
    first state was whole: it ends the same.
    """
    folder = Path(settings["out_dir"])
    saved = [name for name in ("trainer_state.pt", "best", "last") if (folder / name).exists()]
    if settings["overwrite"] or not saved:
        return
    changed = changed_settings(read_run(str(folder))["settings"], settings)
    if changed:
        held = f"a run of other settings ({changed}); choose another out_dir"
    elif "trainer_state.pt" in saved and not is_finished(folder):
        held = "an unfinished run; go on with init_from=resume"
    else:
        return
    raise ValueError(f"out_dir={str(folder)!r} holds {held}, or overwrite=True to replace it")


def lock_folder(folder: Path) -> FileLock:
    """Keep other runs out of `folder` until the lock is released or this process ends.

    What a killed run left half written is removed. Raises ValueError if another run is in it.
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


def start_folder(settings: Mapping[str, Any], **facts: Any) -> None:
    """Remove what an earlier run left in `out_dir`, and write down how this one is made."""
    folder = Path(settings["out_dir"])
    for name in ("trainer_state.pt", "metrics.jsonl", "loss.png"):  # the state first: without
        (folder / name).unlink(missing_ok=True)                     # it nothing goes on from here
    for name in ("base", "best", "last"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_json(folder / "config.json", {"settings": settings, **facts, "commit": git_commit()})


def git_commit() -> str | None:
    """Return the commit of this code, or None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # git is not installed
        return None


class MetricsLog:
    """Appends to `metrics.jsonl` and to a W&B run; does nothing unless `enabled`."""

    def __init__(self, settings: Mapping[str, Any], enabled: bool = True) -> None:
        self.folder, self.enabled = Path(settings["out_dir"]), enabled
        self.wandb = start_wandb(settings) if enabled else None

    def log(self, iteration: int, **values: float) -> None:
        if not self.enabled:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self._track(lambda: self.wandb.log(values, step=iteration))

    def close(self) -> None:
        if self.enabled:
            try:
                plot_losses(self.folder)
            except OSError as error:  # a full disk; whatever ended the run is told besides
                print(error, file=sys.stderr)
        self._track(lambda: self.wandb.finish())

    def _track(self, call: Callable[[], object]) -> None:
        """Make a call to W&B; whatever it throws ends the tracking, not the run."""
        if self.wandb:
            try:
                call()
            except Exception as error:  # a tracking service may throw anything
                print(f"wandb stopped: {error}")
                self.wandb = None


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl`, without one that a crash cut short."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def is_finished(folder: Path) -> bool:
    """Tell whether a run has scored its last checkpoint, the last thing that it does."""
    return any(FINISHED in json.dumps(line) for line in read_metrics(folder))


def training_seconds(settings: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> float:
    """Return the seconds that all optimizer steps of a run took, without its validations."""
    reviews = settings["batch_size"] * settings["gradient_accumulation_steps"]
    seconds = [reviews / line["reviews_per_second"] for line in metrics
               if "reviews_per_second" in line]
    return settings["max_iters"] * statistics.mean(seconds) if seconds else 0.0


def forget_metrics(folder: Path, iteration: int, evaluated: bool) -> None:
    """Drop the lines of `metrics.jsonl` that come after a state saved at `iteration`."""
    lines = [
        json.dumps(line) + "\n" for line in read_metrics(folder)
        if line["iteration"] < iteration + (evaluated and "validation_loss" in line)
    ]
    with atomic_write(folder / "metrics.jsonl") as temporary:
        temporary.write_text("".join(lines), "utf-8")


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
    axes.set_yscale("log")  # the format is learned in a few steps, the task in the long rest
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    with atomic_write(folder / "loss.png") as path:
        figure.savefig(path, dpi=150)
