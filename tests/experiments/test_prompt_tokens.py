"""Every token of a training sequence has the role that training gives it."""

import pytest
from made_models import make_sampler

from dataloader import CustomDataLoader
from experiments.prompt_tokens import (
    INSTRUCTION,
    SHARED,
    SUPERVISED,
    TEXT,
    prompt_tokens,
    text_span,
)
from model import GPT
from tasks.sentiment import SentimentTask


@pytest.fixture
def loader(model: GPT, reviews: str) -> CustomDataLoader:
    return make_sampler(model, reviews).loader


def said(loader: CustomDataLoader, shots: int = 0, number: int = 3) -> dict[str, str]:
    found = prompt_tokens(loader, loader.records("train")[number], shots, 0)
    return {role: "".join(token.piece for token in found if token.role == role)
            for role in (SHARED, TEXT, INSTRUCTION, SUPERVISED)}


def test_roles_are_those_of_training(loader: CustomDataLoader) -> None:
    batch = loader.window(0, 1, 1)[0]
    assert said(loader) == {
        SHARED: loader.tokenizer.decode(batch.prefix[0].tolist()),
        TEXT: " 3 is moving indeed indeed indeed", INSTRUCTION: "\nLabel:",
        SUPERVISED: " positive<|endoftext|>",
    }
    example = loader.encode(loader.records("train")[3])
    found = prompt_tokens(loader, loader.records("train")[3], 0, 0)
    assert [token.role == SUPERVISED for token in found] == (
        [False] * len(example.prompt) + [True] * len(example.answer))


def test_examples_stand_before_the_question_and_only_there(loader: CustomDataLoader) -> None:
    one, two = said(loader, 1), said(loader, 2)
    assert one[SHARED].count("Label:") == 1
    assert two[SHARED].count("Label:") == 2
    assert one[SUPERVISED] == two[SUPERVISED] == " positive<|endoftext|>"
    assert said(loader)[SHARED].count("Label:") == 0  # the loader is as it was
    with pytest.raises(ValueError, match="shots=40 examples are too long"):
        said(loader, 40)


def test_a_cut_text_ends_before_the_instruction_behind_it(reviews: str) -> None:
    loader = CustomDataLoader(reviews, SentimentTask("terse"), 27)
    found = said(loader, number=4)
    assert found[TEXT] == " 4 is tedious"
    assert found[INSTRUCTION] == "\nLabel:"


@pytest.mark.parametrize(("prompt", "text", "expected"), [
    ("Text: dull\nLabel:", "dull", (6, 10)), ("dull, dull", "dull", (6, 10)),
    ("Review: long and\nWas it?", "long and longer", (8, 16)), ("<user>ab<end>", "ab", (6, 8)),
])
def test_the_text_of_a_prompt_is_found(prompt: str, text: str, expected: tuple[int, int]) -> None:
    assert text_span(prompt, text) == expected
