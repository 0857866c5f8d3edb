"""The fast kernels equal the plain computation in values and gradients."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import kernels
from runtime.kernels import attend, linear

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def values_and_gradients(function: Any, *inputs: Tensor | None) -> list[Tensor]:
    """Return the output, and the gradient of a weighted sum of it for each input that needs one."""
    y = function(*inputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), wanted)]


@pytest.fixture(params=[False, True], ids=["plain", "onednn"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Take both paths wherever torch has oneDNN, whichever is faster."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 1, 7), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs_in_value_and_every_gradient(
    onednn: bool, shape: tuple[int, ...], bias: bool
) -> None:
    inputs = randn(*shape), randn(11, 7), randn(11) if bias else None
    close(values_and_gradients(linear, *inputs), values_and_gradients(F.linear, *inputs))


@pytest.mark.parametrize("shape", [(1, 7), (5, 1, 7), (1, 5, 7), (2, 3, 7), (65, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_of_inference_equal_torchs(
    onednn: bool, shape: tuple[int, ...], bias: bool
) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(11, 7), torch.randn(11) if bias else None
    with torch.no_grad():
        found = linear(x, weight, bias)
        close(found, F.linear(x, weight, bias))
        close(linear(x.transpose(0, -2), weight), F.linear(x.transpose(0, -2), weight))
    assert found.is_contiguous()


def test_linear_takes_parts_of_matrices(onednn: bool) -> None:
    x, weight = randn(4, 6, 12), randn(10, 20)
    parts = lambda f: lambda x, w: f(x[..., 3:9], w[2:7, 5:11])  # noqa: E731
    close(values_and_gradients(parts(linear), x, weight),
          values_and_gradients(parts(F.linear), x, weight))
    transposed = lambda f: lambda x, w: f(x.transpose(0, 1), w[:, :12].t()[:, :12])  # noqa: E731
    square = randn(12, 12)
    close(values_and_gradients(transposed(linear), x, square),
          values_and_gradients(transposed(F.linear), x, square))


def test_frozen_weight_gets_no_gradient_and_its_input_is_not_kept(onednn: bool) -> None:
    x, weight = randn(5, 7), torch.randn(11, 7)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        y = linear(x, weight)
    assert (5, 7) not in kept
    y.sum().backward()
    close(x.grad, weight.sum(dim=0).expand(5, 7))


def test_torch_computes_autocast_and_other_precisions(onednn: bool) -> None:
    x, weight = torch.randn(5, 7), torch.randn(11, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


def test_choice_of_kernel_depends_only_on_the_machine() -> None:
    assert kernels.onednn_is_faster() == kernels.onednn_is_faster.__wrapped__()


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


@pytest.mark.parametrize("width", [4, 2], ids=["in parts", "fused"])  # 5 tokens < 2 · 4
@pytest.mark.parametrize(("mask", "given"), [(CAUSAL, None), (CAUSAL, CAUSAL), (PADDED, PADDED)],
                         ids=["causal by default", "causal", "padded"])
def test_attention_to_a_shared_prefix_equals_attention_to_its_copies(
    width: int, mask: Tensor, given: Tensor | None
) -> None:
    tokens, keys = mask.shape[2:]
    q, k, v = randn(3, 2, tokens, width), randn(3, 2, keys, width), randn(3, 2, keys, width)
    prefix = randn(1, 2, 7, width), randn(1, 2, 7, width)
    found = values_and_gradients(
        lambda q, k, v, pk, pv: attend(q, k, v, (pk, pv), given), q, k, v, *prefix)
    expected = values_and_gradients(
        lambda *inputs: joint_attention(*inputs, mask), q, k, v, *prefix)
    close(found, expected)


@pytest.mark.parametrize("width", [4, 2], ids=["in parts", "fused"])
def test_attention_dropout_keeps_the_mean(width: int) -> None:
    q, k, v = (torch.randn(400, 2, 3, width) for _ in range(3))
    q[:], k[:], v[:] = q[:1].clone(), k[:1].clone(), v[:1].clone()
    prefix = torch.randn(1, 2, 7, width), torch.randn(1, 2, 7, width)
    dropped, whole = (attend(q, k, v, prefix, None, dropout) for dropout in (0.3, 0.0))
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(dim=0), whole[0], rtol=0, atol=0.25)
