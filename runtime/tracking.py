"""Experiment tracking with Weights & Biases: online, offline or off."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from checkpoints.files import read_json

KEY_FILE = Path("wandb_api.json")
WandbMode = Literal["auto", "online", "offline", "disabled"]


@dataclass(frozen=True)
class TrackingConfig:
    """Settings of the experiment tracking."""

    wandb_project: Annotated[str, "Weights & Biases project"] = "lora-homework"
    wandb_mode: Annotated[WandbMode, "auto is online where a key is found"] = "auto"


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
            print(f"wandb stopped: {error}")
            self.run = None


def start_tracking(config: TrackingConfig, folder: Path) -> Tracker:
    """Start a W&B run in `folder`; without a key it stays offline and says so."""
    if config.wandb_mode == "disabled":
        return Tracker()
    try:
        import wandb  # slow to import, and many runs do not use it

        mode = wandb_mode(config.wandb_mode, lambda: wandb.api.api_key)
        if mode == "offline":
            print(f"wandb: offline, in {folder}/wandb; to go online, set WANDB_API_KEY or write "
                  f"{{\"key\": ...}} to {KEY_FILE}")
        return Tracker(wandb.init(
            project=config.wandb_project, name=folder.name, dir=str(folder),
            config=asdict(config), mode=mode,
            settings=wandb.Settings(silent=mode != "online", init_timeout=30),
        ))
    except Exception as error:  # W&B may raise anything
        print(f"wandb: off, {error}")
        return Tracker()


def wandb_mode(wanted: str, logged_in: Callable[[], str | None]) -> str:
    """Resolve "auto": WANDB_MODE if it is set, else online if a key is found, else offline."""
    if wanted != "auto":
        return wanted
    if "WANDB_API_KEY" not in os.environ and KEY_FILE.is_file():
        key = read_json(KEY_FILE).get("key")
        if not isinstance(key, str):
            raise ValueError(f'{KEY_FILE} must be {{"key": "..."}}')
        os.environ["WANDB_API_KEY"] = key
    return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
