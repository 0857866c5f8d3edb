"""Useful FLOPs of an example, and the peak FLOP/s of this machine."""

import time
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lora import LoRALinear
from model import DecoderConfig
from models.families import FAMILIES
from runtime import kernels

MATRIX = (1024, 768, 3072)  # a product of GPT-2's size, which measures the machine's peak


def matrix_peak(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return the peak FLOP/s of a matrix product of GPT-2's size.

    "plain" is that of `F.linear`, "best" that of the faster of `F.linear` and `kernels.linear`.
    """
    rows, inner, columns = (size * (1 if device.type == "cpu" else 4) for size in MATRIX)
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    seconds: dict[Any, list[float]] = {F.linear: [], kernels.linear: []}
    for _ in range(10):
        for product, times in seconds.items():
            started = time.perf_counter()
            product(x, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    flops = {product: 2 * rows * inner * columns / min(times) for product, times in seconds.items()}
    return {"plain": flops[F.linear], "best": max(flops.values())}


class Weights(NamedTuple):
    """How many weights one block has in the projections to q, k and v, and in the others."""

    qkv: int
    others: int

    def products(self, n_layer: int, everywhere: float, answers: float) -> float:
        """Return the multiplications of all blocks, the last one short."""
        blocks = (self.qkv + self.others) * (n_layer - 1)
        return everywhere * (blocks + self.qkv) + answers * self.others


@cache
def count_weights(shape: DecoderConfig, rank: int) -> tuple[Weights, Weights, int]:
    """Count the weights of a block's matrices, of the adapters on them, and of the head."""
    family = next(family for family in FAMILIES if family.config_class is type(shape))
    with torch.device("meta"):
        model = family(replace(shape, n_layer=1, lora_rank=rank))
    matrices, adapters = [0, 0], [0, 0]
    for name, layer in model.blocks[0].named_modules():
        if isinstance(layer, LoRALinear):
            other = name.rpartition(".")[2] not in shape.groups["qkv"]
            matrices[other] += layer.weight.numel()
            if layer.is_lora():
                adapters[other] += layer.lora_A.numel() + layer.lora_B.numel()
    return Weights(*matrices), Weights(*adapters), model.head.numel()


def useful_flops(
    shape: DecoderConfig, own: float, prefix: float, rank: int, verb: str, answers: float = 2
) -> float:
    """Return the matrix FLOPs that an example needs; frozen weights (rank > 0) need no gradient.

    `own` counts its tokens after the prefix, `prefix` its share of the prefix's tokens. The
    adapters have `rank`, and the targets of `shape`. The last block computes q, k and v at all
    positions, but everything else only at the `answers` positions, as the output layer does.
    Attention's own products, about 2 %, are not counted.
    """
    matrices, adapters, head = count_weights(shape, rank)
    forward = 2 * (matrices.products(shape.n_layer, own + prefix, answers) + answers * head)
    if verb == "score":  # each answer token but the last passes all blocks to give the next
        return forward + 2 * (answers - 1) * sum(matrices) * (shape.n_layer - 1)
    if not rank:
        return 3 * forward
    return 2 * forward + 6 * adapters.products(shape.n_layer, own + prefix, answers)
