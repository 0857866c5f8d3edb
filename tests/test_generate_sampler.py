"""Answers and likelihoods depend on no batch, no cache, no merging."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made_models import (
    END,
    NEGATIVE,
    POSITIVE,
    assert_same,
    close,
    loader_of,
    make_sampler,
    stubborn,
)
from transformers import GPT2LMHeadModel

from generate import ModelSampler
from lora import lora_layers
from model import GPT

equal = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.mark.parametrize("prompt", ["terse", "question", "{text} Label:"])
def test_batches_and_caches_change_no_prediction_and_no_order(
    model: GPT, reviews: str, prompt: str
) -> None:
    alone = make_sampler(model, reviews, prompt, batch_size=1, share_prefix=False)
    records = alone.loader.records("train")
    expected = [alone.predict([record])[0] for record in records]
    assert {prediction.label for prediction in expected} == {-1, 0, 1}
    assert len({prediction.generated for prediction in expected}) > 5
    for batch_size in (1, 5, 64):
        for share_prefix in (True, False):
            sampler = make_sampler(model, reviews, prompt, share_prefix, batch_size=batch_size)
            assert_same(sampler.predict(records), expected)
            assert_same(sampler.predict(records[::-1]), expected[::-1])


def test_label_odds_are_those_of_a_plain_forward(model: GPT, reviews: str) -> None:
    sampler = make_sampler(model, reviews)
    records = sampler.loader.records("train")
    predictions = sampler.predict(records)
    for record, prediction in zip(records, predictions, strict=True):
        logits = model(torch.tensor([sampler.loader.encode_prompt(record)]))[0][0, -1]
        expected = logits.log_softmax(dim=-1)[[NEGATIVE, POSITIVE]]
        close(torch.tensor(prediction.label_logprobs), expected)


def test_greedy_answers_equal_those_of_transformers(
    model: GPT, reviews: str, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    reference = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    sampler = make_sampler(model, reviews, max_new_tokens=7)
    records = sampler.loader.records("train")
    predictions = sampler.predict(records)
    for record, prediction in zip(records, predictions, strict=True):
        ids = torch.tensor([sampler.loader.encode_prompt(record)])
        said = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False,
            eos_token_id=END, pad_token_id=END,
        )[0, ids.size(1) :].tolist()
        words = sampler.loader.tokenizer.decode([token for token in said if token != END])
        assert prediction.generated == words
        assert prediction.label == sampler.loader.task.parse(words)
    assert len({prediction.generated for prediction in predictions}) > 5


@pytest.mark.parametrize("training", [True, False])
def test_adapters_are_merged_while_scoring_and_only_then(
    model: GPT, reviews: str, training: bool
) -> None:
    model.train(training)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    merged = []
    model.transformer.h[0].register_forward_hook(
        lambda *_: merged.extend(layer.has_weights_merged for layer in lora_layers(model).values())
    )
    sampler = make_sampler(model, reviews)
    sampler.predict(sampler.loader.records("test"))
    assert merged
    assert all(merged)
    assert model.training == model.transformer.h[1].mlp.training == training
    assert {layer.has_weights_merged for layer in lora_layers(model).values()} == {not training}
    equal(dict(model.state_dict()), before)


def test_answer_of_nothing_is_garbage(model: GPT) -> None:
    (prediction,) = make_sampler(stubborn(model, END)).predict([{"text": "dull"}])
    assert prediction[:2] == ("", -1)
    assert all(-1000 < logprob < -50 for logprob in prediction.label_logprobs)


@pytest.mark.parametrize("tokens", [1, 5, 12])
@pytest.mark.parametrize(("token", "word", "label"), [(POSITIVE, " positive", 1), (257, " a", -1)])
def test_answer_is_as_long_as_allowed(
    model: GPT, tokens: int, token: int, word: str, label: int
) -> None:
    sampler = make_sampler(stubborn(model, token), max_new_tokens=tokens)
    predictions = sampler.predict([{"text": "dull"}, {"text": "dull film " * 1000}])
    assert [prediction[:2] for prediction in predictions] == [(word * tokens, label)] * 2


def test_sampled_answers_depend_on_the_seed_alone(model: GPT, reviews: str) -> None:
    records = make_sampler(model, reviews).loader.records("test")

    def sample(seed: int, **settings: Any) -> list[str]:
        torch.manual_seed(seed)
        predictions = make_sampler(model, reviews, **settings).predict(records)
        return [prediction.generated for prediction in predictions]

    assert sample(1, temperature=1.0) == sample(1, temperature=1.0) != sample(2, temperature=1.0)
    assert sample(1, temperature=1.0, top_k=1) == sample(1) == sample(2)


def test_sampled_tokens_are_among_the_likeliest(model: GPT) -> None:
    sampler = make_sampler(model, temperature=9.0, top_k=2, max_new_tokens=1)
    record = {"text": "a fine film"}
    logits = model(torch.tensor([sampler.loader.encode_prompt(record)]))[0][0, -1]
    likeliest = {sampler._text([token])[0] for token in logits.topk(2).indices.tolist()}
    assert {said.generated for said in sampler.predict([record] * 40)} == likeliest


def test_likelihood_is_that_of_one_sequence_after_the_other(model: GPT, questions: str) -> None:
    loader = loader_of(questions)
    records = loader.records("train")
    for batch_size in (1, 5, 64):
        found = ModelSampler(model, loader, batch_size=batch_size).predict(
            records, likelihood=True)
        for record, prediction in zip(records, found, strict=True):
            prompt, answer = loader.encode(record)
            ids = torch.tensor([prompt + answer])
            logits = model(ids)[0][0].detach().log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            nats = -sum(float(logits[place, ids[0, place + 1]]) for place in places)
            assert prediction.reference_tokens == len(answer)
            assert prediction.reference_nats == pytest.approx(nats, rel=1e-4)


def test_long_answers_do_not_depend_on_the_batch(model: GPT, questions: str) -> None:
    loader = loader_of(questions)
    records = loader.records("test") + loader.records("validation")
    one, many = (ModelSampler(model, loader, batch_size=size).predict(records) for size in (1, 8))
    assert [said.generated for said in one] == [said.generated for said in many]
    assert {said.tokens for said in one if not said.ended} <= {64}
    assert len({said.generated for said in one}) > 1


