"""How sequences share batches: their order, their common prefix, parts of equal size."""

import random
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise


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
    """Split rows of these `lengths` into batches with about the same number of tokens.

    There are as many batches as with `batch_size` rows each, but a batch of short rows holds more
    of them: all batches need about the same memory and time.
    """
    number, total = -(-len(lengths) // batch_size), list(accumulate(lengths))
    bounds = [0]
    for i in range(1, number + 1):
        bound = bisect_left(total, i * total[-1] / number) + 1
        rest = number - i  # each later batch needs at least one row
        bounds.append(min(max(bound, bounds[-1] + 1), len(lengths) - rest))
    return [slice(start, end) for start, end in pairwise(bounds)]


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices of rows of these `lengths` in `equal_parts`, shortest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[part] for part in equal_parts([lengths[i] for i in order], batch_size)]
