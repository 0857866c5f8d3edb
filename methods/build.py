"""Build the model of a run: a checkpoint, and on it what the run's method adds and trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from checkpoints.files import local_path
from checkpoints.peft_format import load_adapter, save_adapter
from checkpoints.trained_format import load_trained, save_trained
from configurator import Bounds
from lora import LoRALinear, adapters_off, mark_only_lora_as_trainable
from methods.bitfit import train_biases
from methods.bottleneck import add_bottlenecks
from methods.prefix_tuning import add_prefix, load_prefix, save_prefix
from model import MAX_RANK, Decoder, GPTConfig
from models.families import load_decoder
from models.tokenizer import Tokenizer, get_tokenizer
from runtime.device import autocast

MethodName = Literal["lora", "full", "bitfit", "bottleneck", "prefix"]
Qkv = Literal["split", "shared"]
Scaling = Literal["standard", "rank_stabilized"]
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
    method: Annotated[MethodName, "what is trained"] = "lora"
    lora_rank: Annotated[int, "rank of A and B; 0 is full fine-tuning", Bounds(0, MAX_RANK)] = 128
    lora_alpha: Annotated[float, "the update is scaled by alpha / rank", Bounds(0)] = 512.0
    lora_dropout: Annotated[float, "dropout on the input of A", Bounds(0, 1)] = 0.05
    lora_targets: Annotated[
        str, "qkv, attention, all, or names such as q_proj,v_proj", target_names] = "qkv"
    lora_qkv: Annotated[Qkv, "a pair each for q, k and v, or one A for the three"] = "split"
    lora_scaling: Annotated[Scaling, "alpha / rank, or alpha / sqrt(rank)"] = "standard"
    lora_plus_ratio: Annotated[float, "rate of B over that of A (LoRA+)", Bounds(0)] = 1.0
    bottleneck_size: Annotated[int, "width of the bottlenecks", Bounds(1, MAX_RANK)] = 64
    bottleneck_norms: Annotated[bool, "train the norms beside the bottlenecks"] = False
    prefix_tokens: Annotated[int, "positions of the learned prefix", Bounds(1)] = 10
    prefix_projection: Annotated[
        int, "features of the network that computes the prefix in training; 0 is none", Bounds(0)
    ] = 0
    dropout: Annotated[float, "dropout of the model itself", Bounds(0, 1)] = 0.0
    gradient_checkpointing: Annotated[
        bool, "keep each block's input alone, and compute the rest again: less memory, more time"
    ] = False

    @property
    def trained(self) -> MethodName:
        """The method; the homework's word for full fine-tuning is lora_rank=0."""
        return "full" if self.method == "lora" and not self.lora_rank else self.method

    @property
    def keeps_base(self) -> bool:
        """Whether a checkpoint holds only what stands beside its base model, or all weights."""
        return self.trained != "full"

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.lora_targets.replace(",", " ").split())


def build_model(
    name: str | Path, config: MethodConfig, device: torch.device, dtype: torch.dtype
) -> Decoder:
    """Load the checkpoint `name` with what the method adds, ready to train on `device`.

    A Path is a local folder; a str may also be a checkpoint of the hub. What is trained is float32;
    the frozen projections are stored in the compute `dtype`.

    Raises ValueError for a method that the model's family cannot have.
    """
    def store(model: Decoder) -> None:
        store_frozen_projections(model.requires_grad_(not config.keeps_base), dtype)

    model = load_base(name, config, store)
    match config.trained:
        case "lora":
            mark_only_lora_as_trainable(model)
        case "bitfit":
            train_biases(model)
        case "bottleneck":
            add_bottlenecks(model, config.bottleneck_size, config.bottleneck_norms)
        case "prefix":
            with autocast(model.device, dtype):  # frozen projections compute the start
                add_prefix(model, config.prefix_tokens, config.prefix_projection)
    if config.gradient_checkpointing:
        checkpoint_gradients(model)
    return model.to(device)


def load_base(
    name: str | Path, config: MethodConfig, prepare: Callable[[Decoder], Any] = lambda _: None
) -> Decoder:
    """Load the checkpoint `name`, with new adapters if the method is LoRA."""
    rank = config.lora_rank if config.trained == "lora" else 0
    return load_decoder(
        name, prepare, dropout=config.dropout, lora_rank=rank, lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout, lora_qkv=config.lora_qkv, lora_targets=config.targets,
        lora_rank_stabilized=config.lora_scaling == "rank_stabilized",
    )


@contextmanager
def reference_model(
    model: Decoder, config: MethodConfig, device: torch.device
) -> Iterator[Decoder]:
    """Yield the base of `model` before any training: with LoRA the model itself, adapters off."""
    if config.trained == "lora":
        with adapters_off(model):
            yield model
    else:
        yield load_decoder(config.init_from).to(device)


def store_frozen_projections(model: Decoder, dtype: torch.dtype) -> None:
    """Store frozen projections in the compute `dtype`, instead of converting them at every use."""
    for module in model.modules():
        if isinstance(module, LoRALinear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)


def checkpoint_gradients(model: Decoder) -> None:
    """Let the backward pass compute each block again (Chen et al. 2016, arXiv:1604.06174)."""
    def once_more(forward: Callable[..., Any], *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False)

    for block in model.blocks:
        block.forward = partial(once_more, block.forward)


def save_checkpoint(
    folder: Path, config: MethodConfig, model: Decoder, tokenizer: Tokenizer
) -> None:
    """Write what `load_checkpoint` loads: what stands beside the base, or the whole model.

    LoRA's adapters and learned prefixes have PEFT's layout.
    """
    match config.trained:
        case "lora":
            save_adapter(model, folder, config.init_from)
        case "prefix":
            save_prefix(model, folder, config.init_from)
        case "full":
            save_model(folder, model, tokenizer)
        case method:
            save_trained(model, folder, {
                "method": method, "base_model_name_or_path": config.init_from})


def save_model(folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Write all weights, and the tokenizer unless it is GPT-2's, which no checkpoint needs."""
    model.save_pretrained(folder)
    if tokenizer is not get_tokenizer():
        tokenizer.save_pretrained(folder, model.config.block_size)


def load_checkpoint(
    folder: Path, config: MethodConfig, device: torch.device, dtype: torch.dtype
) -> Decoder:
    """Load what a run saved in `folder`; raise ValueError if it is another method's."""
    if not config.keeps_base:
        return build_model(folder, config, device, dtype)
    model = build_model(config.init_from, config, device, dtype)
    match config.trained:
        case "lora":
            load_adapter(model, folder)
        case "prefix":
            load_prefix(model, folder)
        case method:
            load_trained(model, folder, method)
    return model
