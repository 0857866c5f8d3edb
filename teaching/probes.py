"""What the grader looks at in a submission: run it on given numbers and return what comes out.

A probe runs beside the submission, so it knows no right answer; `checks.py` compares. All inputs
are drawn from fixed seeds, here and in the grader alike. A probe relies on the handout's interface
alone, and where it can on one part of it, so that a mistake costs its points once.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from teaching.scripted import Script, Words

IN, OUT, RANK, ALPHA = 8, 12, 2, 6.0
SHAPE = {"block_size": 16, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 16}
IDS = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]]
# Texts of records, what the model answers to each, and the label it is judged by.
REVIEWS = (
    ("the film one", " positive", 1), ("the film two", " negative", 0),
    ("the film three", " Positive", 1), ("the film four", " positive or negative", -1),
    ("the film five", " unpositive", -1), ("the film six", " negatively", -1),
    ("the film seven", "", -1), ("the film eight", " 1", -1), ("the film nine", " NEGATIVE", 0),
)
# For the accuracy: what the model answers and the truth; two of the five are right.
SCORED = ((" positive", 1), (" negative", 0), (" film", 1), (" the film", 1), (" negative", 1))


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


def is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


@torch.no_grad()
def make_gpt(submission: Any, rank: int) -> nn.Module:
    """Return a tiny model with the drawn weights; its adapters are as they start."""
    config = submission.model.GPTConfig
    known = {field.name for field in fields(config)}
    wanted = {**SHAPE, "dropout": 0.0, "lora_rank": rank, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    model = submission.model.GPT(config(**{k: v for k, v in wanted.items() if k in known}))
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            parameter.copy_(0.3 * draw(name, *parameter.shape))
    return model


@torch.no_grad()
def fill_adapters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.copy_(draw(name, *parameter.shape))


@torch.no_grad()
def computed_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrix that each linear layer of an attention computes with, (out, in)."""
    found = {}
    for name, layer in model.named_modules():
        if ".attn." in f".{name}." and isinstance(layer, nn.Linear):
            nothing = layer(torch.zeros(1, layer.in_features))
            found[name] = (layer(torch.eye(layer.in_features)) - nothing).T
    return found


@torch.no_grad()
def attention(submission: Any) -> dict[str, Any]:
    plain, model, idx = make_gpt(submission, 0), make_gpt(submission, RANK), torch.tensor(IDS)
    fill_adapters(model)
    return {
        "plain": plain(idx)[0][:, -1].tolist(), "logits": model(idx)[0][:, -1].tolist(),
        "plain_adapters": [name for name, _ in plain.named_parameters() if is_adapter(name)],
        "adapters": [name for name, _ in model.named_parameters() if is_adapter(name)],
        "computed": {name: weight.tolist() for name, weight in computed_weights(model).items()}}


@torch.no_grad()
def qkv(submission: Any) -> dict[str, Any]:
    model = make_gpt(submission, RANK)
    before = computed_weights(model)
    fill_adapters(model)
    return {name: (weight - before[name]).tolist()
            for name, weight in computed_weights(model).items() if name.endswith("c_attn")}


def exactly_the_adapters(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_adapter(name)
    return model


@contextmanager
def patched(module: Any, **stand_ins: Callable) -> Iterator[None]:
    """Let right functions stand in for those of a module that have a test of their own."""
    own = {name: getattr(module, name) for name in stand_ins if hasattr(module, name)}
    for name in own:
        setattr(module, name, stand_ins[name])
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(module, name, function)


def friendly(submission: Any) -> dict[str, Any]:
    build, cpu = submission.build, torch.device("cpu")
    config = build.MethodConfig(lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=0.0)
    # A tiny model takes the place of the checkpoint that `build_model` loads.
    stand_ins = {
        "mark_only_lora_as_trainable": exactly_the_adapters,
        "load_base": lambda name, config: make_gpt(submission, config.lora_rank),
        "load_decoder": lambda name, **changes: make_gpt(submission, changes.get("lora_rank", 0))}
    with patched(build, **stand_ins), patched(submission.lora, **stand_ins):
        model, full = (build.build_model("", replace(config, lora_rank=rank), cpu, torch.float32)
                       for rank in (RANK, 0))
    names = [name for name, _ in model.named_parameters()]
    fill_adapters(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = submission.optimizer.OptimizerConfig()
    optimizer = submission.optimizer.configure_optimizer(model, settings, 1.0)
    idx = torch.tensor(IDS)
    model(idx, idx)[1].backward()
    optimizer.step()
    return {
        "names": names, "trained": [n for n, p in model.named_parameters() if p.requires_grad],
        "moved": [n for n, p in model.named_parameters() if not torch.equal(p, before[n])],
        "full": all(parameter.requires_grad for parameter in full.parameters())}


def make_sampler(submission: Any, answers: dict[str, str], labels: Sequence[int]) -> Any:
    """Return a sampler of a scripted model, and the records it is asked."""
    folder = Path(submission.scratch, "reviews")
    folder.mkdir(exist_ok=True)
    records = [{"text": text, "label": max(label, 0)}
               for text, label in zip(answers, labels, strict=True)]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = Words()
    loader = submission.dataloader.CustomDataLoader(
        str(folder), submission.sentiment.SentimentTask(), 400, tokenizer=words)
    return submission.generate.ModelSampler(Script(words, answers), loader), records


def labels(submission: Any) -> dict[str, Any]:
    answers = {text: answer for text, answer, _ in REVIEWS}
    sampler, records = make_sampler(submission, answers, [label for *_, label in REVIEWS])
    return {"labels": list(submission.generate.predict_labels(records, sampler))}


def garbage(submission: Any) -> dict[str, Any]:
    texts = [text for text, *_ in REVIEWS][: len(SCORED)]
    answers = dict(zip(texts, (answer for answer, _ in SCORED), strict=True))
    sampler, records = make_sampler(submission, answers, [label for _, label in SCORED])
    results = submission.generate.score(sampler, records)
    return {"accuracy": results["accuracy"], "n": results["n"]}


def prompts(submission: Any) -> dict[str, Any]:
    answers = {text: answer for text, answer, _ in REVIEWS}
    sampler, records = make_sampler(submission, answers, [label for *_, label in REVIEWS])
    loader, words = sampler.loader, sampler.loader.tokenizer
    trained = [list(loader.encode(record).prompt) for record in records]
    submission.generate.predict_labels(records, sampler)
    return {"trained": sorted(map(words.decode, trained)),
            "asked": sorted(map(words.decode, sampler.model.asked))}


def bitfit(submission: Any) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(2, 2))
    model.bias_like = nn.Parameter(torch.ones(1))
    submission.bitfit.train_biases(model)
    return {"trained": [n for n, p in model.named_parameters() if p.requires_grad]}


def bottleneck(submission: Any) -> dict[str, Any]:
    module, x = submission.bottleneck.Bottleneck(6, 3), draw("x", 4, 6)
    started = (module(x) - x).detach().abs().max()
    shapes = [sorted(map(list, (p.shape for p in module.parameters())))]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(draw(name, *parameter.shape))
    return {"started": float(started), "shapes": shapes[0], "y": module(x).tolist()}


def preference(submission: Any) -> dict[str, Any]:
    seen = {}
    for smoothing in (0.0, 0.1):
        losses, chosen, rejected = submission.dpo.preference_loss(
            draw("policy", 6), draw("reference", 6), 0.5, smoothing)
        seen[f"losses_{smoothing}"] = losses.tolist()
    return {**seen, "chosen": chosen.tolist(), "rejected": rejected.tolist()}


class Probe(NamedTuple):
    """A look at a submission: the modules it needs and the function that runs them."""

    modules: tuple[str, ...]
    run: Callable[[Any], dict[str, Any]]


SCORING = ("dataloader", "generate", "tasks.sentiment")
PROBES = {
    **{probe.__name__: Probe(("lora",), probe) for probe in (
        construction, start, forward, dropout, thin, merge, twice, cycles, trainable)},
    "attention": Probe(("model",), attention), "qkv": Probe(("model",), qkv),
    "friendly": Probe(("lora", "model", "runtime.optimizer", "methods.build"), friendly),
    **{probe.__name__: Probe(SCORING, probe) for probe in (labels, garbage, prompts)},
    "bitfit": Probe(("methods.bitfit",), bitfit),
    "bottleneck": Probe(("methods.bottleneck",), bottleneck),
    "preference": Probe(("methods.dpo",), preference),
}
