"""Attention over a prefix that all rows share and each row's own keys, by the fastest way.

Dimensions as in `model.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # of queries
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
        if prefix and not (dropout or torch.is_grad_enabled()) and q.dtype == torch.float32:
            return _attend_and_merge(q, k, v, prefix, mask)
        if _products_are_faster(q, k, prefix, shared):
            return _attend_in_parts(q, k, v, prefix, mask, dropout)
    if prefix:
        k, v = _behind(prefix, k, v)
        mask = F.pad(mask, (prefix[0].size(2), 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout)


def _products_are_faster(
    q: Tensor, k: Tensor, prefix: tuple[Tensor, Tensor] | None, shared: int
) -> bool:
    """Tell whether products beat torch's kernel: for one token of each row they do."""
    if not prefix:
        return q.size(2) <= shared
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


def _attend_and_merge(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], mask: Tensor
) -> Tensor:
    """Attend to the prefix and to the own keys with torch's kernel, and weigh the two outputs.

    The queries of all rows see the prefix as one row. A part's share of the softmax follows from
    the logarithms of the two sums of exponentials, which the kernel returns; they have no gradient.
    """
    (B, H, T, D), kernel = q.shape, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    prefix_k, prefix_v = (x.to(k.dtype) for x in prefix)  # (1, H, P, D)
    on_prefix, prefix_sum = kernel(
        q.transpose(0, 1).reshape(1, H, B * T, D), prefix_k, prefix_v)  # and (1, H, B·T)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    own, own_sum = kernel(q, k, v, attn_mask=bias)  # (B, H, T, D), (B, H, T)
    share = (prefix_sum.view(H, B, T).transpose(0, 1) - own_sum).sigmoid()
    return own.lerp(on_prefix.view(H, B, T, D).transpose(0, 1), share[..., None])


def _attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, mask: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Attend by products; to the prefix for all rows in one per head, without a copy for each."""
    (B, H, T, D), S, scale = q.shape, k.size(2), q.size(-1) ** -0.5
    own_q, own_k, own_v = (x.reshape(B * H, -1, D) for x in (q, k, v))  # of a cache no copies
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    bias = bias.expand(B, H, T, S).reshape(B * H, T, S)
    scores = torch.baddbmm(bias, own_q, own_k.mT, alpha=scale)  # (B·H, T, S)
    if prefix:
        prefix_k, prefix_v = (x[0].to(k.dtype) for x in prefix)  # (H, P, D)
        all_q = q.transpose(0, 1).reshape(H, B * T, D)
        to_prefix = torch.baddbmm(
            q.new_zeros(()), all_q, prefix_k.mT, beta=0, alpha=scale)  # (H, B·T, P)
        to_prefix = to_prefix.view(H, B, T, -1).transpose(0, 1).flatten(0, 1)  # (B·H, T, P)
        scores = torch.cat((to_prefix, scores), dim=-1)
    kept = torch.float32 if torch.is_grad_enabled() else q.dtype  # for the backward pass
    weights = F.dropout(scores.softmax(dim=-1, dtype=kept).to(q.dtype), dropout)
    y = torch.bmm(weights[:, :, weights.size(2) - S :], own_v).view(B, H, T, D)
    if prefix:
        on_prefix = weights[:, :, : weights.size(2) - S].view(B, H, T, -1).transpose(0, 1)
        y = y + torch.bmm(on_prefix.flatten(1, 2), prefix_v).view(H, B, T, D).transpose(0, 1)
    return y
