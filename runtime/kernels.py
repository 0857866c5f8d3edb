"""Linear layers, attention and sampling, computed with the fastest of torch's kernels.

Dimensions as in `model.py`.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FEW_ROWS = 64  # of an input; the tokens of one step of generation


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Return whether oneDNN is faster than MKL, which uses only AVX2 on AMD's AVX-512 processors.

    The answer depends on the machine and on no measurement, so that a resumed run takes the same
    path as before.
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

    It calls oneDNN for float32 on a CPU if that is faster, and `F.linear` otherwise.
    """
    plain = (
        x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu"
        or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        or x.numel() == 0 or not onednn_is_faster()
    )
    if plain:
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.size(-1):
        return _few_rows(x, weight, bias)
    return _OneDnnLinear.apply(x, weight, bias)


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the transpose, `weight @ x.T`: for few rows it is faster."""
    h = _onednn(weight, x.flatten(0, -2)).t().contiguous()  # (rows, out)
    return (h if bias is None else h.add_(bias)).view(*x.shape[:-1], -1)


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


def attend(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, mask: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(q K' / sqrt(D)) V, (B, H, T, D), over a shared prefix and each row's keys.

    q is (B, H, T, D); k and v, of each row's own tokens, are (B, K, S, D), where H / K heads of
    queries share one of keys. `prefix` holds keys and values (1, K, P, D) that all queries see.
    `mask` (B or 1, 1, T, S) is True where a query sees an own key; without it attention is causal
    and S = T.
    """
    shape, shared = q.shape, q.size(1) // k.size(1)
    if not q.numel():
        return q
    if prefix is None and mask is None:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=shared > 1)
    if mask is None:
        mask = torch.ones(1, 1, shape[2], shape[2], dtype=torch.bool, device=q.device).tril()
    if shared > 1:  # stand the queries of one key below each other: no key is copied
        q, mask = q.unflatten(1, (-1, shared)).flatten(2, 3), mask.repeat(1, 1, shared, 1)
    if prefix is None:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout).reshape(shape)
    (B, _, T, D), P = q.shape, prefix[0].size(2)
    prefix = prefix[0].to(k.dtype), prefix[1].to(v.dtype)
    # For short rows the attention weights take less memory than copies of the prefix.
    if q.device.type == "cpu" and T < 2 * D:
        return _attend_in_parts(q, k, v, prefix, mask, dropout).reshape(shape)
    k, v = (torch.cat((first.expand(B, -1, -1, -1), own), dim=2)  # (B, K, P+S, D)
            for first, own in zip(prefix, (k, v), strict=True))
    mask = F.pad(mask, (P, 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).reshape(shape)


def _attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], mask: Tensor, dropout: float
) -> Tensor:
    """Attend to the prefix for all rows in one product per head, without a copy for each row."""
    (B, H, T, D), S = q.shape, k.size(2)
    prefix_k, prefix_v = prefix[0][0], prefix[1][0]  # (H, P, D)
    q, k, v = (x.transpose(0, 1).reshape(H * B, -1, D) for x in (q, k, v))  # (H·B, T or S, D)
    all_q, scale = q.view(H, B * T, D), D**-0.5
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    bias = bias.transpose(0, 1).expand(H, B, T, S).flatten(0, 1)  # (H·B, T, S)
    to_prefix = torch.baddbmm(
        q.new_zeros(()), all_q, prefix_k.mT, beta=0, alpha=scale)  # (H, B·T, P)
    to_own = torch.baddbmm(bias, q, k.mT, alpha=scale)  # (H·B, T, S)
    scores = torch.cat((to_prefix.view(H * B, T, -1), to_own), dim=-1)  # (H·B, T, P+S)
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), dropout)
    on_prefix, on_own = weights.view(H, B, T, -1).split((prefix_k.size(1), S), dim=-1)
    y = torch.bmm(on_prefix.flatten(1, 2), prefix_v).view(H * B, T, D)  # (H, B·T, P) x (H, P, D)
    y = torch.baddbmm(y, on_own.flatten(0, 1), v)  # (H·B, T, D)
    return y.view(H, B, T, D).transpose(0, 1)  # (B, H, T, D)


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
