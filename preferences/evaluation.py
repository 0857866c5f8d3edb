"""What a policy is worth: rewards of its samples, and their distance from the reference model."""

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from generate import Subject
from preferences.pairs import Reward, Row, read_rows, reward_rows, sample_seed, write_rows
from preferences.sampling import distances, draw_samples


class Point(NamedTuple):
    """A policy in the figure: means over its samples, with the standard errors of those two."""

    kl: float  # KL(π‖π_ref) of a whole sample, in nats
    kl_error: float
    reward: float
    reward_error: float
    held_out: float | None  # mean reward of the model that ranked no pair
    perplexity: float  # of the samples under the reference model
    tokens: float
    ended: float  # share


def evaluate(
    policy: Subject, reference: Subject, prompts: Sequence[str], tokens: int, batch_size: int,
    seed: int, reward: Reward, held_out: Reward | None, path: Path,
) -> list[Row]:
    """Return a sample of each held-out prompt, measured and rewarded; the file `path` keeps them.

    All policies draw with the same seed.
    """
    if not path.is_file():
        samples = draw_samples(policy, prompts, tokens, batch_size,
                               sample_seed(seed, "evaluation"), "held-out samples")
        rows = reward_rows(samples, reward)
        for row, distance in zip(rows, distances(policy, reference, samples), strict=True):
            row |= distance._asdict()
        add_held_out(rows, held_out)
        write_rows(path, rows)
    return read_rows(path, prompts)


def add_held_out(rows: Sequence[Row], held_out: Reward | None) -> None:
    if held_out:
        rewards = held_out([row["prompt"] + row["text"] for row in rows])
        for row, value in zip(rows, rewards, strict=True):
            row["held_out"] = value


def judge_draws(drawn: list[Row], held_out: Reward | None, path: Path) -> list[Row]:
    """Return the base's samples with their held-out rewards, which the file `path` keeps."""
    if not held_out:
        return drawn
    if not path.is_file():
        add_held_out(drawn, held_out)
        write_rows(path, drawn)
    return read_rows(path, [row["prompt"] for row in drawn])


def point(rows: Sequence[Row]) -> Point:
    rewards, divergences = ([row[name] for row in rows] for name in ("reward", "kl"))
    known = "held_out" in rows[0]
    return Point(
        statistics.mean(divergences), standard_error(divergences),
        statistics.mean(rewards), standard_error(rewards),
        statistics.mean(row["held_out"] for row in rows) if known else None,
        perplexity(rows), statistics.mean(row["tokens"] for row in rows),
        statistics.mean(row["ended"] for row in rows))


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def perplexity(rows: Sequence[Row]) -> float:
    """Return that of the samples under the reference model, over all their tokens."""
    nats = sum(row["reference_nats"] for row in rows) / sum(row["tokens"] for row in rows)
    return math.exp(min(nats, 700.0))


def best_of(rows: Sequence[Row], n: int) -> list[Row]:
    """Return, for each prompt, what the best of `n` of its samples is worth on average.

    With the N samples in order of their reward, the i-th is the best of n drawn without replacement
    with probability C(i − 1, n − 1) / C(N, n).
    """
    found = []
    for prompt, group in groupby(rows, key=lambda row: row["prompt"]):
        ordered = sorted(group, key=lambda row: row["reward"])
        ways = [math.comb(i, n - 1) for i in range(len(ordered))]
        total = math.comb(len(ordered), n)
        found.append({"prompt": prompt} | {
            name: sum(way * row[name] for way, row in zip(ways, ordered, strict=True)) / total
            for name in ("reward", "held_out") if name in ordered[0]})
    return found


def best_of_kl(n: int) -> float:
    """Return the usual figure for best-of-n, an upper bound of KL(π‖π_ref), in nats."""
    return math.log(n) - (n - 1) / n
