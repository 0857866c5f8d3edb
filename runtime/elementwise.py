"""Formulas of a Llama block of which the backward pass keeps only the inputs.

Written plainly, autograd keeps a tensor for nearly every operation: 900 instead of 728 MiB for
1,008 tokens of SmolLM2-135M. `torch.compile` fuses the plain formulas itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return `weight * x / sqrt(mean(x²) + epsilon)`, (..., C), as `F.rms_norm` does."""
    plain = (
        x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu"
        or torch.compiler.is_compiling()
    )
    return F.rms_norm(x, weight.shape, weight, epsilon) if plain else (
        _RMSNorm.apply(x, weight, epsilon))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = x.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        rows = (grad * x).mul_(scale).reshape(-1, x.size(-1)) if for_weight else None
        by_weight = rows.sum(dim=0) if for_weight else None  # (C,)
        if not for_x:
            return None, by_weight, None
        grad = grad * weight
        along = (grad * x).mean(dim=-1, keepdim=True).mul_(scale.pow(3))  # what scaling takes away
        return grad.mul_(scale).addcmul_(x, along, value=-1), by_weight, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, the activation of SwiGLU (Shazeer 2020, arXiv:2002.05202)."""
    return F.silu(gate) * up if torch.compiler.is_compiling() else _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        for_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return for_gate, F.silu(gate).mul_(grad)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn `x` (B, H, T, D): pair i is the features i and i + D/2 (arXiv:2104.09864).

    `rotation` (2, ..., T, D) holds the cosines, and the sines with a minus in the first half.
    """
    cos, sin = rotation.to(x.dtype)
    if torch.compiler.is_compiling():
        return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.size(-1) // 2, dims=-1), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # the transpose of a rotation turns back
        back = grad.roll(grad.size(-1) // 2, dims=-1)
        return (grad * cos).addcmul_(back, sin, value=-1), None, None
