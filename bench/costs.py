"""What this package costs by itself: LoRA's siblings, examples in the prompt, growth by size."""

import operator
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.settings import BenchConfig, compute_dtype, open_checkpoint, review_loader
from bench.turns import SIBLINGS, draw_reviews, take_turns
from bench.worker import SHAPES, Contender, Way, sized_reviews
from methods.bitfit import is_bias_name
from models.families import parameter_names
from runtime.device import resolve_device
from tasks.sentiment import SentimentTask

SHOTS: Mapping[str, Way] = {"0": "ours", "4": "shots4", "16": "shots16"}


def compare_methods(config: BenchConfig, folder: str) -> dict[str, dict[str, float]]:
    """Measure LoRA and its siblings: ms per review and MiB of training and scoring."""
    biased = any(map(is_bias_name, parameter_names(folder)))
    ways = ["ours", *(way for way in SIBLINGS if biased or way != "bitfit")]
    each = [Contender(way, compute_dtype(config), config.window, config.window) for way in ways]
    records = SentimentTask().read(config.dataset, "train")
    points: dict[str, dict[str, float]] = {"lora" if way == "ours" else way: {} for way in ways}
    for verb in ("train", "score"):
        ask = draw_reviews(verb, records, config.seed)
        found, _ = take_turns(each, verb, ask, folder, config)
        for point, turns in zip(points.values(), found.values(), strict=True):
            point |= {f"{verb}_ms": 1e3 * turns.seconds / config.window, f"{verb}_mib": turns.mib}
    return points


def compare_shots(config: BenchConfig, folder: str) -> dict[str, dict[str, float]]:
    """Measure scoring with examples in the prompt: ms per review, relative to none, and MiB."""
    number = 4 * config.window  # the examples are read once, whatever the number of reviews
    each = [Contender(way, compute_dtype(config), config.window, number) for way in SHOTS.values()]
    ask = draw_reviews("score", SentimentTask().read(config.dataset, "train"), config.seed)
    found = list(take_turns(each, "score", ask, folder, config)[0].values())
    rounds = [[one.seconds for one in turns.rounds] for turns in found]
    return {shots: {
        "score_ms": 1e3 * turns.seconds / number,
        "times_zero_shot": statistics.median(map(operator.truediv, own, rounds[0])),
        "score_mib": turns.mib,
    } for shots, own, turns in zip(SHOTS, rounds, found, strict=True)}


def grow(config: BenchConfig, tokens: int, number: int, folder: str) -> dict[str, float]:
    """Measure ours once: ms per review and MiB of training and scoring reviews of `tokens`."""
    records = SentimentTask().read(config.dataset, "train")
    if tokens:
        tokenizer = review_loader(config, folder).tokenizer
        records = sized_reviews(tokens, number, records, tokenizer)
    contender = Contender("ours", compute_dtype(config), number, number)
    point = {}
    for verb in ("train", "score"):
        ask = draw_reviews(verb, records, config.seed)
        turns = take_turns([contender], verb, ask, folder, config)[0][contender.name]
        point |= {f"{verb}_ms": 1e3 * turns.seconds / number, f"{verb}_mib": turns.mib}
    return point


def growth(config: BenchConfig) -> dict[str, dict[str, dict[str, float]]]:
    """Measure ours along each axis, with everything else as in `config`.

    Reviews take up to half of a sequence. Only random weights come in several sizes.
    """
    axes: dict[str, Sequence[Any]] = {
        "batch_size": (1, 4, 16, 64, 128), "review_tokens": (10, 30, 100, 250, 500),
        "lora_rank": (4, 16, 64, 128, 256, 512),
    }
    if config.model in SHAPES:
        on_cpu = resolve_device(config.device).type == "cpu"
        axes["model"] = tuple(SHAPES)[: 3 if on_cpu else None]
    found: dict[str, dict[str, dict[str, float]]] = {axis: {} for axis in axes}
    config = replace(config, rounds=min(3, config.rounds))
    with open_checkpoint(config) as folder:
        longest = review_loader(config, folder).block_size // 2
        for size in axes["batch_size"]:
            point = replace(config, batch_size=size, eval_batch_size=size)
            found["batch_size"][str(size)] = grow(point, 0, config.window, folder)
        for tokens in (tokens for tokens in axes["review_tokens"] if tokens <= longest):
            found["review_tokens"][str(tokens)] = grow(config, tokens, config.batch_size, folder)
        for rank in axes["lora_rank"]:
            point = replace(config, lora_rank=rank)
            found["lora_rank"][str(rank)] = grow(point, 0, config.batch_size, folder)
    for size in axes.get("model", ()):
        point = replace(config, model=size)
        with open_checkpoint(point) as folder:
            found["model"][size] = grow(point, 0, config.batch_size, folder)
    return found
