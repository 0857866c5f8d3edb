"""LoRA, low-rank adaptation of linear layers (Hu et al. 2021, arXiv:2106.09685), on torch alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """Add a rank-r update to a frozen linear layer: `h = W0 x + b + scaling · B A x`.

    `scaling` is alpha / r, or alpha / √r if rank-stabilized (Kalajdzievski 2023, arXiv:2312.03732).
    `lora_groups=G` gives G equal blocks of output features (q, k, v) a pair of rank r each:
    `lora_A` is (G·r, in), `lora_B` (out, r), at least float32 and frozen at first. `eval()` merges
    the update into the weight; `train()` restores W0 bit for bit. With rank 0 this is a plain
    `nn.Linear`. Shapes: `(..., in)` to `(..., out)`. Raises ValueError for a bad rank or groups.
    """

    product = staticmethod(F.linear)  # a subclass may have a faster equivalent
    _times_off = 0  # how many `adapters_off` blocks are open

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        lora_rank: int = 0, lora_alpha: float = 0.0, lora_dropout: float = 0.0,
        lora_groups: int = 1, lora_rank_stabilized: bool = False,
    ) -> None:
        if not isinstance(lora_rank, Integral) or isinstance(lora_rank, bool) or lora_rank < 0:
            raise ValueError(f"lora_rank={lora_rank!r} must be a whole number of 0 or more")
        if lora_groups < 1 or out_features % lora_groups:
            raise ValueError(f"lora_groups={lora_groups} must divide out_features={out_features}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.has_weights_merged = False
        if lora_rank == 0:
            return
        self.lora_groups, self.lora_alpha = lora_groups, lora_alpha
        self.lora_rank_stabilized = lora_rank_stabilized
        self.lora_scaling = lora_alpha / (lora_rank**0.5 if lora_rank_stabilized else lora_rank)
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.register_buffer("_unmerged_weight", None, persistent=False)  # moves with the layer
        like = {"device": device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(lora_groups * lora_rank, in_features, **like), False)
        self.lora_B = nn.Parameter(torch.empty(out_features, lora_rank, **like), False)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0,
        lora_groups: int = 1, rank_stabilized: bool = False,
    ) -> "LoRALinear":
        """Return an adapted layer around the weight and bias objects of `linear`.

        Keeps device, dtype and mode (unmerged even in eval mode), but not hooks; draws only A.
        Raises TypeError or ValueError if `linear` cannot carry an adapter, or carries one.
        """
        forward = getattr(getattr(linear, "forward", None), "__func__", None)
        if forward not in (nn.Linear.forward, LoRALinear.forward):  # a quantized layer, for example
            raise TypeError(f"{type(linear).__name__} does not compute as nn.Linear does")
        if {"weight", "bias"} - linear._parameters.keys() or nn.parameter.is_lazy(linear.weight):
            raise TypeError("its weight or bias is no plain parameter (weight_norm, prune, lazy)")
        if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError("nn.MultiheadAttention uses its out_proj without calling it")
        if isinstance(linear, LoRALinear) and linear.is_lora():
            raise ValueError("the layer already has an adapter")
        if lora_rank == 0:
            raise ValueError("lora_rank=0 must be at least 1")
        layer = cls(  # on "meta" it allocates and draws nothing
            linear.in_features, linear.out_features, linear.bias is not None, "meta",
            linear.weight.dtype, lora_rank, lora_alpha, lora_dropout, lora_groups, rank_stabilized)
        layer.weight = layer.bias = None  # leaves only A and B to `to_empty`
        layer.to_empty(device=linear.weight.device).reset_lora_parameters()
        layer.weight, layer.bias = linear.weight, linear.bias
        super(LoRALinear, layer).train(linear.training)  # LoRALinear.train would merge
        return layer

    def is_lora(self) -> bool:
        return hasattr(self, "lora_A")

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.is_lora():  # nn.Linear.__init__ calls this before A and B exist
            self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draw A and zero B, so that the update starts at zero (paper, section 4.1)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        h = self.product(x, self.weight, self.bias)  # (..., in) x (in, out) -> (..., out)
        if self.has_weights_merged or self._times_off or not self.is_lora():
            return h
        dtype = self.lora_A.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
        lora_A, lora_B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        down = self.dropped_product(x, lora_A) * self.lora_scaling  # (..., G·r)
        pairs = zip(down.chunk(self.lora_groups, -1), lora_B.chunk(self.lora_groups), strict=True)
        ups = [self.product(part, matrix) for part, matrix in pairs]  # G of (..., out/G)
        return h + (torch.cat(ups, dim=-1) if len(ups) > 1 else ups[0])

    def dropped_product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product(self.lora_dropout(x), weight)

    def train(self, mode: bool = True) -> "LoRALinear":
        super().train(mode)
        self._demerge() if mode else self._merge()
        return self

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the update scaling · B A, (out, in), computed in at least float32."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.autocast(self.weight.device.type, enabled=False):
            lora_A = self.lora_A.to(dtype).unflatten(0, (self.lora_groups, -1))  # (G, r, in)
            lora_B = self.lora_B.to(dtype).unflatten(0, (self.lora_groups, -1))  # (G, out/G, r)
            return (lora_B @ lora_A).flatten(0, 1) * self.lora_scaling  # (out, in)

    def merged_weight(self) -> Tensor:
        """Return W0 + scaling · B A, (out, in), in W0's dtype; leave the layer unchanged."""
        return (self.unmerged_weight() + self.delta_weight()).to(self.weight.dtype)

    @torch.no_grad()
    def unmerged_weight(self) -> Tensor:
        """Return W0, (out, in), of a merged or unmerged layer."""
        if self.has_weights_merged and self._unmerged_weight is None:  # the flag was set by hand
            return (self.weight - self.delta_weight()).to(self.weight.dtype)
        return self._unmerged_weight if self.has_weights_merged else self.weight.detach()

    @torch.no_grad()
    def _merge(self) -> None:
        if self.is_lora() and not self.has_weights_merged and not self._times_off:
            self._unmerged_weight, self.has_weights_merged = self.weight.detach().clone(), True
            self.weight.copy_(self.merged_weight())  # subtracting it again would round: W0 is kept

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
        self._demerge()
        super()._load_from_state_dict(*args, **kwargs)
        self.train(self.training)  # a layer in eval mode merges what it loaded


def adapt(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0,
    groups: int = 1, rank_stabilized: bool = False,
) -> nn.Module:
    """Put adapters on the targeted layers of `model` in place, freeze all else, return `model`.

    A target is a leaf name ("q_proj") or a dotted suffix ("attn.c_proj"). Raises ValueError or
    TypeError, before anything changes, if it matches nothing or a layer that cannot be adapted.
    """
    modules = dict(model.named_modules(remove_duplicate=False))  # a shared layer by all its names
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    adapted: dict[nn.Module, LoRALinear] = {}
    for target in [targets] if isinstance(targets, str) else [*targets] or [""]:
        names = [name for name in modules if name and f".{name}".endswith(f".{target}")]
        if not names or not linears.keys() >= set(names):
            kinds = sorted({type(modules[name]).__name__ for name in names}) or "nothing"
            leaves = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(f"target {target!r} matches {kinds}; nn.Linear layers are {leaves}")
        for name, linear in [(name, linears[name]) for name in names]:
            cls = type(linear) if isinstance(linear, LoRALinear) else LoRALinear
            try:
                adapted[linear] = adapted.get(linear) or cls.from_linear(
                    linear, rank, alpha, dropout, groups, rank_stabilized)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
            if sum(p is linear.weight for m in model.modules() for p in m.parameters(False)) > 1:
                raise ValueError(f"target {target!r} has a tied weight; merging would change both")
    for name, module in modules.items():
        if module in adapted:
            model.set_submodule(name, adapted[module])
    return mark_only_lora_as_trainable(model)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute the base model, bit for bit, within a `with` block; blocks nest and keep the mode."""
    before = [(m, m.has_weights_merged or m.training) for m in lora_layers(model).values()]
    for layer, _ in before:
        layer._demerge()  # and merge again afterwards: no copy of the weight is needed
        layer._times_off += 1
    try:
        yield
    finally:
        for layer, may_merge in before:
            layer._times_off -= 1
            if may_merge and not layer.training:
                layer._merge()


class ParameterCount(NamedTuple):
    """Numbers of weights; `share` is trained / total, and total includes the adapters."""

    trained: int
    total: int

    @property
    def share(self) -> float:
        return self.trained / self.total


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the trainable weights and all weights of `model`, tied ones once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def is_lora_name(name: str) -> bool:
    """Tell whether the last component of a parameter's name is `lora_A` or `lora_B`."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


def mark_only_lora_as_trainable(model: nn.Module) -> nn.Module:
    """Set `requires_grad` on exactly the `lora_A` and `lora_B` of `model`; return the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_lora_name(name)
    return model


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers of `model` that carry an adapter, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear) and m.is_lora()}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of `model.state_dict()` that belong to adapters."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_lora_name(name)}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `lora_state_dict` returned; layers in eval mode merge it.

    Raises ValueError, before anything is loaded, if entries are missing, unexpected or misshapen.
    """
    check_state(lora_state_dict(model), state, "adapter")
    model.load_state_dict(state, strict=False)


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError if names or shapes of `state` differ from `expected`, naming each one."""
    faults = [f"missing {name}" for name in expected if name not in state]
    faults += [f"unexpected {name}" for name in state if name not in expected]
    faults += [f"{name} is {tuple(state[name].shape)}, not {tuple(t.shape)}"
               for name, t in expected.items() if name in state and state[name].shape != t.shape]
    if faults:
        raise ValueError(f"{what} does not fit the model: " + "; ".join(faults))
