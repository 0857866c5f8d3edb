"""Sample continuations from a policy, and measure how far they are from the reference model."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataloader import Example, collate
from generate import Subject
from model import IGNORE
from runtime.batching import by_length
from runtime.device import autocast

LOGITS = 2**25  # numbers of logits computed at once: 128 MiB


class Sample(NamedTuple):
    """A continuation of a prompt, as it was drawn."""

    prompt: str
    text: str
    ids: list[int]  # of the continuation, its end-of-text included
    ended: bool  # with end-of-text; False if the limit of tokens cut it off
    canonical: bool  # whether the tokenizer makes the same tokens of its text


class Distance(NamedTuple):
    """Of a policy's sample from the reference model."""

    kl: float  # Σ over its positions of KL(π‖π_ref) of the next token, in nats
    reference_nats: float  # −log π_ref of the sample


@torch.no_grad()
def draw_samples(
    policy: Subject, prompts: Sequence[str], tokens: int, batch_size: int, seed: int,
    progress: str = "",
) -> list[Sample]:
    """Return a continuation of each prompt of up to `tokens` tokens, drawn at temperature 1.

    They depend on the seed and, because batches share a generator, on the batch size.
    """
    model, tokenizer = policy.model.eval(), policy.tokenizer
    encoded = [tokenizer.encode_ordinary(prompt) for prompt in prompts]
    drawn: list[list[int]] = [[] for _ in prompts]
    torch.manual_seed(seed)
    bar = tqdm(total=len(prompts), desc=progress, disable=not progress, leave=False)
    with autocast(model.device, policy.dtype), bar:
        for step in model.stream(encoded, tokens, batch_size=batch_size):
            for row, token in zip(step.rows, step.tokens.tolist(), strict=True):
                bar.update(not drawn[row])
                drawn[row] += token
    return [_sample(policy, *one) for one in zip(prompts, drawn, strict=True)]


def _sample(policy: Subject, prompt: str, ids: list[int]) -> Sample:
    ended = ids[-1] in policy.model.config.end_of_text
    own = ids[:-1] if ended else ids
    text = policy.tokenizer.decode(own)
    return Sample(prompt, text, ids, ended, policy.tokenizer.encode_ordinary(text) == own)


@torch.no_grad()
def distances(policy: Subject, reference: Subject, samples: Sequence[Sample]) -> list[Distance]:
    """Return how far each of the policy's samples is from the reference model.

    The sum of the exact divergences of each next token has the expectation of log π − log π_ref of
    the whole sample, with less variance.
    """
    encode = policy.tokenizer.encode_ordinary
    examples = [Example(encode(sample.prompt), sample.ids) for sample in samples]
    longest = max(len(sample.ids) for sample in samples)
    rows = max(1, LOGITS // (longest * policy.model.config.vocab_size))
    found: dict[int, Distance] = {}
    for part in by_length([example.length for example in examples], rows):
        batch = collate([examples[i] for i in part], []).to(policy.model.device)
        ours, theirs = (_next_log_probs(subject, batch.inputs, batch.targets)
                        for subject in (policy, reference))  # each (supervised tokens, V)
        divergence = F.kl_div(theirs, ours, log_target=True, reduction="none").sum(dim=1)
        nats = F.nll_loss(theirs, batch.targets[batch.targets != IGNORE], reduction="none")
        tokens = [len(examples[i].answer) for i in part]
        sums = zip(divergence.split(tokens), nats.split(tokens), strict=True)
        found |= {i: Distance(kl.sum().item(), own.sum().item())
                  for i, (kl, own) in zip(part, sums, strict=True)}
    return [found[i] for i in range(len(samples))]


def _next_log_probs(subject: Subject, inputs: Tensor, targets: Tensor) -> Tensor:
    with autocast(subject.model.device, subject.dtype):
        logits, _ = subject.model.eval()(inputs, targets)
    return logits.float().log_softmax(dim=-1)
