"""Experiment tracking with Weights & Biases: online, offline or off."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from checkpoints.files import read_json

KEY_FILE = Path("wandb_api.json")


def start_wandb(settings: Mapping[str, Any]) -> Any:
    """Start a W&B run, or return None; without a key it stays offline and says so."""
    if settings["wandb_mode"] == "disabled":
        return None
    try:
        import wandb  # slow to import, and not everybody wants it

        mode = wandb_mode(settings["wandb_mode"], lambda: wandb.api.api_key)
        if mode == "offline":
            print(f"wandb: offline, in {settings['out_dir']}/wandb; for online runs set "
                  f"WANDB_API_KEY or write {{\"key\": ...}} to {KEY_FILE}")
        return wandb.init(
            project=settings["wandb_project"], name=Path(settings["out_dir"]).name,
            dir=settings["out_dir"], config=dict(settings), mode=mode,
            settings=wandb.Settings(silent=mode != "online", init_timeout=30),
        )
    except Exception as error:  # whatever a tracking service may throw
        print(f"wandb: off, {error}")
        return None


def wandb_mode(wanted: str, logged_in: Callable[[], str | None]) -> str:
    """Resolve "auto": WANDB_MODE if set, else online where a key is found, else offline."""
    if wanted != "auto":
        return wanted
    if "WANDB_API_KEY" not in os.environ and KEY_FILE.is_file():
        key = read_json(KEY_FILE).get("key")
        if not isinstance(key, str):
            raise ValueError(f'{KEY_FILE} must be {{"key": "..."}}')
        os.environ["WANDB_API_KEY"] = key
    return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
