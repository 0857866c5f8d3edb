"""The contenders in long answers: this package and `transformers`, with nothing to train.

No token ends an answer: each has exactly its limit of tokens, all of them greedy.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from methods.build import store_frozen_projections
from models.families import load_decoder
from runtime.device import autocast, resolve_dtype
from train import TrainConfig


class Prompts(NamedTuple):
    """Token ids to continue, each by its limit of tokens, `batch_size` at once.

    Ours fits as many short ones into the memory of `batch_size` rows of mean length as it holds.
    """

    rows: list[list[int]]
    limits: list[int]
    batch_size: int


class Generator:
    """This package, weights as it scores them: projections in the compute dtype."""

    def __init__(self, folder: str, config: TrainConfig, device: torch.device) -> None:
        self.dtype = resolve_dtype(config.dtype, device)
        model = load_decoder(folder, lambda model: store_frozen_projections(
            model.requires_grad_(False), self.dtype))
        self.model = model.to(device).eval()
        self.model.config = replace(model.config, end_of_text=())

    def generate(self, prompts: Prompts) -> list[list[int]]:
        """Return the answers; a prompt takes the place of one whose answer is complete."""
        answers: list[list[int]] = [[] for _ in prompts.rows]
        with autocast(self.model.device, self.dtype):
            for step in self.model.stream(
                prompts.rows, prompts.limits, temperature=0, batch_size=prompts.batch_size
            ):
                for row, token in zip(step.rows, step.tokens.tolist(), strict=True):
                    answers[row] += token
        return answers


class RowLimits:
    """Stops each row of a batch at its own limit, and pads it from there on.

    It is a stopping criterion of `transformers`, which pads if a criterion has `eos_token_id`.
    """

    eos_token_id = None

    def __init__(self, width: int, limits: Sequence[int], device: torch.device) -> None:
        self.ends = width + torch.tensor(limits, device=device)  # (B,)

    def __call__(self, idx: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.ends <= idx.size(1)  # (B,)


class TransformersGenerator:
    """`transformers` with its default cache, weights in float32, one batch after another."""

    def __init__(self, folder: str, config: TrainConfig, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM  # slow to import; needed only here

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        self.model, self.device = model.to(device).eval(), device

    def generate(self, prompts: Prompts) -> list[list[int]]:
        """Return the answers; a batch of prompts of equal length runs until its last is done."""
        answers = []
        for start in range(0, len(prompts.rows), prompts.batch_size):
            part = slice(start, start + prompts.batch_size)
            answers += self._batch(prompts.rows[part], prompts.limits[part])
        return answers

    def _batch(self, rows: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        idx = torch.tensor(rows, device=self.device)  # (B, T)
        width, stops = idx.size(1), []
        if len(set(limits)) > 1:
            stops = [RowLimits(width, limits, self.device)]
        output = self.model.generate(
            input_ids=idx, attention_mask=torch.ones_like(idx), do_sample=False,
            max_new_tokens=max(limits), pad_token_id=0, stopping_criteria=stops)
        return [row[:limit] for row, limit in zip(output[:, width:].tolist(), limits, strict=True)]
