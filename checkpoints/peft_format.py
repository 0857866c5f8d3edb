"""Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.files import read_json, read_tensors, write_json, write_tensors
from lora import check_state, load_lora_state_dict, lora_layers

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
PEFT_MATH = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias")


def save_adapter(model: nn.Module, folder: Path | str, base_model: str) -> None:
    """Write the adapters of `model` in PEFT's layout, and the name of their `base_model`."""
    config, tensors = peft_state_dict(model)
    write_json(Path(folder) / ADAPTER_CONFIG, config | {"base_model_name_or_path": base_model})
    write_tensors(Path(folder) / ADAPTER, tensors)


def load_adapter(model: nn.Module, folder: Path | str) -> None:
    """Load adapters in PEFT's layout. Raises ValueError if they do not fit `model`."""
    config = read_json(Path(folder) / ADAPTER_CONFIG)
    load_peft_state_dict(model, config, read_tensors(Path(folder) / ADAPTER))


def peft_state_dict(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the adapter as PEFT stores it: the fields of its `LoraConfig`, and its tensors.

    PEFT has one pair per layer. A layer with G groups of rank r becomes an equivalent adapter of
    rank G·r with a block-diagonal B; alpha grows likewise and keeps the scaling unchanged.
    Raises ValueError if `model` has no adapters.
    """
    layers, targets, tensors, ranks, alphas = lora_layers(model), set(), {}, {}, {}
    if not layers:
        raise ValueError("the model has no adapters (lora_rank=0)")
    for name, layer in layers.items():
        leaf, rank = ".".join(name.split(".")[-2:]), layer.lora_B.size(1)  # "attn.c_attn"
        targets.add(leaf)
        if layer.lora_groups > 1:
            ranks[leaf] = layer.lora_groups * rank
            root = 0.5 if layer.lora_rank_stabilized else 1
            alphas[leaf] = layer.lora_groups**root * layer.lora_alpha
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach()
        blocks = layer.lora_B.detach().chunk(layer.lora_groups)  # each (out/G, r)
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = torch.block_diag(*blocks)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "r": rank, "lora_alpha": layer.lora_alpha, "lora_dropout": layer.lora_dropout.p,
        "target_modules": sorted(targets),
        "rank_pattern": ranks, "alpha_pattern": alphas,
        "fan_in_fan_out": True, "use_rslora": layer.lora_rank_stabilized, "use_dora": False,
        "modules_to_save": None,
    }
    return config, tensors


def load_peft_state_dict(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Load what `peft_state_dict` returned, or what PEFT trained with the same settings.

    Raises ValueError, before anything is loaded, if a name, a shape or a setting that changes the
    mathematics differs from the model's, or if a grouped layer's B is not block diagonal.
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
