"""A model ready to train: a checkpoint with fresh adapters, or with all its weights trainable."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints.peft_format import load_adapter
from lora import mark_only_lora_as_trainable
from model import GPT


def build_model(
    name: str, settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> GPT:
    """Load the checkpoint `name` with fresh adapters as `settings` say, ready to train on `device`.

    Adapters are float32; the frozen projections they adapt are stored in the compute `dtype`.
    """
    lora = {key: settings[key] for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_qkv")}
    targets = tuple(settings["lora_targets"].replace(",", " ").split())
    model = GPT.from_pretrained(name, dropout=settings["dropout"], lora_targets=targets, **lora)
    if settings["lora_rank"]:
        mark_only_lora_as_trainable(model)
        model.store_frozen_projections(dtype)
    return model.to(device)


def load_checkpoint(
    folder: Path, settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> GPT:
    """Load what a run with `settings` saved in `folder`: adapters on their base, or all weights."""
    if not settings["lora_rank"]:
        return build_model(str(folder), settings, device, dtype)
    model = build_model(settings["init_from"], settings, device, dtype)
    load_adapter(model, folder)
    return model
