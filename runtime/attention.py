"""Attention over a prefix that all rows share and each row's own keys, by the fastest way.

Dimensions as in `model.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime.kernels import last_contiguous

BLOCK = 128  # of queries
LEAST_ROWS = 4  # whose next tokens attend faster by products than in torch's kernel
MOST_QUERIES = 4  # of a row, whose products with the keys are faster transposed
MOST_WEIGHTS = 2**23  # of attention at once, where products are faster than torch's kernel


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
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    prefix = prefix and (last_contiguous(prefix[0]), last_contiguous(prefix[1]))
    if mask is None and not dropout and _trains_in_16_bits(q):
        return _attend_in_blocks(q, *(k, v) if prefix is None else _behind(prefix, k, v))
    if prefix is None and mask is None:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=shared > 1)
    if mask is None:
        mask = torch.ones(1, 1, shape[2], shape[2], dtype=torch.bool, device=q.device).tril()
    if shared > 1:  # stand the queries of one key below each other: no key is copied
        q, mask = q.unflatten(1, (-1, shared)).flatten(2, 3), mask.repeat(1, 1, shared, 1)
    return _attend_masked(q, k, v, prefix, mask, dropout, shared).reshape(shape)


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, mask: Tensor,
    dropout: float, shared: int,
) -> Tensor:
    """Attend as `attend` does; `shared` queries of one token stand below each other."""
    if q.device.type == "cpu":
        one_token = q.size(2) <= shared
        if one_token and len(q) >= LEAST_ROWS and not torch.is_grad_enabled():
            return _attend_in_parts(q, k, v, prefix, mask, dropout)
        if prefix and not dropout and _parts_can_be_merged(q):
            return _MergedAttention.apply(q, k, v, mask, *(x.to(k.dtype) for x in prefix))
        if prefix and _products_are_faster(q, k, prefix):
            return _attend_in_parts(q, k, v, prefix, mask, dropout)
    if prefix:
        k, v = _behind(prefix, k, v)
        mask = F.pad(mask, (prefix[0].size(2), 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout)


def _parts_can_be_merged(q: Tensor) -> bool:
    """Tell whether torch's kernel serves prefix and own keys one by one: best in float32."""
    traced = torch.is_grad_enabled() and torch.compiler.is_compiling()
    return q.dtype == torch.float32 and not traced


def _products_are_faster(q: Tensor, k: Tensor, prefix: tuple[Tensor, Tensor]) -> bool:
    """Tell whether products beat torch's kernel, for which the prefix must be copied."""
    weights = q.size(0) * q.size(1) * q.size(2) * (prefix[0].size(2) + k.size(2))
    if not torch.is_grad_enabled() and weights <= MOST_WEIGHTS:
        return True
    return q.size(2) < 2 * q.size(3)  # the weights take less memory than copies of the prefix


def _behind(prefix: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Return the keys and values (B, K, P+S, D) of all rows, a copy of the prefix first."""
    return tuple(torch.cat((first.to(own.dtype).expand(len(own), -1, -1, -1), own), dim=2)
                 for first, own in zip(prefix, (k, v), strict=True))


def _trains_in_16_bits(q: Tensor) -> bool:
    """Tell whether blocks of queries are faster: on a CPU, for more tokens than features."""
    return (q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.size(2) > q.size(3)
            and torch.is_grad_enabled() and not torch.compiler.is_compiling())


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally; q (B, H, T, D), k and v (B, K, P+T, D), whose first P all queries see.

    In 16 bits on a CPU it is about twice as fast as torch's kernel, mostly backward.
    """
    grouped = q.unflatten(1, (k.size(1), -1)).flatten(0, 1)  # (B·K, H/K, T, D)
    y = _BlockAttention.apply(grouped, k.flatten(0, 1), v.flatten(0, 1))
    return y.view(q.shape)


class _BlockAttention(torch.autograd.Function):
    """Attention in blocks of queries; the backward pass computes the weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        y = torch.empty_like(q)  # (N, G, T, D)
        for block, end in _query_blocks(q, k):
            weights = _block_weights(q[:, :, block], k[:, :end])
            y[:, :, block] = torch.bmm(weights.to(v.dtype), v[:, :end]).view_as(y[:, :, block])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        by_q, by_k, by_v = torch.empty_like(q), *(torch.zeros_like(x, dtype=torch.float32)
                                                  for x in (k, v))
        for block, end in _query_blocks(q, k):
            own_q, own_grad = (x[:, :, block].flatten(1, 2) for x in (q, grad))  # (N, G·t, D)
            weights = _block_weights(q[:, :, block], k[:, :end])  # (N, G·t, S)
            by_weights = torch.bmm(own_grad, v[:, :end].mT).float()
            by_v[:, :end] += torch.bmm(weights.to(v.dtype).mT, own_grad)
            by_scores = torch._softmax_backward_data(by_weights, weights, -1, torch.float32)
            by_scores = (by_scores * q.size(-1) ** -0.5).to(k.dtype)
            by_q[:, :, block] = torch.bmm(by_scores, k[:, :end]).view_as(q[:, :, block])
            by_k[:, :end] += torch.bmm(by_scores.mT, own_q)
        return by_q, by_k.to(k.dtype), by_v.to(v.dtype)


def _query_blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, int]]:
    """Yield blocks of queries and how many keys they see."""
    T, P = q.size(2), k.size(1) - q.size(2)
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        yield slice(start, stop), P + stop


def _block_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return the weights (N, G·t, S) of the queries (N, G, t, D), the last of S keys (N, S, D)."""
    (_, G, t, D), S = q.shape, k.size(1)
    scores = torch.bmm(q.flatten(1, 2), k.mT).float() * D**-0.5
    hidden = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1).repeat(G, 1)  # (G·t, t)
    scores[:, :, S - t :].masked_fill_(hidden, -torch.inf)
    return scores.softmax(dim=-1)


class _MergedAttention(torch.autograd.Function):
    """Attend to the prefix and to the own keys with torch's kernel, and weigh the two outputs.

    The queries of all rows see the prefix as one row. A part's share of the softmax follows from
    the logarithms of the two sums of exponentials, which the kernel returns. Given the merged
    output and sum, the kernel's backward pass computes each part's share of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, first_k: Tensor, first_v: Tensor
    ) -> Tensor:
        kernel, B = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, len(q)
        on_first, first_sum = kernel(_as_one_row(q), first_k, first_v)  # and (1, H, B·T)
        own, own_sum = kernel(q, k, v, attn_mask=_bias(mask, q))  # (B, H, T, D), (B, H, T)
        first_sum = _as_rows(first_sum, B)
        y = own.lerp(_as_rows(on_first, B), (first_sum - own_sum).sigmoid()[..., None])
        if any(ctx.needs_input_grad):
            both = torch.logaddexp(first_sum, own_sum)
            ctx.save_for_backward(q, k, v, mask, first_k, first_v, y, both)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, first_k, first_v, y, both = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        by_q, by_k, by_v = kernel(grad, q, k, v, y, both, 0.0, False, attn_mask=_bias(mask, q))
        by_all_q, *by_first = kernel(_as_one_row(grad), _as_one_row(q), first_k, first_v,
                                     _as_one_row(y), _as_one_row(both), 0.0, False)
        return by_q.add_(_as_rows(by_all_q, len(q))), by_k, by_v, None, *by_first


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)


def _as_one_row(x: Tensor) -> Tensor:
    """Stand the tokens of all rows (B, H, T, ...) behind each other: (1, H, B·T, ...)."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _as_rows(x: Tensor, B: int) -> Tensor:
    """Undo `_as_one_row`."""
    return x[0].unflatten(1, (B, -1)).transpose(0, 1)


def _attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, mask: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Attend by products; to the prefix for all rows in one per head, without a copy for each."""
    first_k, first_v = (x[0].to(k.dtype) for x in prefix) if prefix else (None, None)  # (H, P, D)
    if torch.is_grad_enabled() and not dropout and not torch.compiler.is_compiling():
        return _PartsAttention.apply(q, k, v, mask, first_k, first_v)
    weights = _part_weights(q, k, mask, first_k).to(q.dtype)
    return _weigh(F.dropout(weights, dropout), v, first_v)


class _PartsAttention(torch.autograd.Function):
    """Attention in parts; only the weights, inputs and no copies are kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, first_k: Tensor | None,
        first_v: Tensor | None,
    ) -> Tensor:
        weights = _part_weights(q, k, mask, first_k, torch.float32)
        ctx.save_for_backward(q, k, v, first_k, first_v, weights)
        return _weigh(weights.to(q.dtype), v, first_v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first_k, first_v, weights = ctx.saved_tensors
        by_v, by_first_v = _transposed(weights.to(q.dtype), grad, k.size(2))
        by_weights = _products(grad, v, first_v).to(weights.dtype)
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        by_scores = by_scores.to(q.dtype).mul_(q.size(-1) ** -0.5)
        by_k, by_first_k = _transposed(by_scores, q, k.size(2))
        return _weigh(by_scores, k, first_k), by_k, by_v, None, by_first_k, by_first_v


def _part_weights(
    q: Tensor, k: Tensor, mask: Tensor, first_k: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the weights (B·H, T, P+S) of the prefix's keys (H, P, D) and the own (B, H, S, D)."""
    bias = _bias(mask, q).expand(*q.shape[:3], k.size(2)).flatten(0, 1)
    return _products(q, k, first_k, q.size(-1) ** -0.5, bias).softmax(dim=-1, dtype=dtype)


def _products(
    x: Tensor, own: Tensor, first: Tensor | None, scale: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """Return the products of `x` (B, H, T, D) with the vectors of prefix and rows: (B·H, T, P+S).

    With a `bias` of the rows' own ones, all are `scale` times as large.
    """
    rows, vectors = _per_row(x), _per_row(own)
    if bias is None:
        by_own = torch.bmm(rows, vectors.mT)
    elif x.size(2) <= MOST_QUERIES:  # the same, transposed
        by_own = torch.baddbmm(bias.mT, vectors, rows.mT, alpha=scale).mT
    else:
        by_own = torch.baddbmm(bias, rows, vectors.mT, alpha=scale)
    if first is None:
        return by_own
    none = x.new_zeros(())
    by_first = torch.baddbmm(none, _per_head(x), first.mT, beta=0, alpha=scale)  # (H, B·T, P)
    by_first = by_first.unflatten(1, (len(x), -1)).transpose(0, 1).flatten(0, 1)  # (B·H, T, P)
    return torch.cat((by_first, by_own), dim=-1)


def _weigh(weights: Tensor, own: Tensor, first: Tensor | None) -> Tensor:
    """Return the sum (B, H, T, D) of the vectors of prefix and rows by `weights` (B·H, T, P+S)."""
    B, H, S, _ = own.shape
    first_weights, own_weights = weights.split((weights.size(-1) - S, S), dim=-1)
    y = torch.bmm(own_weights, _per_row(own)).unflatten(0, (B, H))
    if first is None:
        return y
    on_first = torch.bmm(_per_head(first_weights.unflatten(0, (B, H))), first)  # (H, B·T, D)
    return y + on_first.unflatten(1, (B, -1)).transpose(0, 1)


def _transposed(weights: Tensor, x: Tensor, S: int) -> tuple[Tensor, Tensor | None]:
    """Return the sums of `x` (B, H, T, D) by transposed weights: (B, H, S, D) and (H, P, D)."""
    first_weights, own_weights = weights.split((weights.size(-1) - S, S), dim=-1)
    by_own = torch.bmm(own_weights.mT, _per_row(x)).unflatten(0, x.shape[:2])
    if not first_weights.numel():
        return by_own, None
    by_first = _per_head(first_weights.unflatten(0, x.shape[:2])).mT
    return by_own, torch.bmm(by_first, _per_head(x))


def _per_row(x: Tensor) -> Tensor:
    """Lay out (B, H, T, D) for a product per row and head: (B·H, T, D)."""
    return x.reshape(-1, *x.shape[2:])


def _per_head(x: Tensor) -> Tensor:
    """Lay out (B, H, T, D) for a product per head: (H, B·T, D)."""
    return x.transpose(0, 1).flatten(1, 2)
