"""Trained parameters by their own names, with what says how they were made.

For methods that PEFT does not have: `adapter_config.json` names the method and the base model,
`adapter_model.safetensors` holds the parameters that were trained.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from checkpoints.files import read_fitting, read_json, write_json, write_tensors
from checkpoints.peft_format import ADAPTER, ADAPTER_CONFIG


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of `model` that are trained, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_trained(model: nn.Module, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the trained parameters of `model`, and `about`: the method and the base model."""
    write_json(folder / ADAPTER_CONFIG, about)
    write_tensors(folder / ADAPTER, trained_state(model))


def load_trained(model: nn.Module, folder: Path, method: str) -> None:
    """Load what `save_trained` wrote into the parameters of `model` that `method` trains.

    Raises ValueError, before anything is loaded, for another method's folder, or for missing,
    unexpected, misshapen or infinite parameters.
    """
    found = read_json(folder / ADAPTER_CONFIG)
    kind = found.get("method", found.get("peft_type"))
    if kind != method:
        raise ValueError(f"{folder} holds the weights of {kind!s:.80}, not of method={method}")
    tensors = read_fitting(folder / ADAPTER, trained_state(model), f"method={method}")
    model.load_state_dict(tensors, strict=False)
