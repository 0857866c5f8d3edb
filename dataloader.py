"""Instruction prompts, and batches of supervised tokens.

A training sequence is prompt + answer + end-of-text. Only the answer and the end-of-text are
supervised. Inference uses the same prompt to the token, so the prompt ends where the answer begins.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from configurator import Bounds
from methods.dpo import PreferenceConfig
from methods.pairs import Pair, PairBatch, collate_pairs
from model import IGNORE, Decoder, DecoderConfig
from models.tokenizer import Tokenizer, check_tokenizer, get_tokenizer
from runtime.batching import by_length, common_prefix, epoch_order, pad
from runtime.kv_cache import Prefix
from tasks.base import Task, prompt_template
from tasks.demonstrations import Demonstrations, ShotsConfig, draw, draw_demonstrations
from tasks.registry import TaskConfig, make_task, resolve_dataset
from tasks.sentiment import PROMPTS
from tasks.sources import SPLITS, Record, data_digest

ANSWER_ROOM = 8  # tokens kept free after every prompt, at least


def get_sentiment_prompt(text: str, label: str = "", prompt: str = "default") -> str:
    """Return the prompt for `text`; a `label` word, if given, follows as the answer."""
    answer = f" {label.strip()}" if label.strip() else ""
    return prompt_template(prompt, PROMPTS).replace("{text}", text) + answer


@dataclass(frozen=True)
class DataConfig(TaskConfig):
    """Settings of the data: the task, and which of its examples in how long sequences."""

    block_size: Annotated[int, "longest sequence in tokens; 0 is the model's limit", Bounds(0)] = 0
    train_size: Annotated[int, "examples drawn from the training split; 0 is all", Bounds(0)] = 5000
    train_balanced: Annotated[bool, "draw equally from each label, as shots= does"] = False
    test_size: Annotated[int, "evenly spaced test examples; 0 is all", Bounds(0)] = 0
    seed: Annotated[int, "for adapters, data, dropout, sampling", Bounds(0, 2**63 - 1)] = 1337


class Example(NamedTuple):
    """Token ids of one prompt and of its answer, which ends with end-of-text."""

    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Sequences behind one shared `prefix` (1, P), padded on the right.

    `inputs` and `targets` are (B, T); a target is the token after its input, or -100. Training
    minimizes the first of the `measures`, which are means over as many things as `weight` says.
    """

    measures: ClassVar[tuple[str, ...]] = ("loss",)

    prefix: Tensor
    inputs: Tensor
    targets: Tensor

    @property
    def supervised_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())

    weight = supervised_tokens

    def measure(self, model: Decoder, past: Prefix) -> Tensor:
        """Return the loss in nats a supervised token, (1,); `past` is the prefix, prefilled."""
        return model.nats(self.inputs, self.targets, past).mean()[None]

    def log_probs(self, model: Decoder, past: Prefix) -> Tensor:
        """Return the log-probability of each row's whole answer, (B,), in nats."""
        nats = model.nats(self.inputs, self.targets, past)
        supervised = self.targets != IGNORE  # (B, T)
        return -nats.new_zeros(supervised.shape).masked_scatter(supervised, nats).sum(dim=1)

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in (self.prefix, self.inputs, self.targets)))


def make_batches(
    examples: Sequence[Example] | Sequence[Pair], prefix: list[int], batch_size: int,
    objective: PreferenceConfig | None = None,
) -> list[Batch] | list[PairBatch]:
    """Return batches of `examples` of similar length, pairs for an `objective`; see `by_length`."""
    lengths = [example.length - len(prefix) for example in examples]
    parts = [[examples[i] for i in part] for part in by_length(lengths, batch_size)]
    if objective:
        return [collate_pairs(part, prefix, objective, collate) for part in parts]
    return [collate(part, prefix) for part in parts]


def collate(examples: Sequence[Example], prefix: list[int]) -> Batch:
    """Drop the shared `prefix`, pad on the right, and shift: position t predicts token t+1."""
    start = len(prefix)
    inputs, targets = [], []
    for prompt, answer in examples:
        inputs.append((prompt + answer)[start:-1])
        targets.append([IGNORE] * (len(prompt) - start - 1) + answer)
    shared = torch.tensor([prefix], dtype=torch.long)  # (1, P), also for P = 0
    return Batch(shared, pad(inputs, value=0), pad(targets, IGNORE))


class CustomDataLoader:
    """Serve a task's data: training windows, fixed validation batches, prompts to complete.

    `seed` draws `train_size` records from the training split; 0 takes all. Sequences never exceed
    `block_size` tokens: the loader cuts the text of a prompt that is too long, never its
    instruction, and the end of an answer that does not fit. `share_prefix=False` gives plain
    padded batches, the reference for the fast path.
    """

    def __init__(
        self, dataset: str, task: Task, block_size: int, train_size: int = 0, seed: int = 0,
        share_prefix: bool = True, tokenizer: Tokenizer | None = None, balanced: bool = False,
    ) -> None:
        self.dataset, self.data_sha256 = dataset, data_digest(dataset)
        self.task, self.block_size, self.balanced = task, block_size, balanced
        self.train_size, self.seed, self.share_prefix = train_size, seed, share_prefix
        self.tokenizer = task.tokenizer = tokenizer or get_tokenizer()  # GPT-2's
        self.demonstrations = Demonstrations(task, self.tokenizer)  # none
        self.objective: PreferenceConfig | None = None  # of pairs
        self._records: dict[str, list[Record]] = {}

    def records(self, split: str) -> list[Record]:
        """Return the records of a split, each with an `instr_tuned_text`."""
        if split not in self._records:
            records = self.task.read(self.dataset, split)
            if not records:
                raise ValueError(f"{self.dataset}: the {split} split is empty")
            if split == "train" and 0 < self.train_size < len(records):
                group = self.task.group if self.balanced else None
                records = draw(records, self.train_size, self.seed, group)
            self._records[split] = [self._add_instruction_finetuning(rec) for rec in records]
        return self._records[split]

    def show(self, shots: ShotsConfig, questions: Sequence[Record], room: int) -> None:
        """Put training examples before every prompt from now on; see `draw_demonstrations`."""
        self.demonstrations = draw_demonstrations(
            shots, Demonstrations(self.task, self.tokenizer), self.records("train"),
            max(map(self.task.prompt, questions), key=len), self.block_size - room)

    def compare(
        self, objective: PreferenceConfig, split: str, log_probs: Sequence[tuple[float, float]]
    ) -> None:
        """Serve pairs from now on; the reference model gives each of a split its `log_probs`."""
        self.objective = objective
        for record, reference in zip(self.records(split), log_probs, strict=True):
            record["reference"] = reference

    def _add_instruction_finetuning(self, rec: Record) -> Record:
        return rec | {"instr_tuned_text": self.task.prompt(rec) + self.task.answer(rec)}

    def spread(self, split: str, number: int = 0) -> list[Record]:
        """Return `number` evenly spaced records of a split, always the same ones; 0 means all."""
        records = self.records(split)
        number = min(number or len(records), len(records))
        return [records[i * len(records) // number] for i in range(number)]

    @property
    def longest_answer(self) -> int:
        """Default limit of an answer in tokens: the task's, or its longest choice with end-of-text
        if that is longer, but at most half of a sequence.
        """
        choices = [len(self.encode_answer(choice)) + 1 for choice in self.task.choices]
        return min(max(self.task.answer_tokens, *choices, 0), self.block_size // 2)

    @property
    def answer_room(self) -> int:
        """Tokens kept free after every prompt, for reasoning and answer."""
        return max(ANSWER_ROOM, self.longest_answer) + self.task.reasoning_room

    def encode_prompt(self, record: Record, room: int = 0) -> list[int]:
        """Return the prompt's token ids, its text cut so that `room` tokens and the answer fit.

        Raises ValueError if no token of the text fits beside the instruction.
        """
        room = max(room, self.answer_room)
        ids, limit = self.encode_whole(record), self.block_size - room
        text = record[self.task.text_field]
        text_ids = self.tokenizer.encode_ordinary(text) if len(ids) > limit else []
        kept, copies = len(text_ids), self.task.template.count("{text}") or 1
        while len(ids) > limit:
            over = -(-(len(ids) - limit) // copies)
            kept = max(kept - over, min(kept - 1, 1), 0)  # a single token is the last try
            text = self.tokenizer.decode(text_ids[:kept], errors="ignore")
            ids = self.encode_whole(record | {self.task.text_field: text})
            if not text:
                raise ValueError(f"block_size={self.block_size} is too small for an instruction of "
                                 f"{len(ids)} tokens, an answer of {room} and some text")
        if not ids:
            raise ValueError(f"a prompt without words: {record[self.task.text_field]!r:.60}")
        return ids

    def encode(self, record: Record, number: int = 0) -> Example:
        """Return the prompt and one of the task's answers; a cut one lacks its end-of-text."""
        if self.task.reasoning:
            raise ValueError("this prompt= asks for reasons, which the training examples lack")
        prompt = self.encode_prompt(record)
        text, ended = self.task.answers_of(record)[number]
        answer = [*self.encode_answer(text), *[self.tokenizer.eot_token] * ended]
        return Example(prompt, answer[: self.block_size - len(prompt)])

    def encode_example(self, record: Record) -> Example | Pair:
        """Return what training learns from a record."""
        if not self.objective:
            return self.encode(record)
        return Pair(self.encode(record), self.encode(record, 1), record["reference"])

    def likelihoods(
        self, model: Decoder, records: Sequence[Record], batch_size: int, progress: str = ""
    ) -> list[list[tuple[float, int]]]:
        """Return the nats and the tokens of each of a record's `answers_of`, for all `records`."""
        number = len(self.task.answers_of(records[0]))
        examples = [self.encode(record, i) for record in records for i in range(number)]
        prefix = self.prefix([example.prompt for example in examples])
        past = model.prefill(torch.tensor([prefix], device=model.device).long())
        keys = [(*example.prompt, None, *example.answer) for example in examples]
        unique = dict(zip(keys, examples, strict=True))  # pairs share their answers
        found, rows = torch.empty(len(unique)), list(unique.values())
        parts = by_length([example.length - len(prefix) for example in rows], batch_size)
        for part in tqdm(parts, progress, disable=not progress, leave=False, unit="batch"):
            batch = collate([rows[i] for i in part], prefix).to(model.device)
            found[part] = -batch.log_probs(model, past).cpu()
        known = dict(zip(unique, found.tolist(), strict=True))
        nats = [(known[key], len(row.answer)) for key, row in zip(keys, examples, strict=True)]
        return [nats[i : i + number] for i in range(0, len(nats), number)]

    @property
    def answers_cut(self) -> int:
        """Number of training answers that were too long for a sequence."""
        kept = self._training_set[0]
        rows = [row for pair in kept for row in pair[:2]] if self.objective else kept
        return sum(row.answer[-1] != self.tokenizer.eot_token and row.length == self.block_size
                   for row in rows)

    def texts_cut(self, records: Iterable[Record], room: int = 0) -> int:
        """Count the `records` whose text `encode_prompt` cuts."""
        limit = self.block_size - max(room, self.answer_room)
        return sum(len(self.encode_whole(record)) > limit for record in records)

    def notes(self) -> list[str]:
        """Return sentences on what is cut to fit, and on what several splits have."""
        train, validation, test = map(self.records, SPLITS)
        cut = f"cut to fit into {self.block_size} tokens"
        counts = {f"of {len(train):,} answers in train are {cut}": self.answers_cut}
        for name in SPLITS:
            records = self.records(name)
            counts[f"of {len(records):,} texts in {name} are {cut}"] = self.texts_cut(records)
        for name, others in (("train", train), ("validation", validation)):
            counts[f"of {len(test):,} texts in test are also in {name}"] = (
                self.task.shared(others, test))
        counts["records of train are left out: their answer is in validation or test"] = (
            self.task.left_out(self.dataset))
        return [f"{count:,} {said}" for said, count in counts.items() if count]

    def encode_whole(self, record: Record) -> list[int]:
        """Return the token ids of a prompt, uncut; a special token in a review is plain text."""
        return self.demonstrations.encode(self.task.prompt(record))

    def encode_answer(self, answer: str) -> list[int]:
        """Tokenize an answer, which continues a prompt; in a chat it begins a message."""
        return self.tokenizer.encode_answer(answer.lstrip() if self.task.chat else answer)

    @cached_property
    def _training_set(self) -> tuple[list[Example | Pair], list[int]]:
        examples = [self.encode_example(record) for record in self.records("train")]
        return examples, self.prefix([example.prompt for example in examples])

    def prefix(self, prompts: Sequence[list[int]]) -> list[int]:
        return common_prefix(prompts) if self.share_prefix else []

    def window(self, iteration: int, size: int, batch_size: int) -> list[Batch]:
        """Return the `size` examples of one optimizer step, as batches of similar length.

        The order depends only on the seed and the iteration: each epoch is a new permutation, and
        a resumed run sees the same batches. Sorting happens within the window, so it changes the
        padding but not the gradient.
        """
        examples, prefix = self._training_set
        chosen = []
        for place in range(iteration * size, (iteration + 1) * size):
            epoch, position = divmod(place, len(examples))
            chosen.append(examples[epoch_order(len(examples), self.seed, epoch)[position]])
        return make_batches(chosen, prefix, batch_size, self.objective)

    def batches(self, records: Iterable[Record], batch_size: int) -> list[Batch]:
        """Return supervised batches of `records`, shortest first."""
        examples = [self.encode_example(record) for record in records]
        prefix = self.prefix([example.prompt for example in examples])
        return make_batches(examples, prefix, batch_size, self.objective)


def make_loader(
    config: DataConfig, shape: DecoderConfig, tokenizer: Tokenizer | None = None
) -> CustomDataLoader:
    """Return the loader of `config`'s data, in sequences that a model of this `shape` can hold.

    `tokenizer` is the model's; the default is GPT-2's. Raises ValueError if `block_size` exceeds
    the model's, or as `check_tokenizer` does.
    """
    room = shape.block_size - shape.prefix_tokens
    if config.block_size > room:
        raise ValueError(f"block_size={config.block_size}, but the model has {room}")
    task = make_task(config.task, config.prompt)
    loader = CustomDataLoader(
        resolve_dataset(config).dataset, task, config.block_size or room,
        config.train_size, config.seed, tokenizer=tokenizer, balanced=config.train_balanced)
    check_tokenizer(loader.tokenizer, shape, task.chat)
    return loader
