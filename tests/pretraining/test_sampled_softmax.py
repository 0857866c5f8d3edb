"""A sampled softmax over all words is the full one; over a sample it estimates the full one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import GPT
from pretraining.sampled_softmax import Vocabulary, predict, token_losses

TOKENS = np.random.default_rng(0).zipf(1.3, 4000) % 101  # 101 words, as `tiny` has


@pytest.fixture
def rows() -> torch.Tensor:
    """Two rows of 16 + 1 tokens (2, 17)."""
    return torch.from_numpy(TOKENS[:34].copy()).view(2, 17)


def test_softmax_over_all_words_is_the_models_own_loss(tiny: GPT, rows: torch.Tensor) -> None:
    words = Vocabulary(TOKENS, 101, negatives=5).all()
    logits, targets = predict(tiny, rows, words, torch.float32)
    loss = token_losses(logits, targets, words.log_q).mean()
    _, expected = tiny(rows[:, :-1], rows[:, 1:])
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    ours = torch.autograd.grad(loss, list(tiny.parameters()))
    theirs = torch.autograd.grad(expected, list(tiny.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_sample_contains_the_batch_and_has_probabilities(rows: torch.Tensor) -> None:
    words = Vocabulary(TOKENS, 101, negatives=10).draw(rows)
    assert set(rows.flatten().tolist()) <= set(words.ids.tolist())
    assert words.ids.tolist() == sorted(set(words.ids.tolist()))
    assert len(words.ids) < 101
    assert (words.log_q < 0).all()


def test_a_large_enough_sample_is_the_full_softmax(rows: torch.Tensor) -> None:
    words = Vocabulary(TOKENS, 101, negatives=100_000).draw(rows)
    assert words.ids.tolist() == list(range(101))
    torch.testing.assert_close(words.log_q, torch.zeros(101))


def test_logits_over_a_sample_are_the_full_ones_at_its_words(
    tiny: GPT, rows: torch.Tensor
) -> None:
    words = Vocabulary(TOKENS, 101, negatives=10).draw(rows)
    logits, targets = predict(tiny, rows, words, torch.float32)
    full, _ = tiny(rows[:, :-1])
    torch.testing.assert_close(logits, full.flatten(0, 1)[:, words.ids])
    torch.testing.assert_close(words.ids[targets], rows[:, 1:].flatten())


def test_only_the_words_of_the_sample_get_a_gradient(tiny: GPT, rows: torch.Tensor) -> None:
    words = Vocabulary(TOKENS, 101, negatives=10).draw(rows)
    logits, targets = predict(tiny, rows, words, torch.float32)
    token_losses(logits, targets, words.log_q).mean().backward()
    touched = tiny.transformer.wte.weight.grad.abs().sum(dim=1) > 0
    assert touched.nonzero().flatten().tolist() == words.ids.tolist()


@pytest.mark.parametrize("corrected", [True, False])
def test_correction_makes_the_sample_estimate_the_whole_sum(corrected: bool) -> None:
    """The mean over draws of sum(exp(logit) / Q) is the sum over all words; without Q it is not."""
    vocabulary = Vocabulary(TOKENS, 101, negatives=20)
    logits = torch.randn(101)
    sums = []
    for _ in range(3000):
        batch = torch.multinomial(vocabulary.share, 15, replacement=True)
        ids, log_q = vocabulary.draw(batch)
        sums.append((logits[ids] - log_q * corrected).logsumexp(0).exp())
    error = torch.stack(sums).mean() / logits.exp().sum() - 1
    assert (abs(error) < 0.03) == corrected


def test_correction_of_the_target_changes_the_loss_but_no_gradient() -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    targets, log_q = torch.tensor([0, 3, 5, 3]), -torch.rand(6)
    plain = F.cross_entropy(logits - log_q, targets)
    ours = token_losses(logits, targets, log_q).mean()
    torch.testing.assert_close(ours, plain - log_q[targets].mean())
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits), torch.autograd.grad(plain, logits))


