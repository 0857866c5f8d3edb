"""Prompts and answers as batches of supervised tokens, behind the prefix that they share."""

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # target of a position without supervision: PyTorch's own default


class Example(NamedTuple):
    """Token ids of one prompt and of its answer, which ends with end-of-text."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Batch:
    """Sequences of one shared prefix: `prefix` (1, P), and what follows it, padded on the right.

    `inputs` and `targets` are (B, T); a target is the token after its input, or -100.
    """

    prefix: Tensor
    inputs: Tensor
    targets: Tensor

    @property
    def supervised_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in (self.prefix, self.inputs, self.targets)))


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """Return the permutation of `range(size)` in which an epoch visits its examples."""
    return random.Random(f"order {seed} {epoch}").sample(range(size), size)


def common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Return the longest prefix of all `prompts` that leaves each at least one token."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    differ = (i for i in range(limit) if first[i] != last[i])
    return first[: next(differ, limit)]


def make_batches(
    examples: Sequence[Example], prefix: list[int], batch_size: int
) -> list[Batch]:
    """Return batches of examples of similar length, shortest first, cut by `equal_parts`."""
    by_length = sorted(examples, key=lambda example: len(example.prompt) + len(example.answer))
    lengths = [len(e.prompt) + len(e.answer) - len(prefix) for e in by_length]
    return [collate(by_length[part], prefix) for part in equal_parts(lengths, batch_size)]


def equal_parts(lengths: Sequence[int], batch_size: int) -> list[slice]:
    """Cut rows of these `lengths` into batches of about equally many tokens.

    There are as many as if each took `batch_size` rows, so that many short rows go with few long
    ones: no batch needs much more memory or time than another.
    """
    number, total = -(-len(lengths) // batch_size), list(accumulate(lengths))
    bounds = [0]
    for i in range(1, number + 1):
        bound = bisect_left(total, i * total[-1] / number) + 1
        rest = number - i  # of the batches after this one, which take a row each at least
        bounds.append(min(max(bound, bounds[-1] + 1), len(lengths) - rest))
    return [slice(start, end) for start, end in pairwise(bounds)]


def collate(examples: Sequence[Example], prefix: list[int]) -> Batch:
    """Drop the shared `prefix`, pad on the right, and shift: position t is asked for token t+1."""
    start = len(prefix)
    inputs, targets = [], []
    for prompt, answer in examples:
        inputs.append((prompt + answer)[start:-1])
        targets.append([IGNORE] * (len(prompt) - start - 1) + answer)
    shared = torch.tensor([prefix], dtype=torch.long)  # (1, P), of P = 0 too
    return Batch(shared, pad(inputs, value=0), pad(targets, IGNORE))


def pad(rows: Sequence[list[int]], value: int) -> Tensor:
    """Return `rows` as one tensor (B, T), filled on the right with `value`."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
