"""Useful FLOPs of an example, and the peak FLOP/s of this machine."""

import time
from typing import Any

import torch
import torch.nn.functional as F

from model import GPTConfig
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


def useful_flops(
    shape: GPTConfig, own: float, prefix: float, rank: int, verb: str, answers: float = 2
) -> float:
    """Return the matrix FLOPs that an example needs; frozen weights (rank > 0) need no gradient.

    `own` counts its tokens after the prefix, `prefix` its share of the prefix's tokens. The last
    block computes keys and values at all positions, but everything else only at the `answers`
    positions, as the output layer does. Attention's own products, about 2 %, are not counted.
    """
    C = shape.n_embd
    everywhere = (own + prefix) * (12 * (shape.n_layer - 1) + 3) * C * C
    forward = 2 * (everywhere + answers * (9 * C * C + shape.vocab_size * C))
    if verb == "score":  # each answer token but the last passes all blocks to give the next
        return forward + 2 * (answers - 1) * 12 * C * C * (shape.n_layer - 1)
    if not rank:
        return 3 * forward
    adapters = 2 * (own + prefix) * shape.n_layer * 6 * rank * C
    return 2 * forward + 3 * adapters
