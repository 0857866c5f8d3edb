"""Adapted layers whose update does something, and the tolerances to compare them with."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from made_models import TINY
from torch import Tensor, nn

from lora import (
    LoRALinear,
    lora_layers,
)
from model import GPT

LOW = (torch.float16, torch.bfloat16)
EXACT = {"rtol": 0, "atol": 0}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
each_groups = pytest.mark.parametrize("groups", [1, 3])


def adapted(in_features: int = 10, out_features: int = 12, **changes: Any) -> LoRALinear:
    """Return a layer with B away from zero, as training leaves it; alpha / r is 1.5."""
    layer = LoRALinear(in_features, out_features, **{"lora_rank": 2, "lora_alpha": 3.0} | changes)
    nn.init.normal_(layer.lora_B)
    return layer


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def values_and_gradients(function: Any, *inputs: Tensor | None) -> list[Tensor]:
    """Return the output, and the gradient of a weighted sum of it for each input that needs one."""
    y = function(*inputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), wanted)]


@torch.no_grad()
def dense_delta(layer: LoRALinear) -> Tensor:
    """The definition: (alpha / r) B A, one group after the other, in float32."""
    pairs = zip(
        layer.lora_B.float().chunk(layer.lora_groups),
        layer.lora_A.float().chunk(layer.lora_groups),
        strict=True,
    )
    return torch.cat([1.5 * B @ A for B, A in pairs])


def adapted_gpt(**changes: Any) -> GPT:
    model = GPT(replace(TINY, **{"lora_rank": 2, "lora_alpha": 3.0} | changes))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model
