"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751).

Section 2.1 puts a small network with a skip connection behind each sub-layer of a block, after its
projection back to the width C and before the residual is added:

    y = x + W_up · GELU(W_down x + b_down) + b_up        W_down (m, C), W_up (C, m)

All else is frozen but, if asked, the norms. W_up W_down cannot be merged into the frozen weights,
since a GELU stands between them: inference pays for two more products per sub-layer.
"""

from collections import OrderedDict
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from model import Decoder

BIRTH = 1e-3  # standard deviation of the weights: the network starts near the identity
SLOTS = ("resid_dropout", "mlp.dropout")  # the last modules of the two sub-layers of a block


class Bottleneck(nn.Module):
    """The formula above, for activations (..., C)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=BIRTH, a=-2 * BIRTH, b=2 * BIRTH)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))  # (..., C) -> (..., m) -> (..., C)


def slots(model: Decoder) -> Iterator[tuple[str, nn.Module]]:
    """Return the name and the module after each sub-layer, two per block."""
    for name, module in list(model.named_modules()):
        if name.endswith(SLOTS):
            yield name, module


def add_bottlenecks(model: Decoder, size: int, norms: bool = False) -> None:
    """Put a bottleneck of `size` behind each sub-layer and train it, with the `norms` if asked."""
    model.requires_grad_(False)
    for name, dropout in slots(model):
        bottleneck = Bottleneck(model.config.n_embd, size)
        model.set_submodule(name, nn.Sequential(OrderedDict(
            dropout=dropout, bottleneck=bottleneck)))
    if norms:
        kind = type(model.norm)
        for module in model.modules():
            if isinstance(module, kind):
                module.requires_grad_(True)
