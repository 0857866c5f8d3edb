"""How sequences share batches: their order, their common prefix, parts of equal size, a queue."""

import random
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# New rows wait until their prompts have so many tokens: products with fewer are slow.
FEWEST_TOKENS = 128


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


def equal_parts(lengths: Sequence[int], batch_size: int) -> list[slice]:
    """Split rows of these `lengths`, shortest first, into batches of similar size.

    There are as many batches as with `batch_size` rows each, but a batch of short rows holds more
    of them: the largest batch has as few tokens as possible, padding included.
    """
    number = -(-len(lengths) // batch_size)
    tokens = bisect_left(range(len(lengths) * max(lengths, default=0)), len(lengths),
                         key=lambda size: _filled(lengths, number, size)[-1])
    return [slice(start, end) for start, end in pairwise(_filled(lengths, number, tokens))]


def _filled(lengths: Sequence[int], number: int, tokens: int) -> list[int]:
    """Return the bounds of `number` batches, each filled up to `tokens`, with padding."""
    bounds = [0]
    for later in reversed(range(number)):  # of which each needs at least one row
        start, end = bounds[-1], bounds[-1] + 1
        while end < len(lengths) - later and (end + 1 - start) * lengths[end] <= tokens:
            end += 1
        bounds.append(end)
    return bounds


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices of rows of these `lengths` in `equal_parts`, shortest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[part] for part in equal_parts([lengths[i] for i in order], batch_size)]


def pad(rows: Sequence[list[int]], value: int) -> Tensor:
    """Return `rows` as one tensor (B, T), padded on the right with `value`."""
    width = max(map(len, rows), default=0)
    padded = [row + [value] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long).view(len(rows), width)


class Step(NamedTuple):
    """A new token for each running row of a generation."""

    rows: list[int]  # their indices among the prompts; new ones stand last
    logits: Tensor  # (R, V)
    tokens: Tensor  # (R, 1), chosen from the logits


class Queue:
    """Texts that grow token by token in a batch: the longest come first.

    A text leaves after its limit of new tokens, or with a token of `ends`, and the next ones take
    its place. The batch has `tokens` for `batch_size` prompts of mean length with the largest
    limit: room for fewer long or for more short ones. A text that fills the whole `window` of the
    model waits again, to run from its last tokens. Raises ValueError for an empty prompt.
    """

    def __init__(
        self, prompts: Sequence[list[int]], limits: int | Sequence[int], batch_size: int | None,
        window: int, ends: Sequence[int],
    ) -> None:
        if not all(prompts):
            raise ValueError("each prompt needs at least one token")
        limits = [limits] * len(prompts) if isinstance(limits, int) else limits
        self.texts, self.window, self.ends = [list(row) for row in prompts], window, ends
        self.limits = [len(row) + limit for row, limit in zip(prompts, limits, strict=True)]
        self.waiting = [i for i in range(len(prompts)) if limits[i] > 0]
        self.waiting.sort(key=self.slots_of)
        self.rows: list[int] = []  # of the batch: indices of texts
        self.places = self.slots = 0  # rows of the batch, and tokens of each
        most, number = max(map(self.slots_of, self.waiting), default=0), max(1, len(prompts))
        mean = min(most, sum(map(len, prompts)) // number + max(limits, default=0))
        size = min(batch_size or number, number)
        self.tokens = max(most, size * (mean if batch_size else most))

    def slots_of(self, i: int) -> int:
        """The tokens of a text that are computed at once: all but its last."""
        return min(self.limits[i] - 1, self.window)

    def admit(self) -> list[list[int]]:
        """Return the prompts that join the batch now; their rows stand last."""
        if self.waiting and not self.rows:
            self.slots = self.slots_of(self.waiting[-1])
            self.places = self.tokens // self.slots
        first = max(0, len(self.waiting) - (self.places - len(self.rows)))
        joining = self.waiting[first:][::-1]
        prompts = [self.texts[i][-self.window :] for i in joining]
        if self.rows and first and sum(map(len, prompts)) < FEWEST_TOKENS:
            return []
        del self.waiting[first:]
        self.rows = self.rows + joining
        return prompts

    def accept(self, tokens: Sequence[int]) -> list[int]:
        """Append the next token of each row; return the places of the rows that go on."""
        going_on = []
        for place, (i, token) in enumerate(zip(self.rows, tokens, strict=True)):
            text = self.texts[i]
            text.append(token)
            if token in self.ends or len(text) == self.limits[i]:
                continue
            if len(text) > self.window:
                self.waiting.append(i)
            else:
                going_on.append(place)
        return going_on

    def reorder(self, places: Sequence[int]) -> None:
        """Leave only the rows at these `places`, in this order."""
        self.rows = [self.rows[place] for place in places]
