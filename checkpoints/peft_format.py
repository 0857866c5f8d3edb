"""Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.files import read_fitting, read_json, write_json, write_tensors
from lora import check_state, load_lora_state_dict, lora_layers

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
# Fields of LoraConfig that change the mathematics, with PEFT's defaults.
PEFT_MATH = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {},
    "use_rslora": False, "use_dora": False, "bias": "none",
}
# Fields that add to LoRA what lora.py does not compute.
PEFT_EXTRAS = (
    "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)
# Values of init_lora_weights that leave the weights of the base as they are.
PEFT_STARTS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
PEFT_CONVERTS = ("pissa", "corda", "olora", "lora_ga")  # of the others, to plain LoRA


def save_adapter(model: nn.Module, folder: Path | str, base_model: str) -> None:
    """Write the adapters of `model` in PEFT's layout, and the name of their `base_model`."""
    config, tensors = peft_state_dict(model)
    write_json(Path(folder) / ADAPTER_CONFIG, config | {"base_model_name_or_path": base_model})
    write_tensors(Path(folder) / ADAPTER, tensors)


def load_adapter(model: nn.Module, folder: Path | str) -> None:
    """Load adapters in PEFT's layout. Raises ValueError if they do not fit `model`."""
    config = read_json(Path(folder) / ADAPTER_CONFIG)
    expected_config, expected = peft_state_dict(model)
    _check_config(config, expected_config)
    tensors = read_fitting(Path(folder) / ADAPTER, expected, "adapter")
    load_peft_state_dict(model, config, tensors)


def peft_state_dict(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the adapter as PEFT stores it: the fields of its `LoraConfig`, and its tensors.

    PEFT has one pair per layer. A layer with G groups of rank r becomes an equivalent adapter of
    rank G·r with a block-diagonal B; alpha grows likewise and keeps the scaling unchanged.
    Raises ValueError if `model` has no adapters, or of different ranks or scalings.
    """
    layers, targets, tensors, ranks, alphas = lora_layers(model), set(), {}, {}, {}
    if not layers:
        raise ValueError("the model has no adapters (lora_rank=0)")
    if len({(layer.lora_B.size(1), layer.lora_scaling) for layer in layers.values()}) > 1:
        raise ValueError("the adapters of the model differ in rank or alpha")
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
        "fan_in_fan_out": getattr(model, "fan_in_fan_out", False),
        "use_rslora": layer.lora_rank_stabilized, "use_dora": False, "modules_to_save": None,
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
    _check_config(config, expected_config)
    check_state(expected, tensors, "adapter")
    state = {}
    for name, layer in lora_layers(model).items():
        state[f"{name}.lora_A"] = tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"]
        state[f"{name}.lora_B"] = _diagonal_blocks(
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"], layer.lora_groups
        )
    load_lora_state_dict(model, state)


def _check_config(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError if an adapter's `config` asks for other mathematics than `expected`."""
    for key, default in PEFT_MATH.items():
        found = default if config.get(key) is None else config[key]
        if found != expected[key]:
            raise ValueError(f"adapter has {key}={found!s:.80}, the model {expected[key]}")
    for key in PEFT_EXTRAS:
        if config.get(key):
            raise ValueError(
                f"adapter has {key}={config[key]!r:.80}, which plain LoRA does not compute")
    start = str(config.get("init_lora_weights")).lower()
    if start not in PEFT_STARTS:
        advice = ("; PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) "
                  "saves it as plain LoRA") if start.startswith(PEFT_CONVERTS) else ""
        raise ValueError(f"adapter has init_lora_weights={start:.80}, with which PEFT changes the "
                         f"weights of the base{advice}")


def _diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """Undo `block_diag`: (G·n, G·m) with `groups` = G blocks to (G·n, m)."""
    rows = matrix.chunk(groups)
    blocks = [row.chunk(groups, dim=1)[group] for group, row in enumerate(rows)]
    if not torch.equal(torch.block_diag(*blocks), matrix):
        raise ValueError("adapter shares one A over q, k and v; it needs lora_qkv=shared")
    return torch.cat(blocks)
