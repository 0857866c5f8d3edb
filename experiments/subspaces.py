"""What LoRA learned: the update ΔW = scaling · B A of each projection and its subspaces.

The quantities of sections 7.2 and 7.3 of the paper (Hu et al. 2021, arXiv:2106.09685).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora import LoRALinear, lora_layers

FUSED = {"c_attn": ("q", "k", "v")}  # projections that hold several, below each other


class Update(NamedTuple):
    """The update of one projection: views of its A (r, in), B (out, r) and W0 (out, in)."""

    layer: str  # "transformer.h.0.attn.c_attn"
    part: str  # "q"
    A: Tensor
    B: Tensor
    shared: bool  # with the other parts of its layer
    scaling: float
    weight: Tensor

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (out, r), the singular values (r,) and V' (r, in) of ΔW, without building it."""
        (left, upper), (right, lower) = torch.linalg.qr(self.B), torch.linalg.qr(self.A.T)
        U, S, Vh = torch.linalg.svd(self.scaling * upper @ lower.T, full_matrices=False)
        return left @ U, S, Vh @ right.T


def updates(model: nn.Module) -> Iterator[Update]:
    """Yield the updates of an unmerged `model`, q, k and v apart."""
    for name, layer in lora_layers(model).items():
        *_, block, leaf = name.split(".")
        short = f"{block}.{leaf}" if leaf == "c_proj" else leaf.removesuffix("_proj")  # GPT-2's two
        parts = FUSED.get(leaf, (short,))
        yield from _parts(name, layer, parts)


def _parts(name: str, layer: LoRALinear, parts: tuple[str, ...]) -> Iterator[Update]:
    matrices = layer.lora_A.chunk(layer.lora_groups)
    for i, part in enumerate(parts):
        yield Update(
            name, part, matrices[i % len(matrices)].detach(),
            layer.lora_B.detach().chunk(len(parts))[i], len(matrices) < len(parts),
            layer.lora_scaling, layer.weight.detach().float().chunk(len(parts))[i])


def singular_values(found: Iterable[Update]) -> dict[str, list[list[float]]]:
    """Return the singular values of each layer's ΔW by the part of the block it stands in."""
    parts: dict[str, list[list[float]]] = {}
    for update in found:
        parts.setdefault(update.part, []).append(update.svd()[1].tolist())
    return parts


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """Return φ(i, j) in [0, 1], (r, s), of the first i and j right singular vectors of two A's.

    φ = ||V_i' V_j||² / min(i, j): 1 if one span holds the other, 0 if they are orthogonal. For
    random matrices with `in` columns it is about max(i, j) / in.
    """
    spans = [torch.linalg.svd(A.float(), full_matrices=False)[2] for A in (one, other)]
    overlap = (spans[0] @ spans[1].T).square()  # (r, s)
    i, j = (torch.arange(1, n + 1, dtype=overlap.dtype) for n in overlap.shape)
    return overlap.cumsum(0).cumsum(1) / torch.minimum(i[:, None], j)


class Amplification(NamedTuple):
    """Frobenius norms of ΔW, and of W0 within the subspaces of ΔW, of W0 itself, and random ones.

    All have ΔW's rank. `factor` says how much ΔW amplifies what W0 does in ΔW's directions.
    """

    update: float
    within_update: float
    within_itself: float
    within_random: float

    @property
    def factor(self) -> float:
        return self.update / self.within_update


def amplification(update: Update, generator: torch.Generator) -> Amplification:
    U, S, Vh = update.svd()
    W, rank = update.weight, len(S)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in W.shape)
    return Amplification(
        S.norm().item(), (U.T @ W @ Vh.T).norm().item(),
        torch.linalg.svdvals(W)[:rank].norm().item(), (left.T @ W @ right).norm().item())


@torch.no_grad()
def truncate(model: nn.Module, directions: int) -> None:
    """Cut each update of an unmerged `model` to its first singular `directions`, in place.

    Raises ValueError if parts of a layer share one A, which a cut would have to split.
    """
    for update in updates(model):
        if update.shared:
            raise ValueError("lora_qkv=shared: q, k and v have one A and cannot be cut apart")
        U, S, Vh = update.svd()
        kept = min(directions, len(S))
        update.B.zero_()[:, :kept] = U[:, :kept] * (S[:kept] / update.scaling)
        update.A.zero_()[:kept] = Vh[:kept]


@contextmanager
def scaled(model: nn.Module, strength: float) -> Iterator[None]:
    """Multiply every ΔW of an unmerged `model` by `strength` within a `with` block.

    With 0 it computes its base, exactly; with 1 what it learned.
    """
    scalings = {layer: layer.lora_scaling for layer in lora_layers(model).values()}
    try:
        for layer, scaling in scalings.items():
            layer.lora_scaling = strength * scaling
        yield
    finally:
        for layer, scaling in scalings.items():
            layer.lora_scaling = scaling
