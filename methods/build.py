"""Build the model of a run: LoRA adapters on a checkpoint, or all of its weights to train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from checkpoints.files import local_path
from checkpoints.peft_format import load_adapter
from configurator import Bounds
from lora import mark_only_lora_as_trainable
from model import GPT, MAX_RANK

Qkv = Literal["split", "shared"]


@dataclass(frozen=True)
class MethodConfig:
    """Settings of the model and of what is trained; the defaults are the homework's."""

    init_from: Annotated[
        str, "gpt2-mini, gpt2, a hub id, a folder, or resume", local_path] = "gpt2-medium"
    lora_rank: Annotated[int, "rank of A and B; 0 is full fine-tuning", Bounds(0, MAX_RANK)] = 128
    lora_alpha: Annotated[float, "the update is scaled by alpha / rank", Bounds(0)] = 512.0
    lora_dropout: Annotated[float, "dropout on the input of A", Bounds(0, 1)] = 0.05
    lora_targets: Annotated[str, "c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"] = "c_attn"
    lora_qkv: Annotated[Qkv, "a pair each for q, k and v, or one A for the three"] = "split"
    dropout: Annotated[float, "dropout of GPT-2 itself", Bounds(0, 1)] = 0.0


def build_model(
    name: str | Path, config: MethodConfig, device: torch.device, dtype: torch.dtype
) -> GPT:
    """Load the checkpoint `name` with new adapters, ready to train on `device`.

    A Path is a local folder; a str may also be a checkpoint of the hub.

    Adapters are float32; the frozen projections they adapt are stored in the compute `dtype`.
    """
    model = GPT.from_pretrained(
        name, dropout=config.dropout, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout, lora_qkv=config.lora_qkv,
        lora_targets=tuple(config.lora_targets.replace(",", " ").split()),
    )
    if config.lora_rank:
        mark_only_lora_as_trainable(model)
        model.store_frozen_projections(dtype)
    return model.to(device)


def load_checkpoint(
    folder: Path, config: MethodConfig, device: torch.device, dtype: torch.dtype
) -> GPT:
    """Load what a run saved in `folder`: adapters on their base, or all weights."""
    if not config.lora_rank:
        return build_model(folder, config, device, dtype)
    model = build_model(config.init_from, config, device, dtype)
    load_adapter(model, folder)
    return model
