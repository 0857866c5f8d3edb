"""Build the model of a run: LoRA adapters on a checkpoint, or all of its weights to train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from checkpoints.files import local_path
from checkpoints.peft_format import load_adapter, save_adapter
from configurator import Bounds
from lora import mark_only_lora_as_trainable
from model import MAX_RANK, Decoder, GPTConfig
from models.families import load_decoder
from models.tokenizer import Tokenizer, get_tokenizer

Qkv = Literal["split", "shared"]
# What `lora_targets` said before there were groups, and what older runs still say.
GPT2_TARGETS = {group: ",".join(names) for group, names in GPTConfig.groups.items()}


def target_names(where: str, text: str) -> str:
    """Return the names in a list of projections; GPT-2's names for a group become the group."""
    names = text.replace(",", " ").split()
    groups = {frozenset(gpt2.split(",")): group for group, gpt2 in GPT2_TARGETS.items()}
    return groups.get(frozenset(names), ",".join(names))


@dataclass(frozen=True)
class MethodConfig:
    """Settings of the model and of what is trained; the defaults are the homework's."""

    init_from: Annotated[
        str, "gpt2-mini, smollm2, gpt2, a hub id, a folder, a .gguf file, or resume", local_path
    ] = "gpt2-medium"
    lora_rank: Annotated[int, "rank of A and B; 0 is full fine-tuning", Bounds(0, MAX_RANK)] = 128
    lora_alpha: Annotated[float, "the update is scaled by alpha / rank", Bounds(0)] = 512.0
    lora_dropout: Annotated[float, "dropout on the input of A", Bounds(0, 1)] = 0.05
    lora_targets: Annotated[
        str, "qkv, attention, all, or names such as q_proj,v_proj", target_names] = "qkv"
    lora_qkv: Annotated[Qkv, "a pair each for q, k and v, or one A for the three"] = "split"
    dropout: Annotated[float, "dropout of the model itself", Bounds(0, 1)] = 0.0

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.lora_targets.replace(",", " ").split())


def build_model(
    name: str | Path, config: MethodConfig, device: torch.device, dtype: torch.dtype
) -> Decoder:
    """Load the checkpoint `name` with new adapters, ready to train on `device`.

    A Path is a local folder; a str may also be a checkpoint of the hub.

    Adapters are float32; the frozen projections they adapt are stored in the compute `dtype`.
    """
    model = load_decoder(
        name, dropout=config.dropout, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout, lora_qkv=config.lora_qkv,
        lora_targets=config.targets,
    )
    if config.lora_rank:
        mark_only_lora_as_trainable(model)
        model.store_frozen_projections(dtype)
    return model.to(device)


def save_checkpoint(
    folder: Path, config: MethodConfig, model: Decoder, tokenizer: Tokenizer
) -> None:
    """Write what `load_checkpoint` loads: the adapters in PEFT's layout, or the whole model."""
    if config.lora_rank:
        save_adapter(model, folder, config.init_from)
    else:
        save_model(folder, model, tokenizer)


def save_model(folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Write all weights, and the tokenizer unless it is GPT-2's, which no checkpoint needs."""
    model.save_pretrained(folder)
    if tokenizer is not get_tokenizer():
        tokenizer.save_pretrained(folder, model.config.block_size)


def load_checkpoint(
    folder: Path, config: MethodConfig, device: torch.device, dtype: torch.dtype
) -> Decoder:
    """Load what a run saved in `folder`: adapters on their base, or all weights."""
    if not config.lora_rank:
        return build_model(folder, config, device, dtype)
    model = build_model(config.init_from, config, device, dtype)
    load_adapter(model, folder)
    return model
