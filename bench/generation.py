"""Long answers: tokens per second and memory, beside `transformers`."""

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.comparisons import add_ratios
from bench.generators import Prompts
from bench.settings import BenchConfig, compute_dtype, review_loader
from bench.turns import Ask, Turns, take_turns
from bench.worker import Contender
from models.families import load_config
from tasks.sentiment import SentimentTask

RIVAL = "transformers"
WARM_UP = 4  # tokens of an answer in the warm-up: enough to reach every product


def answer_limits(config: BenchConfig) -> Mapping[str, list[int]]:
    """Return the tokens of each answer in each setting: one alone, a batch, a queue of mixed ones.

    The mixed limits are evenly spread over the whole range, in random order unless `sort_answers`.
    """
    longest, number = config.new_tokens, config.prompts
    fewest = min(config.fewest_new_tokens, longest)
    mixed = [fewest + i * (longest - fewest) // max(1, number - 1) for i in range(number)]
    random.Random(config.seed).shuffle(mixed)
    if config.sort_answers:
        mixed.sort(reverse=True)
    return {"generate_single": [longest], "generate": [longest] * config.generate_batch_size,
            "generate_mixed": mixed}


def draw_prompts(config: BenchConfig, folder: str, limits: Sequence[int]) -> Ask:
    """Return what draws, for each turn, prompts for all contenders, out of the reviews.

    Raises ValueError if the reviews have too few tokens for a prompt.
    """
    records = SentimentTask().read(config.dataset, "train")
    text = " ".join(record["text"] for record in records)
    tokens = review_loader(config, folder).tokenizer.encode_ordinary(text)
    if len(tokens) <= config.prompt_tokens:
        raise ValueError(f"prompt_tokens={config.prompt_tokens}, but dataset={config.dataset!r} "
                         f"has {len(tokens)}")

    def ask(contender: Contender, turn: int) -> Prompts:
        rng = random.Random(f"{config.seed} {turn}")
        starts = [rng.randrange(len(tokens) - config.prompt_tokens) for _ in limits]
        rows = [tokens[start : start + config.prompt_tokens] for start in starts]
        turn_limits = [min(limit, WARM_UP) for limit in limits] if turn == 0 else list(limits)
        return Prompts(rows, turn_limits, min(len(rows), config.generate_batch_size))

    return ask


def check_lengths(config: BenchConfig, folder: str) -> None:
    """Raise ValueError if prompt and answer are longer than the model's sequences."""
    longest, limit = config.prompt_tokens + config.new_tokens, load_config(folder).block_size
    if longest > limit:
        raise ValueError(f"prompt_tokens={config.prompt_tokens} and new_tokens="
                         f"{config.new_tokens} exceed the model's {limit} tokens")


def equal_share(answers: Turns, others: Turns) -> float:
    """Return the share of the tokens that are the same as those of another contender."""
    pairs = [pair for ours, theirs in zip(answers.rounds, others.rounds, strict=True)
             for own, other in zip(ours.result, theirs.result, strict=True)
             for pair in zip(own, other, strict=True)]
    return statistics.mean(own == other for own, other in pairs)


def compare_generation(config: BenchConfig, folder: str) -> dict[str, Any]:
    """Measure ours in float32 and in the chosen dtype, and `transformers`, in each setting."""
    check_lengths(config, folder)
    precisions = dict.fromkeys(("float32", compute_dtype(config)))
    each = [*(Contender("generator", dtype) for dtype in precisions),
            Contender("transformers", "float32")]
    names = {one.name: one.name.replace("generator", "ours") for one in each}
    report: dict[str, Any] = {
        "generation": {name: {} for name in names.values()},
        "ratios": {}, "spreads": {}, "memory_ratios": {}}
    for setting, limits in answer_limits(config).items():
        ask = draw_prompts(config, folder, limits)
        found, _ = take_turns(each, "generate", ask, folder, config)
        turns = {name: found[own] for own, name in names.items()}
        speeds = {name: [sum(map(len, one.result)) / one.seconds for one in own.rounds]
                  for name, own in turns.items()}
        for name, row in report["generation"].items():
            row |= {f"{setting}_tokens_per_second": statistics.median(speeds[name]),
                    f"{setting}_memory_mib": turns[name].mib,
                    f"{setting}_seconds_to_first": turns[name].first.age,
                    f"{setting}_equal_tokens": equal_share(turns[name], turns[f"{RIVAL}.float32"])}
        memory = {name: own.mib for name, own in turns.items()}
        add_ratios(report, setting, RIVAL, speeds, memory)
    return report
