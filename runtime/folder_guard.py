"""Which folders a script may write to: new ones, empty ones, and those of its own runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from checkpoints.files import local_path, read_json

CONFIG_FILE = "config.json"
MARKS = ("report.md", "lengths.png", "bench.json", "tokenizer_config.json")  # of other scripts
CHECKPOINTS = ("base", "best", "last")  # the first has scores, but no weights
FINE_TUNING = "lora_rank"  # a setting that runs of train.py have, and no others


@dataclass(frozen=True)
class FolderConfig:
    """The setting that names a run's folder."""

    out_dir: Annotated[str, "folder of the run", local_path] = "out"


@dataclass(frozen=True)
class NewFolderConfig(FolderConfig):
    """Settings of a script that starts a run in a folder."""

    overwrite: Annotated[bool, "replace a run of other settings in out_dir"] = False


def refuse_foreign_folder(config: NewFolderConfig) -> None:
    """Raise ValueError unless `out_dir` is new or empty, or holds a run of the same script.

    It may also hold whole runs and what our other scripts put beside them. Hidden files are not
    looked at. The model that the run starts from must be elsewhere.
    """
    folder, base = Path(config.out_dir), Path(getattr(config, "init_from", "scratch"))
    if base.exists() and base.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"init_from={str(base)!r} is in out_dir={str(folder)!r}; choose another "
                         "out_dir")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out_dir={str(folder)!r} is a file")
    for path in (folder / name for name in (*CHECKPOINTS, "model")):
        if path.is_symlink() or settings_of(path) is not None:
            raise ValueError(f"{path} is {'a link' if path.is_symlink() else 'a run of its own'}; "
                             "choose another out_dir")
    if (settings := settings_of(folder)) is not None:
        if (FINE_TUNING in settings) != hasattr(config, FINE_TUNING):
            raise ValueError(f"out_dir={str(folder)!r} holds a run of another script; choose "
                             "another out_dir")
    elif foreign := [path.name for path in _visible(folder) if not _is_beside_runs(path)]:
        raise ValueError(f"out_dir={str(folder)!r} holds files that no run wrote "
                         f"({', '.join(foreign[:3])}); choose a new or an empty folder")


def settings_of(folder: Path) -> Mapping[str, Any] | None:
    """Return the settings of the run in `folder`, or None if there is no run."""
    try:
        run = read_json(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return None
    settings = run.get("settings")
    return settings if isinstance(settings, dict) and {"device", "dtype"} <= run.keys() else None


def _visible(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*")) if folder.is_dir() else []


def _is_beside_runs(path: Path) -> bool:
    """Return whether a file or folder may stand where runs do: a log, scores, a report, runs."""
    if not path.is_dir() or path.name in CHECKPOINTS:
        return path.name == "log.txt"
    if path.name.startswith("zero_shot-") or any((path / mark).is_file() for mark in MARKS):
        return True
    return any(settings_of(folder) is not None for folder in (path, *_visible(path)))
