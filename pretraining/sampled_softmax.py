"""The loss of a language model: over all words, or over a sample with the log-Q correction.

In a small model, GPT-2's 50,257-word output layer costs many times as much as the blocks. A
training step needs only the words of its batch and some random ones, if each logit is corrected
for the probability Q that the sample contains the word (Bengio and Senecal, 2008; Jean et al.,
2015, section 3).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from pretraining.corpus import Windows
from runtime.device import autocast


class Words(NamedTuple):
    """The sorted token ids (K,) of a softmax, and the log Q (K,) of each."""

    ids: Tensor
    log_q: Tensor


class Vocabulary:
    """Draw the words for a step's softmax.

    They are the words of the batch and `negatives` drawn by frequency^0.75 (Mikolov et al.,
    2013), from the frequencies in `tokens`. Q assumes that the batch is drawn by frequency, too.
    """

    def __init__(self, tokens: np.ndarray, size: int, negatives: int) -> None:
        counts = torch.from_numpy(np.bincount(tokens, minlength=size)).double() + 1
        self.share, self.negatives = counts / counts.sum(), negatives  # (V,)
        self.proposal = self.share**0.75 / (self.share**0.75).sum()  # (V,)

    def draw(self, tokens: Tensor) -> Words:
        """Return a sample of the vocabulary that contains all of `tokens`."""
        drawn = torch.multinomial(self.proposal, self.negatives, replacement=True)
        ids = torch.cat((tokens.flatten(), drawn)).unique()
        log_absent = tokens.numel() * torch.log1p(-self.share[ids])
        log_absent += self.negatives * torch.log1p(-self.proposal[ids])
        return Words(ids, torch.log(-torch.expm1(log_absent)).float())

    def all(self) -> Words:
        """Return the whole vocabulary, for the full softmax."""
        return Words(torch.arange(len(self.share)), torch.zeros(len(self.share)))


def predict(model: GPT, tokens: Tensor, words: Words, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits (B·T, K) over `words` for rows `tokens` (B, T+1), and the targets (B·T,).

    The model runs with the embeddings of these words alone; no others are read or get a gradient.
    """
    ids = words.ids.to(model.device)
    inside = torch.searchsorted(ids, tokens.to(model.device))  # (B, T+1), positions in ids
    table = F.embedding(ids, model.transformer.wte.weight).to(dtype)  # (K, C)
    with autocast(model.device, dtype):
        logits, _ = torch.func.functional_call(
            model, {"transformer.wte.weight": table}, (inside[:, :-1],))  # (B, T, K)
    return logits.flatten(0, 1), inside[:, 1:].flatten()


def token_losses(logits: Tensor, targets: Tensor, log_q: Tensor) -> Tensor:
    """Return for each row of `logits` (N, K) an estimate of its full cross-entropy in nats (N,).

    The correction makes the sum over the sample an estimate of the sum over the vocabulary. The
    target's logit needs no correction; undoing it shifts the loss and changes no gradient.
    """
    losses = F.cross_entropy(logits - log_q, targets, reduction="none")
    return losses - log_q[targets]


@torch.no_grad()
def evaluate(
    model: GPT, rows: Windows, vocabulary: Vocabulary, dtype: torch.dtype, size: int, batches: int
) -> dict[str, float]:
    """Score the first `batches` batches of `size` rows (0 is all) with the full softmax.

    Returns the loss in nats per token, its perplexity, and the accuracy on the verdicts.
    """
    model.eval()
    words, total, right = vocabulary.all(), 0.0, 0.0
    tokens_seen = verdicts_seen = 0
    count = min(rows.count, batches * size) if batches else rows.count
    for start in range(0, count, size):
        tokens, verdicts = rows.take(range(start, min(start + size, count)))
        logits, targets = predict(model, tokens, words, dtype)
        total += token_losses(logits, targets, words.log_q.to(model.device)).sum().item()
        marked = verdicts.flatten().to(model.device)
        right += (logits[marked].argmax(dim=1) == targets[marked]).sum().item()
        tokens_seen, verdicts_seen = tokens_seen + len(targets), verdicts_seen + int(marked.sum())
    model.train()
    loss = total / tokens_seen
    return {"validation_loss": loss, "perplexity": math.exp(loss),
            "verdict_accuracy": right / max(1, verdicts_seen)}
