"""The files of a checkpoint's results: their names, and when they are stale or must be removed."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints.files import read_json

WEIGHT_FILES = ("config.json", "model.safetensors", "adapter_config.json",
                "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json")
Stamp = Mapping[str, tuple[int, int]]


def weights_stamp(folder: Path) -> Stamp:
    """Return what changes when the weights in a checkpoint's `folder` are replaced."""
    files = [path.stat() for path in sorted(folder.glob("[!.]*.safetensors"))]
    return {str(about.st_ino): (about.st_size, about.st_mtime_ns) for about in files}


def spare_results(folder: Path, suffix: str, asked: Mapping[str, Any], own_data: str) -> str:
    """Return a longer suffix if results of another precision, data or base model have this one.

    So do answers that were drawn in other batches. `asked` describes the results to come;
    `own_data` is the digest of the run's data if they are asked, else "".
    """
    there = {"data_sha256": own_data or asked["data_sha256"]}
    with suppress(OSError, ValueError):  # no results, or damaged ones
        there |= read_json(folder / f"results{suffix}.json")
    parts = {"dtype": "", "data_sha256": "data_", "base_sha256": "base_", "batch_size": "batch",
             "processes": "processes"}
    return suffix + "".join(f"-{part}{str(asked[name])[:8]}" for name, part in parts.items()
                            if name in asked and there.get(name, asked[name]) != asked[name])


def forget_results(folder: Path) -> None:
    """Remove the scores and predictions of a checkpoint that is about to be replaced."""
    for path in [folder / "results.json", *folder.glob("results-*.json")]:
        predictions = folder / f"predictions{path.stem.removeprefix('results')}.jsonl"
        if path.name == "results.json" or predictions.is_file():  # else it is no pair of ours
            path.unlink(missing_ok=True)
            predictions.unlink(missing_ok=True)


def forget_checkpoint(folder: Path, weights: Sequence[str] = WEIGHT_FILES) -> None:
    """Remove a checkpoint with its scores; files that no run wrote stay."""
    forget_results(folder)
    for name in weights:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # it does not exist, or holds other files
        folder.rmdir()
