"""Which token is chosen: none that the tokenizer lacks, and a finite one at any temperature."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from made_models import TINY, make_sampler
from torch import Tensor

from checkpoints.layouts import END_OF_TEXT
from model import GPT
from models.tokenizer import get_tokenizer
from runtime.kernels import choose_token

PADDED = replace(TINY, vocab_size=50304, block_size=128)  # nanoGPT's, a multiple of 64


@pytest.fixture
def padded() -> GPT:
    """A model that prefers the tokens behind end-of-text, and among the real ones 300."""
    model = GPT(PADDED).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[END_OF_TEXT + 1 :] = 5
        model.transformer.wte.weight[300] = 2
    return model


@pytest.mark.parametrize("settings", [
    {"temperature": 0}, {"temperature": 1.0}, {"temperature": 50.0}, {"top_k": 3}, {"top_k": 1}])
def test_padded_vocabulary_never_speaks(padded: GPT, settings: dict[str, float]) -> None:
    steps = list(padded.stream([[1, 1, 1]] * 20, 8, **settings))
    tokens = torch.cat([step.tokens for step in steps])
    assert tokens.max() <= END_OF_TEXT
    assert {step.logits.shape for step in steps} == {(20, 50304)}
    get_tokenizer().decode(tokens.flatten().tolist())
    if settings.get("temperature") == 0 or settings.get("top_k") == 1:
        assert (tokens == 300).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampler_of_a_padded_model_answers_in_text(
    padded: GPT, reviews: str, temperature: float
) -> None:
    sampler = make_sampler(padded, reviews, max_new_tokens=5, temperature=temperature)
    predictions = sampler.predict(sampler.loader.records("test"))
    assert all(prediction.label in (-1, 0, 1) for prediction in predictions)
    if not temperature:
        assert {prediction.generated for prediction in predictions} == {
            get_tokenizer().decode([300] * 5)}


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-46, 5e-324])
@pytest.mark.parametrize("top_k", [None, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiny_temperature_is_greedy(
    temperature: float, top_k: int | None, dtype: torch.dtype
) -> None:
    logits = 10 * torch.rand(64, 500)
    logits[torch.arange(64), torch.arange(64)] = 11  # beyond the rounding of 16 bits
    chosen = choose_token(logits.to(dtype), temperature, top_k)
    assert chosen[:, 0].tolist() == list(range(64))


def test_tiny_temperature_draws_among_equal_logits() -> None:
    logits: Tensor = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).expand(200, -1)
    assert set(choose_token(logits, 5e-324, None).flatten().tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1]], {"temperature": -1.0}, r"temperature=-1\.0 .* must not be negative"),
        ([[1]], {"temperature": math.nan}, "temperature=nan .* must not be negative"),
        ([[1]], {"top_k": -1}, "top_k=-1 must not be negative"),
        ([[1], []], {}, "each prompt needs at least one token"),
    ],
)
def test_what_no_token_can_follow_from_is_refused(
    tiny: GPT, prompts: list[list[int]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        next(tiny.stream(prompts, 2, **settings))
