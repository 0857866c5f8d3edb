"""The formulas that save only their inputs equal the plain ones in values and gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kernels import randn, values_and_gradients
from torch import Tensor

from runtime.elementwise import rms_norm, rotate, swiglu

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-3)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def angles(*shape: int) -> Tensor:
    """Return the cosines and signed sines of random angles (..., D / 2): (2, ..., D)."""
    turns = torch.rand(shape) * 7
    return torch.stack([torch.cat([turns.cos()] * 2, dim=-1),
                        torch.cat([-turns.sin(), turns.sin()], dim=-1)])


def plain_rotation(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply the pairs of features (i, i + D/2) as complex numbers by cos + i sin."""
    half = x.size(-1) // 2
    turn = torch.complex(rotation[0, ..., half:], rotation[1, ..., half:])
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def compare(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Any) -> None:
    close(values_and_gradients(ours, *inputs), values_and_gradients(plain, *inputs))


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("trained", ["x", "weight", "both"])
def test_norm_is_torchs_in_value_and_every_gradient(shape: tuple[int, ...], trained: str) -> None:
    x, weight = randn(*shape), randn(8)
    x.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "x")
    compare(partial(rms_norm, epsilon=1e-3), plain_norm, x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_norm_in_other_precisions_is_torchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 8).to(dtype), torch.randn(8).to(dtype)
    assert torch.equal(rms_norm(x, weight, 1e-3), plain_norm(x, weight))


def test_swiglu_is_the_plain_formula_in_value_and_gradients() -> None:
    compare(swiglu, plain_swiglu, randn(3, 8), randn(3, 8))
    compare(swiglu, plain_swiglu, randn(3, 8).detach(), randn(3, 8))
    compare(swiglu, plain_swiglu, randn(3, 8), randn(3, 8).detach())


@pytest.mark.parametrize("turns", [(5, 4), (2, 1, 1, 4)], ids=["positions", "rows"])
def test_rotation_multiplies_pairs_as_complex_numbers(turns: tuple[int, ...]) -> None:
    x, rotation = randn(2, 5, 3, 8).transpose(1, 2), angles(*turns)  # x (B, H, T, D)
    compare(lambda x: rotate(x, rotation), lambda x: plain_rotation(x, rotation), x)


@pytest.mark.parametrize(("formula", "kept"), [
    (lambda x, y: rms_norm(x, y[0], 1e-3), 32 + 8 + 4),  # x, the weight, a scale per row
    (swiglu, 32 + 32),
    (lambda x, y: rotate(x, torch.ones(2, 4, 8)), 2 * 32),  # no activation
], ids=["norm", "swiglu", "rotate"])
def test_only_the_inputs_are_kept_for_the_backward_pass(
    formula: Callable[..., Tensor], kept: int
) -> None:
    numbers = []

    def count(tensor: Tensor) -> Tensor:
        numbers.append(tensor.numel())
        return tensor

    x, y = randn(4, 8), randn(4, 8)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        formula(x, y)
    assert sum(numbers) == kept
