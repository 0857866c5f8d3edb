"""Low-rank adaptation of linear layers (Hu et al., 2021, arXiv:2106.09685).

A frozen weight W0 learns an update of rank r: h = W0 x + (alpha / r) B A x. For evaluation the
update is merged into the weight, so that an adapted model costs what the original costs.

Dimensions: in and out are a layer's features, r the rank, G the groups that have their own pair.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LORA_LEAVES = ("lora_A", "lora_B")


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update: `h = W0 x + b + (alpha / r) B A x`.

    With `lora_groups=G` the output features are G equal blocks, each with an A and a B of its own:
    `lora_A` is (G·r, in), `lora_B` is (out, r); GPT-2's fused q, k, v projection has G = 3.
    A and B are float32 even where the base weight is of lower precision, and start frozen
    (`mark_only_lora_as_trainable`). `train(False)`, which every parent's `eval()` calls, merges;
    `train()` restores the base weight bit for bit. With `lora_rank=0` this is a plain `nn.Linear`.
    Shapes: `(..., in)` to `(..., out)`. All its products are taken by `product(x, weight, bias)`,
    which a subclass may replace by a faster equal of `F.linear`.

    Raises ValueError if the rank is negative or the groups do not divide `out_features`.
    """

    product = staticmethod(F.linear)

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        lora_rank: int = 0, lora_alpha: float = 0.0, lora_dropout: float = 0.0,
        lora_groups: int = 1,
    ) -> None:
        if lora_rank < 0:
            raise ValueError(f"lora_rank={lora_rank} must not be negative")
        if lora_groups < 1 or out_features % lora_groups:
            raise ValueError(f"lora_groups={lora_groups} must divide out_features={out_features}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.has_weights_merged = False
        if lora_rank == 0:
            return
        self.lora_groups = lora_groups
        self.lora_alpha, self.lora_scaling = lora_alpha, lora_alpha / lora_rank
        self.lora_dropout = nn.Dropout(lora_dropout)
        # Not a copy in the checkpoint, but it must follow the module from device to device.
        self.register_buffer("_unmerged_weight", None, persistent=False)
        adapter = {"device": device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(lora_groups * lora_rank, in_features, **adapter))
        self.lora_B = nn.Parameter(torch.empty(out_features, lora_rank, **adapter))
        self.lora_A.requires_grad = self.lora_B.requires_grad = False
        self.reset_parameters()

    def is_lora(self) -> bool:
        return hasattr(self, "lora_A")

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.is_lora():  # nn.Linear.__init__ calls this before A and B exist
            self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draw A, zero B: the update starts at nothing (paper, section 4.1)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        h = self.product(x, self.weight, self.bias)  # (..., out)
        if self.has_weights_merged or not self.is_lora():
            return h
        lora_A, lora_B = self.lora_A, self.lora_B
        if not torch.is_autocast_enabled(x.device.type):  # a bare layer of lower precision
            lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        down = self.product(self.lora_dropout(x), lora_A) * self.lora_scaling  # (..., G·r)
        pairs = zip(down.chunk(self.lora_groups, -1), lora_B.chunk(self.lora_groups), strict=True)
        ups = [self.product(part, matrix) for part, matrix in pairs]  # G of (..., out/G)
        return h + (torch.cat(ups, dim=-1) if len(ups) > 1 else ups[0])

    def train(self, mode: bool = True) -> "LoRALinear":
        super().train(mode)
        if self.is_lora():
            self._demerge() if mode else self._merge()
        return self

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the update (alpha / r) B A, (out, in), computed in at least float32."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.autocast(self.weight.device.type, enabled=False):
            lora_A = self._grouped(self.lora_A.to(dtype))  # (G, r, in)
            lora_B = self._grouped(self.lora_B.to(dtype))  # (G, out/G, r)
            return (lora_B @ lora_A).flatten(0, 1) * self.lora_scaling  # (out, in)

    def merged_weight(self) -> Tensor:
        """Return W0 + (alpha / r) B A in the dtype of W0, (out, in); the layer stays as it is."""
        return (self.unmerged_weight() + self.delta_weight()).to(self.weight.dtype)

    @torch.no_grad()
    def unmerged_weight(self) -> Tensor:
        """Return W0, (out, in), whether or not the layer is merged."""
        if not self.has_weights_merged:
            return self.weight.detach()
        if self._unmerged_weight is not None:
            return self._unmerged_weight
        return (self.weight - self.delta_weight()).to(self.weight.dtype)

    def _grouped(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, (self.lora_groups, -1))  # (G·n, m) -> (G, n, m)

    @torch.no_grad()
    def _merge(self) -> None:
        if not self.has_weights_merged:
            # Adding and subtracting would drift; the kept original comes back bit for bit.
            self._unmerged_weight = self.weight.detach().clone()
            self.weight.copy_(self.merged_weight())
            self.has_weights_merged = True

    @torch.no_grad()
    def _demerge(self) -> None:
        if self.has_weights_merged:
            self.weight.copy_(self.unmerged_weight())
            self.has_weights_merged, self._unmerged_weight = False, None

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.has_weights_merged:
            destination[prefix + "weight"] = self.unmerged_weight()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.is_lora():
            self._demerge()
        super()._load_from_state_dict(*args, **kwargs)


class ParameterCount(NamedTuple):
    """Numbers of weights; `share` is trained / total, adapters counted in both."""

    trained: int
    total: int

    @property
    def share(self) -> float:
        return self.trained / self.total


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the weights that would be trained and all weights of `model`, tied ones once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def is_lora_name(name: str) -> bool:
    """Tell whether a parameter's name ends in the leaf `lora_A` or `lora_B`."""
    return name.rpartition(".")[2] in LORA_LEAVES


def mark_only_lora_as_trainable(model: nn.Module) -> nn.Module:
    """Set `requires_grad` on exactly the `lora_A` and `lora_B` of `model`; return the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_lora_name(name)
    return model


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers of `model` that carry an adapter, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear) and module.is_lora()
    }


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of `model.state_dict()` that belong to adapters."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_lora_name(name)}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `lora_state_dict` returned; a merged layer is demerged first.

    Raises ValueError, before anything is loaded, naming every missing, unexpected and misshapen
    entry.
    """
    check_state(lora_state_dict(model), state, "adapter")
    model.load_state_dict(state, strict=False)


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError if names or shapes of `state` differ from `expected`, naming each one."""
    faults = [f"missing {name}" for name in expected if name not in state]
    faults += [f"unexpected {name}" for name in state if name not in expected]
    faults += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        raise ValueError(f"{what} does not fit the model: " + "; ".join(faults))
