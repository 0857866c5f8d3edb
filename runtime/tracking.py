"""Experiment tracking with Weights & Biases: online, offline or off."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from checkpoints.files import read_json

KEY_FILE = Path("wandb_api.json")
WandbMode = Literal["auto", "online", "offline", "disabled"]
# What WANDB_MODE may say, with the mode that it means; and what W&B's switches take as yes.
MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "shared": "shared",
         "dryrun": "offline", "run": "online"}
TRUE = {"y", "yes", "t", "true", "on", "1"}


@dataclass(frozen=True)
class TrackingConfig:
    """Settings of the experiment tracking."""

    wandb_project: Annotated[str, "Weights & Biases project"] = "lora-homework"
    wandb_mode: Annotated[WandbMode, "auto is online where a key is given"] = "auto"


class Tracker:
    """A W&B run, or none. An exception from W&B ends the tracking, not the training."""

    def __init__(self, run: Any = None) -> None:
        self.run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._call(lambda: self.run.log(values, step=step))

    def close(self) -> None:
        self._call(lambda: self.run.finish())

    def _call(self, call: Callable[[], object]) -> None:
        if self.run is None:
            return
        try:
            call()
        except Exception as error:  # W&B may raise anything
            print(f"wandb stopped: {without_key(error)}")
            self.run = None


def start_tracking(config: TrackingConfig, folder: Path) -> Tracker:
    """Start a W&B run in `folder`; without a key it stays offline and says so."""
    try:
        mode = wandb_mode(config.wandb_mode)
        if mode == "disabled":
            return Tracker()
        set_up_environment(mode)
        import wandb  # slow to import, and many runs do not use it

        if mode == "offline":
            print(f"wandb: offline, in {folder}/wandb; to go online, set WANDB_API_KEY or write "
                  f"{{\"key\": ...}} to {KEY_FILE}")
        return Tracker(wandb.init(
            project=config.wandb_project, name=folder.name, dir=str(folder),
            config=asdict(config), mode=mode,
            settings=wandb.Settings(silent=mode != "online", init_timeout=30),
        ))
    except Exception as error:  # W&B may raise anything
        print(f"wandb: off, {without_key(error)}")
        return Tracker()


def wandb_mode(wanted: str) -> str:
    """Resolve "auto": WANDB_DISABLED, else WANDB_MODE, else online if this run is given a key.

    A login of W&B's own (in ~/.netrc) is no key given to this run: it alone sends nothing.
    Raises ValueError for an unknown WANDB_MODE or an unusable key file.
    """
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_DISABLED", "").lower() in TRUE:
        return "disabled"
    if named := os.environ.get("WANDB_MODE"):
        if named not in MODES:
            raise ValueError(f"WANDB_MODE={named!r:.80} must be one of {', '.join(MODES)}")
        return MODES[named]
    return "online" if find_key() else "offline"


def find_key() -> str | None:
    """Return the key in WANDB_API_KEY, else the one in the key file, else None."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    if not KEY_FILE.is_file():
        return None
    key = read_json(KEY_FILE).get("key")
    if not isinstance(key, str) or not key.strip():
        raise ValueError(f'{KEY_FILE} must be {{"key": "..."}}')
    return key.strip()


def set_up_environment(mode: str) -> None:
    """Set the variables that W&B reads for itself: online the key, offline not to report crashes.

    Removes a WANDB_MODE that W&B does not know, at which it would fail whatever its `mode` is.
    """
    if os.environ.get("WANDB_MODE") not in MODES:
        os.environ.pop("WANDB_MODE", None)
    if mode == "offline":
        os.environ["WANDB_ERROR_REPORTING"] = "false"
    elif key := find_key():
        os.environ["WANDB_API_KEY"] = key


def without_key(error: Exception) -> str:
    """Return an error in one line, without the key: W&B quotes one that it refuses."""
    text = " ".join(str(error).split()) or type(error).__name__
    key = os.environ.get("WANDB_API_KEY", "").strip()
    return text.replace(key, "(key)") if key else text
