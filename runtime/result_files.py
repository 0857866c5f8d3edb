"""The files of a checkpoint's results: their names, and when they are stale or must be removed."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints.files import anchored, atomic_write, read_json, slug

WEIGHT_FILES = ("config.json", "model.safetensors", "adapter_config.json",
                "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json")
Stamp = Mapping[str, tuple[int, int]]


def weights_stamp(folder: Path) -> Stamp:
    """Return what changes when the weights in a checkpoint's `folder` are replaced."""
    files = [path.stat() for path in sorted(folder.glob("[!.]*.safetensors"))]
    return {str(about.st_ino): (about.st_size, about.st_mtime_ns) for about in files}


def results_suffix(asked: Mapping[str, Any], own: Mapping[str, Any], task: str) -> str:
    """Name what differs from the run's `own` question, so that no result overwrites another.

    Both hold the fields of a `Question` with the tokens of their longest answer; `task` is the
    run's.
    """
    sampled = asked["temperature"] > 0 and asked["top_k"] != 1
    shown = "shots{shots}_seed{shots_seed}_order{shots_order}".format(**asked)
    degree = str(asked["temperature"]).removesuffix(".0")
    drawn = f"temperature{degree}_top{asked['top_k']}_seed{asked['sampling_seed']}"

    def differs(name: str) -> bool:
        return asked[name] != own[name]

    names = {
        asked["split"]: asked["split"] != "test",
        f"task_{asked['task']}": asked["task"] != task,
        f"dataset_{slug(asked['dataset'])}": anchored(asked["dataset"]) != anchored(own["dataset"]),
        f"prompt_{slug(asked['prompt'])}": differs("prompt"),
        shown: asked["shots"] > 0,
        "calibrated": asked["calibrate"],
        f"block{asked['block_size']}": differs("block_size"),
        f"limit{asked['limit']}": differs("limit"),
        f"tokens{asked['max_new_tokens']}": differs("max_new_tokens"),
        drawn: sampled,
        asked["dtype"]: differs("dtype"),
    }
    return "".join(f"-{name}" for name, different in names.items() if different)


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


def copy_results(source: Path, folder: Path) -> None:
    """Copy the scores and predictions of one checkpoint to another with the same weights."""
    for name in ("predictions.jsonl", "results.json"):
        with atomic_write(folder / name) as path:
            shutil.copyfile(source / name, path)


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
