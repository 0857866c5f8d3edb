"""Batches share the longest prefix and hold equally many tokens."""

import math
import random
from itertools import combinations, pairwise

import pytest

from runtime.batching import common_prefix, equal_parts


@pytest.mark.parametrize(
    ("prompts", "prefix"),
    [
        ([[1, 2, 3], [1, 2, 4]], [1, 2]), ([[1, 2, 3], [1, 2, 3]], [1, 2]), ([[1, 2, 3]], [1, 2]),
        ([[1, 2], [1, 2, 3]], [1]), ([[1, 2], [3, 2]], []), ([[1], [1, 2]], []), ([[7]], []),
        ([[5, 1, 9], [5, 2, 1, 1], [5, 1, 9, 9]], [5]),
    ],
)
def test_shared_prefix_leaves_every_prompt_a_token(
    prompts: list[list[int]], prefix: list[int]
) -> None:
    assert common_prefix(prompts) == common_prefix(prompts[::-1]) == prefix


def test_shared_prefix_is_the_longest() -> None:
    random.seed(0)
    for _ in range(500):
        prompts = [random.choices((1, 2), k=random.randint(1, 9)) for _ in range(3)]
        fits = [n for n in range(min(map(len, prompts)))
                if all(prompt[:n] == prompts[0][:n] for prompt in prompts)]
        assert common_prefix(prompts) == prompts[0][: max(fits)]


@pytest.mark.parametrize(("lengths", "batch_size", "expected"), [
    ([4] * 8, 2, [2, 2, 2, 2]),
    ([4] * 5, 2, [2, 2, 1]),
    ([1] * 20 + [10] * 2, 11, [20, 2]),
    ([1, 1, 1, 50], 2, [3, 1]),
    ([1, 50, 50, 50], 1, [1, 1, 1, 1]),
    ([7], 64, [1]),
    ([], 4, []),
], ids=str)
def test_parts_have_about_equally_many_tokens(
    lengths: list[int], batch_size: int, expected: list[int]
) -> None:
    parts = equal_parts(lengths, batch_size)
    assert [len(lengths[part]) for part in parts] == expected


@pytest.mark.parametrize("seed", range(20))
def test_no_other_split_has_a_smaller_largest_part(seed: int) -> None:
    rng = random.Random(seed)
    lengths = sorted(rng.choices(range(1, 30), k=9))
    batch_size = rng.randint(1, 9)

    def largest(bounds: tuple[int, ...]) -> int:
        return max((end - start) * lengths[end - 1] for start, end in pairwise(bounds))

    parts = equal_parts(lengths, batch_size)
    splits = [(0, *cuts, 9) for cuts in combinations(range(1, 9), len(parts) - 1)]
    assert largest((0, *(part.stop for part in parts))) == min(map(largest, splits))


@pytest.mark.parametrize("batch_size", [1, 3, 16, 64])
def test_parts_are_as_many_as_batches_of_equal_rows_and_none_is_empty(batch_size: int) -> None:
    lengths = sorted(random.Random(0).choices(range(1, 60), k=100))
    parts = equal_parts(lengths, batch_size)
    assert [i for part in parts for i in range(100)[part]] == list(range(100))
    assert len(parts) == math.ceil(100 / batch_size)
    assert all(lengths[part] for part in parts)
