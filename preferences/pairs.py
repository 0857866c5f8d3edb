"""Pairs of continuations, ranked by a reward model: the data set that DPO trains on."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checkpoints.files import atomic_write
from generate import Subject
from preferences.sampling import Sample, draw_samples

CHUNK = 128  # prompts whose samples share a file; a run that was stopped keeps whole ones
Row = dict[str, Any]
Reward = Callable[[Sequence[str]], list[float]]


def sample_seed(*parts: object) -> int:
    """Return a seed for torch that depends on all `parts`."""
    return random.Random(" ".join(map(str, parts))).getrandbits(62)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def read_rows(path: Path, prompts: Sequence[str]) -> list[Row]:
    """Return the rows that `write_rows` wrote for `prompts`.

    Raises ValueError if the file is damaged, or holds samples of other prompts.
    """
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if [row["prompt"] for row in rows] != list(prompts):
            raise ValueError("it holds samples of other prompts")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and repeat the command") from None
    return rows


def rewarded_samples(
    policy: Subject, reward: Reward, prompts: Sequence[str], each: int, tokens: int,
    batch_size: int, seed: int, folder: Path, split: str,
) -> list[Row]:
    """Return `each` samples of every prompt with their rewards; files in `folder` keep them.

    A row has `prompt`, `text`, `ended`, `canonical`, `tokens` and `reward`.
    """
    rows = []
    starts = range(0, len(prompts), CHUNK)
    for start in tqdm(starts, f"{split} samples", unit="file", leave=False):
        path = folder / f"{split}-{start // CHUNK:04d}.jsonl"
        repeated = [prompt for prompt in prompts[start : start + CHUNK] for _ in range(each)]
        if not path.is_file():
            drawn = draw_samples(
                policy, repeated, tokens, batch_size, sample_seed(seed, split, start))
            write_rows(path, reward_rows(drawn, reward))
        rows += read_rows(path, repeated)
    return rows


def reward_rows(samples: Sequence[Sample], reward: Reward) -> list[Row]:
    rewards = reward([sample.prompt + sample.text for sample in samples])
    return [{"prompt": sample.prompt, "text": sample.text, "ended": sample.ended,
             "canonical": sample.canonical, "tokens": len(sample.ids), "reward": value}
            for sample, value in zip(samples, rewards, strict=True)]


def rank(rows: Sequence[Row]) -> list[Row]:
    """Return all pairs of samples of a prompt whose rewards differ, the better one as chosen.

    A sample is left out if its text has other tokens than were drawn: its likelihood would be
    another's.
    """
    pairs = []
    rows = [row for row in rows if row["canonical"]]
    for prompt, group in groupby(rows, key=lambda row: row["prompt"]):
        for one, other in combinations(group, 2):
            if one["reward"] == other["reward"]:
                continue
            chosen, rejected = sorted((one, other), key=lambda row: -row["reward"])
            if not all(row["text"] or row["ended"] for row in (one, other)):
                continue  # it would have no token to learn from
            pairs.append({
                "prompt": prompt, "chosen": chosen["text"], "rejected": rejected["text"],
                "chosen_ended": chosen["ended"], "rejected_ended": rejected["ended"],
                "chosen_reward": chosen["reward"], "rejected_reward": rejected["reward"]})
    return pairs
