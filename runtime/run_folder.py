"""A run's folder: its settings, whether it is finished, who may write to it.

`config.json` holds the settings, `metrics.jsonl` a line for each log, `loss.png` their plot,
`trainer_state.pt` the state to resume from, `best/` and `last/` the checkpoints with their scores,
and `finished.json` says that the run is complete.
"""

import hashlib
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from checkpoints.files import (
    TEMPORARY,
    finite_float32,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from checkpoints.trainer_state import STATE_FILE
from configurator import ROOT, configure
from lora import check_state
from runtime.device import device_name, resolve_dtype
from runtime.folder_guard import (
    CHECKPOINTS,
    CONFIG_FILE,
    FolderConfig,
    NewFolderConfig,
    refuse_foreign_folder,
    settings_of,
)
from runtime.metrics import (
    METRICS_FILE,
    PLOT_FILE,
    MetricsLog,
    forget_later_metrics,
    read_metrics,
)
from runtime.result_files import forget_checkpoint

FINISHED_FILE = "finished.json"
REFERENCE_FILE = "reference.safetensors"  # of runs on preference pairs
PATHS = ("init_from", "dataset", "data")  # settings that older runs kept relative
INPUTS = {  # facts of a run
    "base_sha256": "the base model", "data_sha256": "the data set",
    "tokenizer_sha256": "the tokenizer",
    "reference_sha256": "the file of the reference model's log-probabilities",
}
# These change what a run reports, not what it computes.
FREE_SETTINGS = {
    "out_dir", "overwrite", "log_interval", "always_save_checkpoint", "wandb_project", "wandb_mode",
    "baseline",
}
Config = TypeVar("Config")


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

        Raises ValueError for a value of another type than the default's, or out of its range.
        """
        known = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
        values = {name: value for name, value in self.settings.items() if name in known}
        for name, value in values.items():
            expected = type(known[name])
            if type(value) is not expected and (type(value), expected) != (int, float):
                raise ValueError(f"{CONFIG_FILE}: {name}={value!r:.80} must be of type "
                                 f"{expected.__name__}")
        return configure(cls, [], values)

    def refuse_changed_inputs(self, **digests: str) -> None:
        """Raise ValueError if a file's digest is not the one that the run noted when it began."""
        for name, digest in digests.items():
            if self.facts.get(name, digest) != digest:
                raise ValueError(f"{INPUTS[name]} changed since the run began: its SHA-256 was "
                                 f"{self.facts[name]!s:.12}..., now {digest:.12}...")


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
    if type(run.get("processes", 1)) is not int:
        raise ValueError(f"{path}: processes={run['processes']!r:.80} must be a number")
    return SavedRun(run.pop("settings"), str(run.pop("device")), str(run.pop("dtype")),
                    run.pop("processes", 1), facts=run)


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
    names = {field.name for field in fields(config)}
    known = {name: value for name, value in saved.items() if name in names}
    saved = asdict(configure(type(config), [], known))  # in the words of this version
    return ", ".join(
        f"{name}={saved[name]!r}, now {value!r}" for name, value in asdict(config).items()
        if name not in FREE_SETTINGS and name not in ignore and saved[name] != value
        and not (name in PATHS and Path(str(saved[name])).absolute() == Path(value).absolute())
    )


def resumed_settings(config: Config, may_change: Collection[str]) -> Config:
    """Return the settings of the run in `out_dir` with the command line's.

    Raises ValueError for one that is not among those that `may_change`.
    """
    saved = read_run(config.out_dir)
    settings = {**saved.settings, **asdict(saved.config(type(config)))}  # unknown ones are refused
    config = configure(type(config), defaults=settings | {"out_dir": config.out_dir})
    config = replace(config, init_from=settings["init_from"])
    if changed := changed_settings(settings, config, may_change):
        raise ValueError(f"a resumed run keeps its settings, but {changed}")
    return config


def has_state(config: FolderConfig) -> bool:
    """Return whether the run in `out_dir` has saved a state; if not, it must start again.

    Raises ValueError if it has scored checkpoints, but no state: a new start would replace them.
    """
    folder = Path(config.out_dir)
    held = [name for name in CHECKPOINTS if (folder / name / "results.json").exists()]
    if held and not (folder / STATE_FILE).is_file():
        raise ValueError(
            f"out_dir={config.out_dir!r} cannot be resumed: it has {' and '.join(held)}, but no "
            f"{STATE_FILE}; its first command, repeated, starts again")
    return (folder / STATE_FILE).is_file()


def refuse_loss(config: NewFolderConfig) -> None:
    """Raise ValueError if a new run in `out_dir` would lose work, unless `overwrite` allows it.

    A finished run of the same settings may be repeated, and so may one that was killed before it
    saved its first state: both end with the same result. `overwrite` replaces runs alone: never
    the files of other programs, nor the model to start from.
    """
    folder = Path(config.out_dir)
    refuse_foreign_folder(config)
    saved = [name for name in (STATE_FILE, *CHECKPOINTS) if (folder / name).exists()]
    if config.overwrite or not saved:
        return
    changed = changed_settings(read_json(folder / CONFIG_FILE)["settings"], config)
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


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left of a run and of its checkpoints."""
    places = [folder, *(folder / name for name in (*CHECKPOINTS, "model"))]
    for path in [path for place in places for path in place.glob(".*")]:
        if re.fullmatch(TEMPORARY, path.name):
            path.unlink()


def start_folder(
    config: FolderConfig, reference: Mapping[str, Tensor] | None = None, **facts: Any
) -> None:
    """Remove what an earlier run wrote to `out_dir`, and write the settings of the new one.

    `reference` holds the log-probabilities (n, 2) of n preference pairs by split, if it has any.
    """
    folder = Path(config.out_dir)
    # The state goes first: without it, nobody can resume from a folder that is half removed.
    for name in (STATE_FILE, FINISHED_FILE, METRICS_FILE, PLOT_FILE, REFERENCE_FILE):
        (folder / name).unlink(missing_ok=True)
    forget_checkpoint(folder / "base", weights=())
    for name in ("best", "last"):
        forget_checkpoint(folder / name)
    if reference:
        write_tensors(folder / REFERENCE_FILE, reference)
    _write_run(config, facts | {"commit": git_commit()})


def continue_folder(
    config: NewFolderConfig, saved: SavedRun, iteration: int, evaluated: bool, **facts: Any
) -> None:
    """Write what the run in `out_dir` now is, then drop the metrics after its saved state.

    The order matters: from the first write on, the run is one of the new `max_iters`, and a kill
    at any later moment leaves it unfinished.
    """
    _write_run(config, {**saved.facts, **facts})
    reopen(Path(config.out_dir), iteration, evaluated)


def _write_run(config: FolderConfig, facts: Mapping[str, Any]) -> None:
    write_json(Path(config.out_dir, CONFIG_FILE),
               {"settings": asdict(config), **facts})  # type: ignore[call-overload]


def read_reference(folder: Path, pairs: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the log-probabilities (n, 2) of n pairs by split, which `start_folder` wrote.

    Raises ValueError if the file is damaged or has other pairs, OSError if it is missing.
    """
    path = folder / REFERENCE_FILE
    found = {name: finite_float32(t, f"{path}: {name}") for name, t in read_tensors(path).items()}
    expected = {split: torch.empty(number, 2, device="meta") for split, number in pairs.items()}
    check_state(expected, found, str(path))
    return found


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the values of float32 `tensors`, in the order of their names."""
    ordered = (tensors[name].contiguous() for name in sorted(tensors))
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in ordered)).hexdigest()


def git_commit() -> str | None:
    """Return the commit of this code, or None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # git is not installed
        return None


def mark_finished(metrics: MetricsLog, iteration: int) -> None:
    """Plot a run's metrics, then record that it has taken `iteration` steps and is scored."""
    metrics.plot()
    write_json(metrics.folder / FINISHED_FILE, {"iteration": iteration})


def next_steps(out_dir: str) -> list[str]:
    """Return the commands that score a run again, ask it, and show it in the page of `demo/`."""
    folder, named = Path(out_dir), shlex.quote(f"out_dir={out_dir}")
    page = "" if Path("out") in (folder, *folder.parents) else f" {named}"  # its default
    return [f"score it again:  python generate.py init_from=resume {named}",
            f"ask it yourself: python generate.py init_from=resume {named} ask=True",
            f"open the page:   python -m demo{page}"]


def is_finished(folder: Path) -> bool:
    """Return whether a run has trained its steps and holds the scores of its checkpoints.

    Its record says so; in an older run, the metrics hold its last test score.
    """
    metrics, settings = read_metrics(folder), settings_of(folder) or {}
    scored = all((folder / name / "results.json").is_file() for name in ("best", "last"))
    steps = _count(settings.get("max_iters"))
    if not (settings and metrics and scored):
        return False
    if (folder / FINISHED_FILE).is_file():
        return _count(read_json(folder / FINISHED_FILE).get("iteration")) >= steps
    return any(key.startswith("test_") and key.endswith("_last") for line in metrics
               if _count(line.get("iteration")) >= steps for key in line)


def _count(value: Any) -> int:
    """Return a number of steps from a file that somebody may have edited."""
    return value if isinstance(value, int) else 0


def reopen(folder: Path, iteration: int, evaluated: bool) -> None:
    """Continue a run at a state saved at `iteration`: it is not finished, and later lines go."""
    (folder / FINISHED_FILE).unlink(missing_ok=True)
    forget_later_metrics(folder, iteration, evaluated)
