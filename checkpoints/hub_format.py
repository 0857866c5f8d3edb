"""Where the files of a checkpoint are: in a folder, in the hub's cache or on the hub."""

import re
from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import EntryNotFoundError, HFValidationError, validate_repo_id

from checkpoints.files import read_json
from configurator import ROOT

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"  # of older checkpoints


def find_file(name_or_dir: str | Path, *files: str) -> Path:
    """Return the path of the first of `files` that a checkpoint has, here or on the hub.

    Raises FileNotFoundError if it has none of them, OSError if the hub is out of reach.
    """
    folder = _local_folder(name_or_dir)
    if folder is None:
        return _find_on_hub(str(name_or_dir), files)
    for file in files:
        if (folder / file).is_file():
            return folder / file
    if folder.is_dir():
        raise FileNotFoundError(f"{folder} has no {files[0]}")
    raise FileNotFoundError(f"there is no folder {folder}")


def find_weights(name_or_dir: str | Path) -> list[Path]:
    """Return the weight files of a checkpoint: one, or the shards that its index names.

    Safetensors come before the pickled files of older checkpoints.
    Raises as `find_file` does, and ValueError if the index names files outside the checkpoint.
    """
    path = find_file(name_or_dir, WEIGHTS, INDEX, PICKLE, PICKLE_INDEX)
    if path.suffix != ".json":
        return [path]
    suffix = "safetensors" if path.name == INDEX else "bin"
    shards = read_json(path).get("weight_map")
    shards = [*shards.values()] if isinstance(shards, dict) else []
    if not shards or not all(re.fullmatch(rf"\w[\w.-]*\.{suffix}", str(s)) for s in shards):
        raise ValueError(f"{path}: weight_map must give each tensor a .{suffix} file beside it")
    return [find_file(name_or_dir, shard) for shard in sorted(set(shards))]


def _local_folder(name_or_dir: str | Path) -> Path | None:
    """Return the folder that `name_or_dir` is or should be; None if only the hub can have it."""
    if name_or_dir == "gpt2-mini":
        return ROOT / "assets" / "gpt2-mini"
    try:
        validate_repo_id(name_or_dir)
    except HFValidationError:  # a Path, "./folder", "a/b/c"
        return Path(name_or_dir)
    path = Path(name_or_dir)
    # "out/run" is meant to be local if there is a folder "out", which is no organisation's name.
    return path if path.exists() or ("/" in str(name_or_dir) and path.parent.is_dir()) else None


def _find_on_hub(name: str, files: tuple[str, ...]) -> Path:
    cached = [try_to_load_from_cache(name, file) for file in files]
    if paths := [path for path in cached if isinstance(path, str)]:
        return Path(paths[0])
    first = None
    for file in files:
        try:
            return _download(name, file)
        except FileNotFoundError as error:
            first = first or error
    raise first


def _download(name: str, file: str) -> Path:
    try:
        # Ask once first: if the hub is out of reach, the download would retry for 23 s.
        get_hf_file_metadata(hf_hub_url(name, file))
        return Path(hf_hub_download(name, file))
    except Exception as error:  # the hub's client does not wrap its HTTP library's errors
        kind = FileNotFoundError if isinstance(error, EntryNotFoundError) else OSError
        reason = re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()))  # no password
        raise kind(
            f"{name!r} is no folder here and the hub did not give its {file}: {reason}"
        ) from None
