"""What the grader looks at in a submission's layer: run it on given numbers, return what comes out.

A probe runs beside the submission, so it knows no right answer; `checks.py` compares. All inputs
are drawn from fixed seeds, here and in the grader alike. A probe relies on the handout's interface
alone, and where it can on one part of it, so that a mistake costs its points once.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

IN, OUT, RANK, ALPHA = 8, 12, 2, 6.0


class Probe(NamedTuple):
    """A look at a submission: the modules it needs and the function that runs them."""

    modules: tuple[str, ...]
    run: Callable[[Any], dict[str, Any]]


def draw(seed: str, *shape: int) -> Tensor:
    """Return normal random numbers of a `shape` that depend on the seed alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.randn(shape, generator=generator)


def make_layer(submission: Any, rank: int = RANK, size: tuple[int, int] = (IN, OUT),
               **changes: Any) -> nn.Module:
    return submission.lora.LoRALinear(
        *size, **{"bias": True, "lora_rank": rank, "lora_alpha": ALPHA, **changes})


@torch.no_grad()
def fill(layer: nn.Module) -> nn.Module:
    """Give the layer the drawn weights; A and B whichever way round they stand."""
    for name in ("weight", "bias", "lora_A", "lora_B"):
        parameter = getattr(layer, name)
        if parameter is not None:
            shape = {"weight": (layer.out_features, layer.in_features),
                     "bias": (layer.out_features,), "lora_A": (RANK, layer.in_features),
                     "lora_B": (layer.out_features, RANK)}[name]
            value = draw(name, *shape)
            turned = parameter.shape != value.shape and parameter.shape == value.T.shape
            parameter.copy_(value.T if turned else value)
    return layer


def construction(submission: Any) -> dict[str, Any]:
    layer, plain = make_layer(submission, lora_dropout=0.1), make_layer(submission, rank=0)
    x = draw("x", 3, IN)
    expected = x @ plain.weight.T + plain.bias
    return {
        "linear": isinstance(layer, nn.Linear), "A": list(layer.lora_A.shape),
        "B": list(layer.lora_B.shape), "merged": layer.has_weights_merged,
        "is_lora": [bool(layer.is_lora()), bool(plain.is_lora())],
        "plain": [name for name, _ in plain.named_parameters()],
        "plain_error": float((plain(x) - expected).detach().abs().max())}


def start(submission: Any) -> dict[str, Any]:
    torch.manual_seed(7)
    layer = make_layer(submission, rank=32, size=(64, 48))
    first = layer.lora_A.detach().clone()
    seen = {"B": float(layer.lora_B.detach().abs().max()), "largest": float(first.abs().max()),
            "deviation": float(first.std())}
    with torch.no_grad():
        layer.lora_B.fill_(1.0)
    layer.reset_parameters()
    return {**seen, "B_again": float(layer.lora_B.detach().abs().max()),
            "A_again": float((layer.lora_A.detach() - first).abs().max())}


def forward(submission: Any) -> dict[str, Any]:
    with_bias, without = fill(make_layer(submission)), fill(make_layer(submission, bias=False))
    return {"y": with_bias(draw("x", 5, IN)).tolist(),
            "y3": with_bias(draw("x3", 2, 3, IN)).tolist(),
            "unbiased": without(draw("x", 5, IN)).tolist()}


def dropout(submission: Any) -> dict[str, Any]:
    """The layer is (4·sum of x) on all outputs, so that a dropped feature shows in the output."""
    torch.manual_seed(7)
    layer = make_layer(submission, rank=1, lora_alpha=1.0, lora_dropout=0.5)
    with torch.no_grad():
        for name, value in (("weight", 0.0), ("bias", 0.0), ("lora_A", 1.0), ("lora_B", 0.0)):
            getattr(layer, name).fill_(value)
        layer.weight.copy_(draw("weight", OUT, IN))
        base = layer(draw("x", 64, IN))
        layer.weight.zero_()
        layer.lora_B.fill_(1.0)
        sums = layer(torch.ones(64, IN))  # twice the number of kept features, the same in a row
        layer.eval()
        calm = layer(torch.ones(64, IN))
    return {"base": base.tolist(), "sums": sums.tolist(), "calm": calm.tolist()}


class LargestResult(TorchDispatchMode):
    """Keep the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


def warm_up() -> None:
    """Let torch import what the probes will need, once for all submissions."""
    layer = nn.Linear(2, 2)
    with LargestResult():
        layer(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def thin(submission: Any) -> dict[str, Any]:
    layer = make_layer(submission, size=(30, 60))
    with LargestResult() as largest:
        layer(torch.ones(2, 30))
    return {"largest": largest.numel}


@torch.no_grad()
def merge(submission: Any) -> dict[str, Any]:
    layer, x = fill(make_layer(submission)), draw("x", 5, IN)
    model = nn.Sequential(nn.Sequential(layer), nn.Identity())
    computed = (layer(torch.eye(IN)) - layer(torch.zeros(1, IN))).T  # as forward multiplies
    seen: dict[str, Any] = {"computed": computed.tolist(), "y_before": model(x).tolist()}
    model.eval()
    seen |= {"merged": layer.has_weights_merged, "weight": layer.weight.tolist(),
             "y": model(x).tolist()}
    model.train()
    return {**seen, "demerged": not layer.has_weights_merged, "restored": layer.weight.tolist(),
            "y_again": model(x).tolist(),
            "returned": [layer.train() is layer, layer.eval() is layer, model.eval() is model]}


def twice(submission: Any) -> dict[str, Any]:
    layer = fill(make_layer(submission))
    seen = {}
    for name, mode in (("eval", False), ("train", True)):
        for number in (1, 2):
            layer.train(mode)
            seen[f"{name}{number}"] = layer.weight.tolist()
    return seen


def cycles(submission: Any) -> dict[str, Any]:
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = fill(make_layer(submission, dtype=dtype))
        before = layer.weight.detach().clone()
        for _ in range(16):
            layer.eval()
            layer.train()
        errors[str(dtype)] = float((layer.weight.detach() - before).abs().max())
    return errors


class Decoys(nn.Module):
    """A module whose parameters have adapters' names, or names that only hold one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.lora_A, self.inner.lora_B = (nn.Parameter(torch.ones(1)) for _ in range(2))
        self.lora_A_projector, self.lora_embedding = nn.Linear(2, 2), nn.Embedding(2, 2)
        self.not_lora_B = nn.Parameter(torch.ones(1))


def trainable(submission: Any) -> dict[str, Any]:
    seen = {}
    for before in (True, False):
        model = Decoys().requires_grad_(before)
        submission.lora.mark_only_lora_as_trainable(model)
        seen[f"from_{before}"] = [n for n, p in model.named_parameters() if p.requires_grad]
    return seen


LAYER_PROBES = {probe.__name__: Probe(("lora",), probe) for probe in (
    construction, start, forward, dropout, thin, merge, twice, cycles, trainable)}
