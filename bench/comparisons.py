"""Training and scoring beside the rivals."""

import statistics
from collections.abc import Sequence
from typing import Any

from bench.flops import useful_flops
from bench.settings import BenchConfig, compute_dtype, review_loader
from bench.turns import draw_reviews, take_turns
from bench.worker import Contender
from models.families import load_config
from runtime.device import resolve_device
from tasks.sentiment import SentimentTask
from tasks.sources import Record

RIVALS = ("handout", "peft")


def contenders(config: BenchConfig) -> list[Contender]:
    """Return ours in float32 and in the chosen dtype, and the rivals; slow ones get few reviews."""
    window = config.window
    ours = [Contender("ours", dtype, window, window)
            for dtype in dict.fromkeys(("float32", compute_dtype(config)))]
    if resolve_device(config.device).type != "cpu":
        return ours + [Contender(way, "float32", window, window) for way in ("full", *RIVALS)]
    return [*ours, Contender("full", "float32", 32, 32), Contender("handout", "float32", 8, 4),
            Contender("peft", "float32", 8, 16)]


def mean_tokens(
    config: BenchConfig, folder: str, records: Sequence[Record]
) -> tuple[float, float]:
    """Return the mean tokens of a review after the prefix, and its share of the window's prefix."""
    loader = review_loader(config, folder)
    prompts = [loader.encode_prompt(record) for record in records]
    prefix = len(loader.prefix(prompts))
    return statistics.mean(map(len, prompts)) - prefix, prefix / config.window


def compare(config: BenchConfig, folder: str, verbs: Sequence[str]) -> dict[str, Any]:
    """Measure all contenders; return their speed and memory, and our ratios to the rivals."""
    records = SentimentTask().read(config.dataset, "train")
    own, prefix = mean_tokens(config, folder, records)
    rivals, shape = contenders(config), load_config(folder)
    report: dict[str, Any] = {
        "contenders": {rival.name: {} for rival in rivals}, "ratios": {}, "spreads": {},
        "memory_ratios": {}, "peaks": {}}
    for verb in verbs:
        ask = draw_reviews(verb, records, config.seed)
        found, peaks = take_turns(rivals, verb, ask, folder, config, details=True)
        report["peaks"][verb] = peaks
        speeds = {}
        for rival in rivals:
            turns, row = found[rival.name], report["contenders"][rival.name]
            speeds[rival.name] = [getattr(rival, verb) / one.seconds for one in turns.rounds]
            speed = statistics.median(speeds[rival.name])
            rank = 0 if rival.way == "full" else config.lora_rank
            rate = speed * useful_flops(shape, own, prefix, rank, verb)
            row |= {
                f"{verb}_reviews_per_second": speed, f"{verb}_gflops": rate / 1e9,
                f"{verb}_share_of_plain_peak": rate / peaks[rival.dtype]["plain"],
                f"{verb}_share_of_best_peak": rate / peaks[rival.dtype]["best"],
                f"{verb}_memory_mib": turns.mib, f"{verb}_seconds_to_first": turns.first.age,
            }
            row.setdefault("checkpoint_bytes", turns.saved)
        memory = {name: turns.mib for name, turns in found.items()}
        for rival in RIVALS:
            add_ratios(report, verb, rival, speeds, memory)
    return report


def add_ratios(
    report: dict[str, Any], verb: str, rival: str, speeds: dict[str, list[float]],
    memory: dict[str, float],
) -> None:
    """Add to `report` our speed and memory, in each precision, relative to those of `rival`."""
    for name in (name for name in speeds if name.startswith("ours.")):
        key = f"{verb}.{rival}.{name.removeprefix('ours.')}"
        rounds = zip(speeds[name], speeds[f"{rival}.float32"], strict=True)
        ahead = [ours / theirs for ours, theirs in rounds]
        report["ratios"][key] = statistics.median(ahead)
        report["spreads"][key] = min(ahead), max(ahead)
        report["memory_ratios"][key] = memory[name] / memory[f"{rival}.float32"]
