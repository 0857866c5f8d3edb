"""Linear layers, cross-entropy and sampling, computed with the fastest of torch's kernels.

Dimensions as in `model.py`.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FEW_ROWS = range(5, 65)  # of an input: here, and not below, the transposed product is faster
CHUNK = 2**23  # logits at once: 32 MiB


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Return whether oneDNN is faster than MKL, which uses only AVX2 on AMD's AVX-512 processors.

    MKL chooses by the vendor and does not tell what it has chosen; therefore the vendor is asked
    here, too. Nothing is measured, so that a resumed run takes the same path as before.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return (
        cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text(errors="replace")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, (..., in) x (out, in) -> (..., out), as `F.linear` does.

    It calls oneDNN for float32 on a CPU if that is faster, and `F.linear` otherwise. Without
    gradients the result for few rows is a transposed view, which is not contiguous.
    """
    if not _takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDnnLinear.apply(x, weight, bias)
    few = x.numel() // x.size(-1) in FEW_ROWS and weight.is_contiguous()
    return (_few_rows if few else _onednn)(x, weight, bias)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return `linear(x, weight)`, contiguous, for use within an `autograd.Function`."""
    return _onednn(x, weight) if _takes_onednn(x, weight) else F.linear(x, weight)


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
        and x.numel() > 0 and onednn_is_faster()
    )


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a transposed view of `weight @ x.T`: for few rows it is faster."""
    h = _onednn(weight, x.flatten(0, -2))  # (out, rows)
    h = h if bias is None else h.add_(bias[:, None])
    return h.t().unflatten(0, x.shape[:-1])


def last_contiguous(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last dimension, as torch's attention kernels need it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN is slow for a part of a matrix
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (rows, out)
        return (
            _onednn(grad, weight.t()) if for_x else None,
            _onednn(rows.t(), x.flatten(0, -2).t()) if for_weight else None,  # (out, in)
            rows.sum(dim=0) if for_bias else None,
        )


def dropout_linear(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """Return `linear(F.dropout(x, p), weight)`, (..., in) x (out, in) -> (..., out), bit for bit.

    The backward pass keeps `x`, which q, k and v share, and a mask of one byte a feature. Plainly,
    autograd keeps the output of dropout and its mask, of one number a feature each, for every
    product.
    """
    if not 0 < p < 1 or not x.numel() or torch.compiler.is_compiling():
        return linear(F.dropout(x, p), weight)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        weight = weight.to(torch.get_autocast_dtype(kind))
    return _DropoutLinear.apply(x, weight, p)


class _DropoutLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, p: float) -> Tensor:
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)  # draws as F.dropout does
        ctx.save_for_backward(x, weight, mask)
        ctx.p = p
        dropped = mask.to(x.dtype).div_(1 - p).mul_(x).to(weight.dtype)
        return _product(dropped, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, mask = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        noise = mask.to(x.dtype).div_(1 - ctx.p)
        by_x = _product(grad, weight.t()).to(x.dtype).mul_(noise) if for_x else None
        if not for_weight:
            return by_x, None, None
        dropped = noise.mul_(x).to(weight.dtype).flatten(0, -2)  # (rows, in)
        return by_x, _product(grad.flatten(0, -2).t(), dropped.t()), None  # (out, in)


def cross_entropies(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return `F.cross_entropy(x @ head.T, targets, reduction="none")`, (N,), in nats.

    x is (N, C), head (V, C). At most `CHUNK` logits exist at once. The gradient of x is computed
    beside the loss while the head is frozen, and later, from the logits again, if it is trained.
    """
    return _CrossEntropies.apply(x, head, targets)


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        for_x, for_head, _ = ctx.needs_input_grad
        nats, by_x = x.new_empty(len(x)), torch.empty_like(x) if for_x and not for_head else None
        for part in _row_chunks(len(x), len(head)):
            nats[part], error = _nats_and_error(x[part], head, targets[part])
            if by_x is not None:
                by_x[part] = _product(error, head.t())
        ctx.save_for_backward(x if for_head else None, head, targets, by_x)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, head, targets, by_x = ctx.saved_tensors
        if by_x is not None:
            return by_x * grad[:, None], None, None
        by_x, by_head = torch.empty_like(x), torch.zeros_like(head)
        for part in _row_chunks(len(x), len(head)):
            _, error = _nats_and_error(x[part], head, targets[part])
            error *= grad[part, None]
            by_x[part] = _product(error, head.t())
            by_head += _product(error.t(), x[part].t())  # (V, C)
        return by_x, by_head, None


def _row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK // vocabulary)
    return (slice(start, start + size) for start in range(0, rows, size))


def _nats_and_error(x: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies (N,) and their gradient (N, V) by the logits."""
    logits, each = _product(x, head), torch.arange(len(x), device=x.device)
    logits -= logits.amax(dim=-1, keepdim=True)
    chosen = logits[each, targets]
    total = logits.exp_().sum(dim=-1)
    logits /= total[:, None]
    logits[each, targets] -= 1
    return total.log() - chosen, logits


def at_positions(x: Tensor, at: Tensor) -> Tensor:
    """Return `x` (B, T, ...) at the positions `at` (B, W): (B, W, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], at]


def choose_token(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Pick the next token (B, 1) from `logits` (B, V); temperature 0 or top_k 1 is greedy."""
    if not (temperature >= 0 and (top_k or 0) >= 0):
        raise ValueError(f"temperature={temperature} and top_k={top_k} must not be negative")
    if temperature == 0 or top_k == 1:
        return logits.argmax(dim=-1, keepdim=True)
    # Subtract the largest logit first, so that no temperature overflows; one that float32 rounds
    # to zero would divide zero by zero.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)
