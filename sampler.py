"""Prompts in, judged answers out: batched generation behind a cached prefix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from batches import IGNORE, collate, equal_parts, pad
from dataloader import CustomDataLoader
from datasource import Record
from devices import autocast
from model import GPT
from scores import Completion


class ModelSampler:
    """Asks `model` the prompts of a task and reads its answers.

    Prompts run in batches of similar length behind their cached common prefix, with the adapters
    merged; a batch stops as soon as each of its rows has ended. `max_new_tokens=0` is the task's
    own number, or half of the sequence if that is less.
    """

    def __init__(
        self, model: GPT, loader: CustomDataLoader, dtype: torch.dtype = torch.float32,
        batch_size: int = 64, max_new_tokens: int = 0, temperature: float = 0.0, top_k: int = 0,
    ) -> None:
        self.model, self.loader, self.dtype = model, loader, dtype
        self.batch_size, self.temperature, self.top_k = batch_size, temperature, top_k
        self.max_new_tokens = max_new_tokens or loader.longest_answer
        self.choice_ids = [loader.tokenizer.encode_ordinary(choice)[0]
                           for choice in loader.task.choices]
        if len(set(self.choice_ids)) < len(self.choice_ids):
            raise ValueError(f"two of {', '.join(loader.task.choices)} begin with the same token")

    def predict(
        self, records: Sequence[Record], progress: str = "", likelihood: bool = False
    ) -> list[Any]:
        """Return the task's prediction for each record, in the order of `records`.

        With `likelihood` they tell how likely the model finds the right answers, too.
        """
        if not records:  # fewer records than processes
            return []
        room = max(self.loader.answer_room, self.max_new_tokens)
        prompts = [self.loader.encode_prompt(record, room) for record in records]
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), autocast(self.model.device, self.dtype):
            right = self._likelihoods(records) if likelihood else [(0.0, 0)] * len(records)
            said = self._complete(prompts, progress)
        self.model.train(was_training)
        judge = self.loader.task.judge
        return [judge(Completion(*one, *other)) for one, other in zip(said, right, strict=True)]

    def _complete(self, prompts: list[list[int]], progress: str) -> list[tuple[Any, ...]]:
        """Return for each prompt the text, its tokens, whether it ended, the choices' odds."""
        prefix = self.loader.prefix(prompts)
        past = self.model.prefill(self._tensor([prefix]).long())
        own = [prompt[len(prefix) :] for prompt in prompts]
        found: dict[int, tuple[Any, ...]] = {}
        parts = self._by_length(own)
        for batch in tqdm(parts, progress, disable=not progress, leave=False, unit="batch"):
            found.update(zip(batch, self._answer([own[i] for i in batch], past), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _by_length(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return batches of the numbers of `sequences`, shortest first."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        parts = equal_parts([len(sequences[i]) for i in order], self.batch_size)
        return [order[part] for part in parts]

    def _likelihoods(self, records: Sequence[Record]) -> list[tuple[float, int]]:
        """Return the nats of each right answer, its end-of-text included, and its tokens."""
        examples = [self.loader.encode(record) for record in records]
        prefix = self.loader.prefix([example.prompt for example in examples])
        past = self.model.prefill(self._tensor([prefix]).long())
        found: dict[int, tuple[float, int]] = {}
        for numbers in self._by_length([prompt + answer for prompt, answer in examples]):
            batch = collate([examples[i] for i in numbers], prefix).to(self.model.device)
            _, nats = self.model(batch.inputs, batch.targets, past, reduction="none")
            tokens = (batch.targets != IGNORE).sum(dim=1).tolist()  # of each row's answer
            for i, part in zip(numbers, nats.split(tokens), strict=True):
                found[i] = part.sum().item(), len(part)
        return [found[i] for i in range(len(records))]

    def _answer(self, prompts: list[list[int]], past: Any) -> list[tuple[Any, ...]]:
        """Complete `prompts`, what remains of them after the prefix that `past` holds."""
        lengths = self._tensor([len(prompt) for prompt in prompts])
        odds: list[list[float]] = []
        tokens = []
        for logits, token in self.model.stream(
            self._tensor(pad(prompts, value=0)), self.max_new_tokens, self.temperature,
            self.top_k, past, lengths,
        ):
            odds = odds or logits.log_softmax(dim=-1)[:, self.choice_ids].tolist()  # (B, choices)
            tokens.append(token)
        said = torch.cat(tokens, dim=1).tolist()  # (B, new tokens)
        return [(*self._text(ids), row) for ids, row in zip(said, odds, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Return what the answers depend on beside the weights."""
        return {
            "dataset": self.loader.dataset, "prompt": self.loader.task.template,
            "dtype": str(self.dtype).removeprefix("torch."), "temperature": self.temperature,
            "top_k": self.top_k, "max_new_tokens": self.max_new_tokens,
            "block_size": self.loader.block_size,
        }

    def _text(self, ids: list[int]) -> tuple[str, int, bool]:
        """Return the text up to end-of-text, its tokens, and whether it ended so."""
        ended = self.loader.tokenizer.eot_token in ids
        length = ids.index(self.loader.tokenizer.eot_token) if ended else len(ids)
        return self.loader.tokenizer.decode(ids[:length]), length, ended

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.model.device)
