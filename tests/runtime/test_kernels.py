"""The fast kernels equal the plain computation in values and gradients."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from made_layers import randn, values_and_gradients
from torch import Tensor

from runtime import kernels
from runtime.kernels import linear

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


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
        close(linear(found, weight.t()), F.linear(found.contiguous(), weight.t()))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_after_dropout_equals_the_plain_one_to_the_bit(
    onednn: bool, dtype: torch.dtype, p: float
) -> None:
    """In 16 bits autocast makes the weight one of 16; the input may be one already."""
    for rows in (randn(3, 2, 7), randn(90, 7), randn(0, 7), randn(3, 7).detach().to(dtype)):
        weight = randn(11, 7)

        def run(product: Callable[..., Tensor], x: Tensor, weight: Tensor) -> list[Tensor]:
            torch.manual_seed(1)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                h = product(x, weight)
            return [h, *torch.autograd.grad(h.float().square().sum(), (x, weight))]

        x = rows.detach().requires_grad_()
        found = run(lambda x, w: kernels.dropout_linear(x, w, p), x, weight)
        expected = run(lambda x, w: linear(F.dropout(x, p), w), x, weight)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_product_after_dropout_keeps_its_input_once_and_a_byte_a_feature() -> None:
    x, kept = randn(5, 7), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for weight in (randn(3, 7), randn(3, 7)):
            kernels.dropout_linear(x, weight, 0.5)
    inputs = {t.data_ptr(): t.dtype.itemsize for t in kept if t.shape == x.shape}
    assert sorted(inputs.values()) == [1, 1, 4]


@pytest.mark.parametrize("chunk", [1, 26, 2**24])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_cross_entropies_equal_torchs_without_all_logits_at_once(
    onednn: bool, chunk: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "CHUNK", chunk)  # of logits: of 1, 2, or all 5 rows
    x, head, targets = 5 * randn(5, 7), torch.randn(13, 7), torch.tensor([0, 12, 3, 3, 7])
    x, head = x.detach().requires_grad_(), head.requires_grad_(trained)
    rows = []
    real = kernels._product
    monkeypatch.setattr(kernels, "_product", lambda x, *rest: rows.append(len(x)) or real(x, *rest))
    found = values_and_gradients(partial(kernels.cross_entropies, targets=targets), x, head)
    assert {size for size in rows if size != 13} == {1: {1}, 26: {2, 1}, 2**24: {5}}[chunk]
    expected = values_and_gradients(
        lambda x, head: F.cross_entropy(x @ head.T, targets, reduction="none"), x, head)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_cross_entropies_of_a_frozen_head_keep_no_logits() -> None:
    x, head, targets = randn(5, 7), torch.randn(13, 7), torch.tensor([0, 12, 3, 3, 7])
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        kernels.cross_entropies(x, head, targets)
    assert sorted(kept) == [(5,), (5, 7), (13, 7)]


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
