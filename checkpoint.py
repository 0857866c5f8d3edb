"""Checkpoints on disk: the Hugging Face layout of GPT-2, PEFT's layout of adapters, safe writes.

Weights travel as safetensors, which hold no code. Every file appears whole or not at all.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora import check_state, load_lora_state_dict, lora_layers

ASSETS = Path(__file__).parent / "assets"
END_OF_TEXT = 50256
WEIGHTS, CONFIG = "model.safetensors", "config.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The hub's name of each field that fixes the shape, and ours.
HUB_FIELDS = {
    "n_positions": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer",
    "n_head": "n_head", "n_embd": "n_embd", "layer_norm_epsilon": "layer_norm_epsilon",
}
# Fields that change the mathematics, with the one value that we compute.
HUB_FIXED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "n_inner": None,
}
# Projections that the hub stores as Conv1D, transposed.
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
PEFT_PREFIX = "base_model.model."
PEFT_MATH = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it on success and vanishes otherwise.

    Raises OSError naming `path` where it cannot be written, as on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows syncs only what could be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder` and one level below."""
    for path in [*folder.glob(".*"), *folder.glob("*/.*")]:
        if re.fullmatch(r"\..+\.\d+\.(json|jsonl|pt|png|safetensors)", path.name):
            path.unlink()


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if the file holds anything else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with what `transformers` wants to find in its metadata."""
    with atomic_write(path) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary, {"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ValueError if it is damaged, OSError if it is not there."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged: {error}") from None


def stream_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a safetensors file, of which no more than one is held in memory.

    Raises as `read_tensors` does.
    """
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(path, "pt") as file:  # its pages stay mapped until it is closed
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged: {error}") from None


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a trainer's state: tensors, numbers and texts in nested containers."""
    with atomic_write(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(error) from None


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote; no code in the file is run.

    Raises ValueError if the file holds anything else, OSError if it is not there.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of any bytes makes torch raise nearly anything
        raise ValueError(f"{path} is damaged or not a trainer's state: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a trainer's state")
    return state


def read_hub_shape(name_or_dir: str) -> dict[str, Any]:
    """Return the fields of `model.GPTConfig` that a GPT-2 checkpoint's `config.json` fixes.

    Raises ValueError for another architecture, OSError for a file missing or out of reach.
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

    Raises as it does, and ValueError for a damaged file.
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


def save_adapter(model: nn.Module, folder: Path | str, base_model: str) -> None:
    """Write the adapters of `model` in PEFT's layout, naming the `base_model` they belong to."""
    config, tensors = peft_state_dict(model)
    write_json(Path(folder) / ADAPTER_CONFIG, config | {"base_model_name_or_path": base_model})
    write_tensors(Path(folder) / ADAPTER, tensors)


def load_adapter(model: nn.Module, folder: Path | str) -> None:
    """Load adapters in PEFT's layout. Raises ValueError where they do not fit `model`."""
    config = read_json(Path(folder) / ADAPTER_CONFIG)
    load_peft_state_dict(model, config, read_tensors(Path(folder) / ADAPTER))


def peft_state_dict(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the adapter as PEFT stores it: the fields of its `LoraConfig`, and its tensors.

    PEFT knows one pair a layer, so a layer of G groups becomes the exactly equal adapter of rank
    G·r whose B is block diagonal; its scaling stays (G·alpha) / (G·r).
    """
    layers, targets, tensors, ranks, alphas = lora_layers(model), set(), {}, {}, {}
    if not layers:
        raise ValueError("the model has no adapters (lora_rank=0)")
    for name, layer in layers.items():
        leaf, rank = ".".join(name.split(".")[-2:]), layer.lora_B.size(1)  # "attn.c_attn"
        targets.add(leaf)
        if layer.lora_groups > 1:
            ranks[leaf] = layer.lora_groups * rank
            alphas[leaf] = layer.lora_groups * layer.lora_alpha
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach()
        blocks = layer.lora_B.detach().chunk(layer.lora_groups)  # each (out/G, r)
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = torch.block_diag(*blocks)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "r": rank, "lora_alpha": layer.lora_alpha, "lora_dropout": layer.lora_dropout.p,
        "target_modules": sorted(targets),
        "rank_pattern": ranks, "alpha_pattern": alphas,
        "fan_in_fan_out": True, "use_rslora": False, "use_dora": False, "modules_to_save": None,
    }
    return config, tensors


def load_peft_state_dict(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Load what `peft_state_dict` returned, or what PEFT trained with the same settings.

    Raises ValueError, before anything is loaded, if a setting that changes the mathematics, a
    name or a shape differs from the model's, or if a grouped layer's B is not block diagonal.
    """
    expected_config, expected = peft_state_dict(model)
    for key in PEFT_MATH:
        if config.get(key, expected_config[key]) != expected_config[key]:
            raise ValueError(f"adapter has {key}={config[key]}, the model {expected_config[key]}")
    check_state(expected, tensors, "adapter")
    state = {}
    for name, layer in lora_layers(model).items():
        state[f"{name}.lora_A"] = tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"]
        state[f"{name}.lora_B"] = _diagonal_blocks(
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"], layer.lora_groups
        )
    load_lora_state_dict(model, state)


def _diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """Undo `block_diag`: (G·n, G·m) with `groups` = G blocks to (G·n, m)."""
    rows = matrix.chunk(groups)
    blocks = [row.chunk(groups, dim=1)[group] for group, row in enumerate(rows)]
    if not torch.equal(torch.block_diag(*blocks), matrix):
        raise ValueError("adapter shares one A over q, k and v; it needs lora_qkv=shared")
    return torch.cat(blocks)


def _find(name_or_dir: str, file: str) -> Path:
    """Return the path of a checkpoint's `file`, fetched from the hub unless it lies here."""
    folder = ASSETS / "gpt2-mini" if name_or_dir == "gpt2-mini" else Path(name_or_dir)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}")
        return folder / file
    try:
        cached = try_to_load_from_cache(name_or_dir, file)
        if isinstance(cached, str):
            return Path(cached)
        # Ask once, so that a hub out of reach is told at once: the download retries for 23 s.
        get_hf_file_metadata(hf_hub_url(name_or_dir, file))
        return Path(hf_hub_download(name_or_dir, file))
    except Exception as error:  # the hub's client lets its HTTP library's errors through
        reason = " ".join(str(error).split())
        raise OSError(
            f"{name_or_dir!r} is no folder here and the hub did not give its {file}: {reason}"
        ) from None


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name.endswith(CONV1D) else tensor
