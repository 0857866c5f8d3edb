"""GPT-2 checkpoints in the Hugging Face layout: `config.json` and `model.safetensors`."""

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import EntryNotFoundError, HFValidationError, validate_repo_id
from torch import Tensor

from checkpoints.files import (
    finite_float32,
    read_json,
    stream_tensors,
    tensor_names,
    write_json,
    write_tensors,
)
from configurator import ROOT

END_OF_TEXT = 50256
WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"
# Fields that fix the shape: their names on the hub and in GPTConfig.
HUB_FIELDS = {
    "n_positions": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer",
    "n_head": "n_head", "n_embd": "n_embd", "layer_norm_epsilon": "layer_norm_epsilon",
}
LARGEST = 10**6  # no real model has more tokens, layers or features
# Fields that change the mathematics, with the only value that model.py supports.
HUB_FIXED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# Projections that the hub stores as Conv1D, transposed.
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # older files store the causal mask
HEAD, TOKENS = "lm_head.weight", "transformer.wte.weight"


def read_hub_shape(name_or_dir: str | Path) -> dict[str, Any]:
    """Return the fields of `model.GPTConfig` that a GPT-2 checkpoint's `config.json` fixes.

    A Path is a local folder; a str may also name `gpt2-mini` or a checkpoint of the hub.
    Raises ValueError for another architecture, OSError if the file is missing or unreachable.
    """
    hub = read_json(find_file(name_or_dir, CONFIG))
    for field, allowed in HUB_FIXED.items():
        if hub.get(field, allowed) != allowed:
            raise ValueError(
                f"{name_or_dir}: {field}={hub[field]!r:.80}, but GPT-2 has {allowed!r}")
    for field in HUB_FIELDS:
        value = hub.get(field)
        if field == "layer_norm_epsilon":
            fits, needed = type(value) is float and 0 < value < 1, "a number between 0 and 1"
        else:
            fits = type(value) is int and 1 <= value <= LARGEST
            needed = f"a whole number from 1 to {LARGEST:,}"
        if not fits:
            raise ValueError(
                f"{name_or_dir}: {CONFIG} needs {needed} as {field}, not {value!r:.80}")
    if hub.get("n_inner") not in (None, 4 * hub["n_embd"]):
        raise ValueError(f"{name_or_dir}: n_inner={hub['n_inner']!r:.80}, but GPT-2 has 4 n_embd")
    return {ours: hub[field] for field, ours in HUB_FIELDS.items()}


def read_hub_layout(name_or_dir: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the shape, as `read_hub_shape` does, and the float32 weights of a GPT-2 checkpoint.

    Raises the same errors, and ValueError for a damaged file, for another number of layers than
    the shape has, and for weights that are not finite floating-point numbers.
    """
    shape, files = read_hub_shape(name_or_dir), find_weights(name_or_dir)
    _check_layers(str(name_or_dir), shape["n_layer"], files)
    weights: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in stream_tensors(path):
            if name.endswith(MASKS):
                continue
            tensor = _transposed(name, finite_float32(tensor, f"{path}: {name}"))
            name = name if name == HEAD else "transformer." + name.removeprefix("transformer.")
            if name in weights:
                raise ValueError(f"{path}: {name} is there twice")
            weights[name] = tensor.clone(memory_format=torch.contiguous_format)
    head = weights.pop(HEAD, None)
    if head is not None and not torch.equal(head, weights.get(TOKENS, head)):
        raise ValueError(f"{name_or_dir}: {HEAD} differs from {TOKENS}, but GPT-2 ties them")
    return shape, weights


def checkpoint_digest(name_or_dir: str | Path) -> str:
    """Return the SHA-256 of a checkpoint's shape and of its weight files, in hexadecimal.

    Raises as `find_weights` does. Files that have not changed are read once per process.
    """
    stats = [(path, path.stat()) for path in find_weights(name_or_dir)]
    return _digest(str(read_hub_shape(name_or_dir)), tuple(
        (path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@cache
def _digest(shape: str, files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256(shape.encode())
    for path, *_ in files:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def write_hub_layout(
    folder: Path | str, shape: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write `config.json` and `model.safetensors` so that `transformers` loads the folder."""
    config = {field: shape[ours] for field, ours in HUB_FIELDS.items()} | HUB_FIXED
    config |= {"n_inner": None}
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), shape["dropout"])
    config |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": END_OF_TEXT}
    write_json(Path(folder) / CONFIG, config | {"eos_token_id": END_OF_TEXT})
    tensors = {name: _transposed(name, tensor) for name, tensor in weights.items()}
    write_tensors(Path(folder) / WEIGHTS, tensors)


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
    """Return the safetensors files of a checkpoint: one, or the shards that its index names.

    Raises as `find_file` does, and ValueError if the index names files outside the checkpoint.
    """
    try:
        path = find_file(name_or_dir, WEIGHTS, INDEX)
    except FileNotFoundError as error:
        if not _has_pickle(name_or_dir):
            raise
        raise FileNotFoundError(
            f"{error}, only {PICKLE}; transformers converts it: AutoModelForCausalLM"
            f".from_pretrained({str(name_or_dir)!r}).save_pretrained('NEW_FOLDER')") from None
    if path.name == WEIGHTS:
        return [path]
    shards = read_json(path).get("weight_map")
    shards = [*shards.values()] if isinstance(shards, dict) else []
    if not shards or not all(re.fullmatch(r"\w[\w.-]*\.safetensors", str(s)) for s in shards):
        raise ValueError(f"{path}: weight_map must give each tensor a safetensors file beside it")
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


def _has_pickle(name_or_dir: str | Path) -> bool:
    """Return whether a checkpoint without safetensors files has pickled weights."""
    folder = _local_folder(name_or_dir)
    if folder is not None:
        return any(folder.glob(f"{PICKLE}*"))  # or the index of its shards
    try:
        return bool(get_hf_file_metadata(hf_hub_url(str(name_or_dir), PICKLE)))
    except Exception:  # as in `_download`, whose error already says why there are no weights
        return False


def _check_layers(name: str, n_layer: int, files: list[Path]) -> None:
    """Compare the layers in the headers of `files` before a model of `n_layer` layers is built."""
    names = [tensor for path in files for tensor in tensor_names(path)]
    layers = {found[1] for found in map(re.compile(r"(?:transformer\.)?h\.(\d+)\.").match, names)
              if found}
    if len(layers) != n_layer:
        raise ValueError(f"{name}: n_layer={n_layer}, but the weights have {len(layers)} layers")


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name.endswith(CONV1D) and tensor.ndim == 2 else tensor
