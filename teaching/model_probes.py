"""What the grader looks at beyond the layer: the model, its training, its answers, other methods.

`layer_probes.py` says what a probe may know.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teaching.layer_probes import ALPHA, LAYER_PROBES, RANK, Probe, draw
from teaching.stand_ins import Script, StandIn, Words

SHAPE = {"block_size": 16, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 16}
IDS = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]]
PREFIX, TOKENS = (4, 2, 8), 3  # a learned prefix: keys and values of two layers, heads, features
# Texts of records, what the model answers to each, and the label it is judged by.
REVIEWS = (
    ("the film one", " positive", 1), ("the film two", " negative", 0),
    ("the film three", " Positive", 1), ("the film four", " positive or negative", -1),
    ("the film five", " unpositive", -1), ("the film six", " negatively", -1),
    ("the film seven", "", -1), ("the film eight", " 1", -1), ("the film nine", " NEGATIVE", 0),
)
# For the accuracy: what the model answers and the truth; two of the five are right.
SCORED = ((" positive", 1), (" negative", 0), (" film", 1), (" the film", 1), (" negative", 1))


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
        "load_base": lambda name, config, *_: make_gpt(submission, config.lora_rank),
        "load_decoder": lambda name, *_, **changes: make_gpt(
            submission, changes.get("lora_rank", 0))}
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
    return {"trained": trained_names(model)}


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def bottleneck(submission: Any) -> dict[str, Any]:
    module, x = submission.bottleneck.Bottleneck(6, 3), draw("x", 4, 6)
    started = (module(x) - x).abs().max()
    shapes = sorted(list(parameter.shape) for parameter in module.parameters())
    for name, parameter in module.named_parameters():
        parameter.copy_(draw(name, *parameter.shape))
    model = StandIn(submission.model.GPTConfig(**{**SHAPE, "n_embd": 6}), table(), PREFIX)
    submission.bottleneck.add_bottlenecks(model, 3)
    for name, parameter in model.named_parameters():
        if "bottleneck" in name:
            parameter.copy_(draw(".".join(name.split(".")[-2:]), *parameter.shape))
    ends = [end for block in model.h for end in (block.attn.resid_dropout, block.mlp.dropout)]
    return {"started": float(started), "shapes": shapes, "y": module(x).tolist(),
            "trained": trained_names(model), "ends": [end(x).tolist() for end in ends]}


@torch.no_grad()
def prefix(submission: Any) -> dict[str, Any]:
    tuning, start = submission.prefix_tuning, draw("prefix", TOKENS, math.prod(PREFIX))
    plain, network = (tuning.LearnedPrefix(start, PREFIX, inner) for inner in (0, 5))
    model = StandIn(submission.model.GPTConfig(**SHAPE), table(), PREFIX)
    tuning.add_prefix(model, TOKENS)
    return {"plain": as_lists(plain()), "network": as_lists(network()),
            "flat": network.flat().tolist(), "start": as_lists(model.learned_prefix()),
            "asked": model.asked, "trained": trained_names(model),
            "counted": model.config.prefix_tokens}


def table() -> Tensor:
    """The numbers of a prefix that the stand-in's model computes for each token."""
    return draw("table", SHAPE["vocab_size"], math.prod(PREFIX))


def as_lists(pairs: Sequence[Sequence[Tensor]]) -> list[list[list]]:
    return [[tensor.tolist() for tensor in pair] for pair in pairs]


def preference(submission: Any) -> dict[str, Any]:
    seen = {}
    for smoothing in (0.0, 0.1):
        losses, chosen, rejected = submission.dpo.preference_loss(
            draw("policy", 6), draw("reference", 6), 0.5, smoothing)
        seen[f"losses_{smoothing}"] = losses.tolist()
    config = submission.dpo.PreferenceConfig(beta=0.5, label_smoothing=0.1)
    logged = submission.dpo.measure(draw("policy", 6), draw("reference", 6), config)
    return {**seen, "chosen": chosen.tolist(), "rejected": rejected.tolist(),
            "logged": {name: float(value) for name, value in logged._asdict().items()}}


SCORING = ("dataloader", "generate", "tasks.sentiment")
PROBES = {
    **LAYER_PROBES,
    "attention": Probe(("model",), attention), "qkv": Probe(("model",), qkv),
    "friendly": Probe(("lora", "model", "runtime.optimizer", "methods.build"), friendly),
    **{probe.__name__: Probe(SCORING, probe) for probe in (labels, garbage, prompts)},
    "bitfit": Probe(("methods.bitfit",), bitfit),
    "bottleneck": Probe(("model", "methods.bottleneck"), bottleneck),
    "prefix": Probe(("model", "methods.prefix_tuning"), prefix),
    "preference": Probe(("methods.dpo",), preference),
}
