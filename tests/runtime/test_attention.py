"""Attention over a shared prefix equals its formula in values and gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from made_layers import randn, values_and_gradients
from torch import Tensor

from runtime import attention
from runtime.attention import attend

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor
) -> Tensor:
    """Compute attention by its formula, over copies of the prefix and own keys."""
    k, v = (torch.cat((shared.expand(len(q), -1, -1, -1), own), dim=2)
            for shared, own in ((prefix_k, k), (prefix_v, v)))
    scores = q @ k.transpose(2, 3) / q.size(-1) ** 0.5
    seen = F.pad(mask, (prefix_k.size(2), 0), value=True)
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v


CAUSAL = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
PADDED = torch.arange(6) <= torch.tensor([2, 5, 3])[:, None, None, None]  # (3, 1, 1, 6)


@pytest.mark.parametrize(("width", "merged"), [(4, True), (4, False), (2, False)],
                         ids=["merged", "in parts", "fused"])  # 5 tokens < 2 · 4
@pytest.mark.parametrize("heads", [2, 6])  # of queries, for 2 of keys
@pytest.mark.parametrize(("mask", "given"), [(CAUSAL, None), (CAUSAL, CAUSAL), (PADDED, PADDED)],
                         ids=["causal by default", "causal", "padded"])
def test_attention_to_a_shared_prefix_equals_attention_to_its_copies(
    mask: Tensor, given: Tensor | None, heads: int, width: int, merged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_parts_can_be_merged", lambda q: merged)
    tokens, keys = mask.shape[2:]
    q, k, v = randn(3, heads, tokens, width), randn(3, 2, keys, width), randn(3, 2, keys, width)
    prefix = randn(1, 2, 7, width), randn(1, 2, 7, width)
    found = values_and_gradients(
        lambda q, k, v, pk, pv: attend(q, k, v, (pk, pv), given), q, k, v, *prefix)
    expected = values_and_gradients(
        lambda q, *others: joint_attention(
            q, *(x.repeat_interleave(heads // 2, dim=1) for x in others), mask),
        q, k, v, *prefix)
    close(found, expected)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3 * 2 * 5 * 8 * 4),  # of a query
                                             (torch.bfloat16, 3 * 2 * 5 * 12 * 4)])  # the weights
def test_attention_to_a_prefix_keeps_the_weights_in_16_bits_only(
    dtype: torch.dtype, most: int
) -> None:
    q, k, v = (randn(3, 2, 5, 8).detach().to(dtype).requires_grad_() for _ in range(3))
    prefix = [randn(1, 2, 7, 8).detach().to(dtype).requires_grad_() for _ in range(2)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(q, k, v, (prefix[0], prefix[1]), None)
    assert max(t.untyped_storage().nbytes() for t in kept) == most


@pytest.mark.parametrize("most", [2**23, 0], ids=["in parts", "fused"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("heads", [2, 6])  # of queries, for 2 of keys
@pytest.mark.parametrize(("mask", "given"), [(CAUSAL, None), (PADDED, PADDED)],
                         ids=["causal by default", "padded"])
def test_attention_without_gradients_equals_its_formula(
    mask: Tensor, given: Tensor | None, heads: int, dtype: torch.dtype, tolerance: float,
    most: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "MOST_WEIGHTS", most)
    monkeypatch.setattr(attention, "LEAST_ROWS", 1 if most else 4)  # 3 rows
    tokens, keys = mask.shape[2:]
    q, k, v = (torch.randn(3, n, size, 8).to(dtype)
               for n, size in ((heads, tokens), (2, keys), (2, keys)))
    prefix = [torch.randn(1, 2, 7, 8).to(dtype) for _ in range(2)]
    apart = [x.mT.contiguous().mT for x in (q, k, v, *prefix)]  # features, as after few rows
    with torch.no_grad():
        found = attend(*apart[:3], (apart[3], apart[4]), given)
    rest = (x.double().repeat_interleave(heads // 2, dim=1) for x in (k, v, *prefix))
    expected = joint_attention(q.double(), *rest, mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("heads", [2, 6, 10])  # of queries, for 2 of keys
@pytest.mark.parametrize("rows", [1, 5], ids=["fused", "in parts"])
def test_next_tokens_attend_as_the_formula_says(
    rows: int, heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    mask = torch.arange(6) <= torch.randint(6, (rows, 1, 1, 1))
    q, k, v = (torch.randn(8, n, size, rows).permute(3, 1, 2, 0).to(dtype)
               for n, size in ((heads, 1), (2, 6), (2, 6)))
    with torch.no_grad():
        found = attend(q, k, v, None, mask)
    rest = (x.double().repeat_interleave(heads // 2, dim=1) for x in (k, v))
    nothing = torch.empty(1, heads, 0, 8, dtype=torch.double)
    expected = joint_attention(q.double(), *rest, nothing, nothing, mask)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [4, 2], ids=["in parts", "fused"])
def test_attention_dropout_keeps_the_mean(width: int) -> None:
    q, k, v = (torch.randn(400, 2, 3, width) for _ in range(3))
    q[:], k[:], v[:] = q[:1].clone(), k[:1].clone(), v[:1].clone()
    prefix = torch.randn(1, 2, 7, width), torch.randn(1, 2, 7, width)
    dropped, whole = (attend(q, k, v, prefix, None, dropout) for dropout in (0.3, 0.0))
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(dim=0), whole[0], rtol=0, atol=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "prefix"), [(2, 7), (4, 7), (4, 0)])
@pytest.mark.parametrize("block", [3, 5, 8])
def test_attention_in_blocks_equals_its_formula(
    dtype: torch.dtype, heads: int, prefix: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 8 tokens of 4 features; in 16 bits `attend` takes this way by itself."""
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "_trains_in_16_bits", lambda q: True)
    q, k, v = randn(3, heads, 8, 4), randn(3, 2, 8, 4), randn(3, 2, 8, 4)
    before = (randn(1, 2, prefix, 4), randn(1, 2, prefix, 4)) if prefix else ()
    given = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, *before)]
    found = values_and_gradients(
        lambda q, k, v, *before: attend(q, k, v, before or None, None), *given)
    mask, shared = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(), heads // 2

    def formula(q: Tensor, *others: Tensor) -> Tensor:
        k, v, *before = (x.repeat_interleave(shared, dim=1) for x in others)
        return joint_attention(q, k, v, *before or (k[:1, :, :0], v[:1, :, :0]), mask)

    exact = [x.detach().float().requires_grad_() for x in given]
    expected = [x.to(dtype) for x in values_and_gradients(formula, *exact)]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_long_rows_train_in_blocks_in_16_bits_only() -> None:
    def blocks(dtype: torch.dtype, tokens: int, dropout: float = 0.0) -> bool:
        x = torch.randn(2, 2, tokens, 4, dtype=dtype, requires_grad=True)
        return "BlockAttention" in type(attend(x, x, x, None, None, dropout).grad_fn.next_functions[
            0][0]).__name__

    assert blocks(torch.bfloat16, 5)
    assert not blocks(torch.bfloat16, 4)
    assert not blocks(torch.float32, 5)
    assert not blocks(torch.bfloat16, 5, dropout=0.1)
