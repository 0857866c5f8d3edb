"""Estimate what an optimizer step holds in memory, without allocating it.

The model and its batch are fake tensors, which have shapes and no values; a step runs on them, and
the bytes that would be alive are counted. Fake tensors run what a CPU would; `fused_attend` takes
the place of what a GPU does otherwise.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import ROOT, configure
from dataloader import make_loader
from lora import mark_only_lora_as_trainable
from methods.build import store_frozen_projections
from model import GPT, IGNORE, SIZES, Decoder, GPTConfig
from runtime.attention import attend
from runtime.device import autocast
from runtime.kernels import CHUNK, cross_entropies
from runtime.kv_cache import KeyValue, SharedPrefix
from train import TrainConfig

PRESETS = ("lora_r16", "lora_r128", "lora_r196", "full_finetune")
PAIRS_PRESET = "dpo_t4"
WINDOWS = 10  # of the training whose largest batch counts
GB = 1e9
DTYPE = torch.float16  # a T4's


@dataclass(frozen=True)
class PairsConfig(TrainConfig):
    """The settings of `python -m preferences`, of which training's memory depends on one."""

    response_tokens: Annotated[int, "longest continuation"] = 32
    data: Annotated[str, "of prompts"] = ""
    reward_model: Annotated[str, "folder"] = ""
    train_prompts: Annotated[int, "beginnings"] = 0
    validation_prompts: Annotated[int, "beginnings"] = 0
    test_prompts: Annotated[int, "beginnings"] = 0
    samples: Annotated[int, "answers to a beginning"] = 0
    betas: Annotated[str, "of the frontier"] = ""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and alive, and their peak.

    It counts one sum too many where two gradients of one weight meet, such as of GPT-2's embedding:
    autograd adds them in place unless a mode like this one is active. That is at the end of the
    backward pass, when few activations are left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor that was there before, when an operation returns it."""
        self.alive.add(tensor.untyped_storage()._cdata)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


class BatchShape(NamedTuple):
    """Rows of tokens behind a shared prefix, and how many of a row are supervised."""

    rows: int
    tokens: int
    prefix: int
    supervised: int


class Estimate(NamedTuple):
    """Bytes in an optimizer step: of what stays, and the peak of what comes and goes."""

    frozen: int  # weights
    trained: int  # weights: of the adapters, or all
    gradients: int
    optimizer: int  # AdamW's two moments
    activations: int  # the peak of all that forward and backward pass make, logits too
    logits: int  # that exist at once, in float32; among the activations

    @property
    def total(self) -> int:
        return sum(self[:5])


def run_step(model: Decoder, shape: BatchShape, dtype: torch.dtype) -> None:
    """Run forward and backward pass of a batch as `train_step` does, but on any values.

    `Decoder.nats` finds the supervised positions by values, which fake tensors do not have.
    """
    rows = torch.zeros(shape.rows, shape.tokens, dtype=torch.long)  # (B, T)
    at = torch.zeros(shape.rows, shape.supervised, dtype=torch.long)  # (B, W)
    with autocast(rows.device, dtype):
        prefix = SharedPrefix(model.prefill, rows.new_zeros(1, shape.prefix))
        x, _ = model._run_blocks(rows, prefix.past, at)
    nats = cross_entropies(x.flatten(0, 1).to(model.head.dtype), model.head, at.flatten())
    nats.mean().backward()
    prefix.backward()


def fused_attend(
    q: Tensor, k: Tensor, v: Tensor, prefix: KeyValue | None, mask: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute `attend` as on a GPU: each row gets a copy of the prefix's keys and values.

    The fused kernel keeps no attention weights, not even with `dropout`, which is left out here: on
    a CPU, dropout would keep them.
    """
    if prefix is None or not q.numel():
        return attend(q, k, v, None, mask)
    (B, _, T, _), P = q.shape, prefix[0].size(2)
    if mask is None:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=q.device).tril()
    k, v = (torch.cat((first.to(own.dtype).expand(B, -1, -1, -1), own), dim=2)  # (B, H, P+T, D)
            for first, own in zip(prefix, (k, v), strict=True))
    return attend(q, k, v, None, F.pad(mask, (P, 0), value=True))


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def estimate(
    config: GPTConfig, shape: BatchShape, dtype: torch.dtype, on_gpu: bool = False
) -> Estimate:
    """Estimate a step of LoRA on a GPT-2, or of full fine-tuning if its rank is 0."""
    attention = patch("model.attend", fused_attend) if on_gpu else nullcontext()
    with FakeTensorMode(), attention:
        model = GPT(config)
        if config.lora_rank:
            mark_only_lora_as_trainable(model)
        store_frozen_projections(model, dtype)
        weights = list(model.parameters())
        trained = [weight for weight in weights if weight.requires_grad]
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        with LiveBytes() as live:
            for tensor in [*weights, *(weight.grad for weight in trained)]:
                live.ignore(tensor)
            run_step(model, shape, dtype)
    own = bytes_of(trained)
    at_once = min(shape.rows * shape.supervised, max(1, CHUNK // config.vocab_size))
    return Estimate(bytes_of(weights) - own, own, own, 2 * own, live.peak,
                    4 * at_once * config.vocab_size)


def preset_path(name: str) -> str:
    return str(ROOT / "config" / f"{name}.py")


def model_shape(config: TrainConfig) -> GPTConfig:
    return replace(
        SIZES[config.init_from], dropout=config.dropout, lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        lora_qkv=config.lora_qkv, lora_targets=config.targets)


def largest_batch(config: TrainConfig) -> BatchShape:
    """Return the shape of the batch with the most tokens in the first windows of a training."""
    loader = make_loader(config, SIZES[config.init_from])
    batches = [batch for i in range(WINDOWS)
               for batch in loader.window(i, config.window, config.batch_size)]
    most = max(batches, key=lambda batch: batch.inputs.numel())
    supervised = (most.targets != IGNORE).sum(dim=1).max()
    return BatchShape(*most.inputs.shape, most.prefix.size(1), int(supervised))


def pairs_batch(config: PairsConfig) -> BatchShape:
    """Return the shape of a batch of pairs that all fill the sequence, without a shared prefix."""
    supervised = config.response_tokens + 1  # with end-of-text
    return BatchShape(2 * config.batch_size, config.block_size - 1, 0, supervised)


def estimate_presets(dataset: str) -> dict[str, dict[str, float]]:
    """Return what a step of each homework preset holds on a T4, in GB, on reviews of `dataset`."""
    found = {}
    for name in PRESETS:
        config = replace(configure(TrainConfig, [preset_path(name)]), dataset=dataset)
        found[name] = estimate(model_shape(config), largest_batch(config), DTYPE, on_gpu=True)
    pairs = configure(PairsConfig, [preset_path(PAIRS_PRESET)])
    found[PAIRS_PRESET] = estimate(model_shape(pairs), pairs_batch(pairs), DTYPE, on_gpu=True)
    return {name: {**{part: size / GB for part, size in one._asdict().items()},
                   "total": one.total / GB} for name, one in found.items()}
