"""GPT-2 checkpoints in the Hugging Face layout: `config.json` and `model.safetensors`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from torch import Tensor

from checkpoints.files import read_json, stream_tensors, write_json, write_tensors
from configurator import ROOT

END_OF_TEXT = 50256
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Fields that fix the shape: their names on the hub and in GPTConfig.
HUB_FIELDS = {
    "n_positions": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer",
    "n_head": "n_head", "n_embd": "n_embd", "layer_norm_epsilon": "layer_norm_epsilon",
}
# Fields that change the mathematics, with the only value that model.py supports.
HUB_FIXED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "n_inner": None,
}
# Projections that the hub stores as Conv1D, transposed.
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def read_hub_shape(name_or_dir: str) -> dict[str, Any]:
    """Return the fields of `model.GPTConfig` that a GPT-2 checkpoint's `config.json` fixes.

    Raises ValueError for another architecture, OSError if the file is missing or unreachable.
    """
    hub = read_json(_find(name_or_dir, CONFIG))
    for field, allowed in HUB_FIXED.items():
        if hub.get(field, allowed) != allowed:
            raise ValueError(f"{name_or_dir}: {field}={hub[field]!r}, but GPT-2 has {allowed!r}")
    for field in HUB_FIELDS:
        if not isinstance(hub.get(field), int | float) or hub[field] <= 0:
            raise ValueError(f"{name_or_dir}: {CONFIG} needs a positive number as {field}")
    return {ours: hub[field] for field, ours in HUB_FIELDS.items()}


def read_hub_layout(name_or_dir: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the shape, as `read_hub_shape` does, and the float32 weights of a GPT-2 checkpoint.

    Raises the same errors, and ValueError for a damaged file.
    """
    shape = read_hub_shape(name_or_dir)
    weights = {}
    for name, tensor in stream_tensors(_find(name_or_dir, WEIGHTS)):
        name = "transformer." + name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            weights[name] = _transposed(name, tensor).float().clone(
                memory_format=torch.contiguous_format)
    return shape, weights


def write_hub_layout(
    folder: Path | str, shape: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write `config.json` and `model.safetensors` so that `transformers` loads the folder."""
    config = {field: shape[ours] for field, ours in HUB_FIELDS.items()} | HUB_FIXED
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), shape["dropout"])
    config |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": END_OF_TEXT}
    write_json(Path(folder) / CONFIG, config | {"eos_token_id": END_OF_TEXT})
    tensors = {name: _transposed(name, tensor) for name, tensor in weights.items()}
    write_tensors(Path(folder) / WEIGHTS, tensors)


def _find(name_or_dir: str, file: str) -> Path:
    """Return the path of a checkpoint's `file` in a local folder or in the hub's cache."""
    folder = ROOT / "assets" / "gpt2-mini" if name_or_dir == "gpt2-mini" else Path(name_or_dir)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}")
        return folder / file
    try:
        cached = try_to_load_from_cache(name_or_dir, file)
        if isinstance(cached, str):
            return Path(cached)
        # Ask once first: if the hub is out of reach, the download would retry for 23 s.
        get_hf_file_metadata(hf_hub_url(name_or_dir, file))
        return Path(hf_hub_download(name_or_dir, file))
    except Exception as error:  # the hub's client does not wrap its HTTP library's errors
        reason = " ".join(str(error).split())
        raise OSError(
            f"{name_or_dir!r} is no folder here and the hub did not give its {file}: {reason}"
        ) from None


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name.endswith(CONV1D) else tensor
