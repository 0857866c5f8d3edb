"""Instruction prompts, and batches of supervised tokens.

A training sequence is prompt + answer + end-of-text. Only the answer and the end-of-text are
supervised. Inference uses the same prompt to the token, so the prompt ends where the answer begins.
"""

import random
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Annotated, NamedTuple, TypeVar

import torch
from torch import Tensor

from checkpoints.files import local_path
from configurator import Bounds
from model import IGNORE, DecoderConfig
from models.tokenizer import Tokenizer, check_tokenizer, get_tokenizer
from tasks.arithmetic import ArithmeticTask
from tasks.base import Task, line_ends, prompt_template
from tasks.demonstrations import Demonstrations, ShotsConfig, draw, draw_demonstrations
from tasks.python_code import PythonCodesTask
from tasks.sentiment import PROMPTS, SentimentTask
from tasks.sources import SPLITS, Record, data_digest

ANSWER_ROOM = 8  # tokens kept free after every prompt, at least

def get_sentiment_prompt(text: str, label: str = "", prompt: str = "default") -> str:
    """Return the prompt for `text`; a `label` word, if given, follows as the answer."""
    answer = f" {label.strip()}" if label.strip() else ""
    return prompt_template(prompt, PROMPTS).replace("{text}", text) + answer


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (SentimentTask, PythonCodesTask, ArithmeticTask)}


def find_task(name: str) -> type[Task]:
    if name not in TASKS:
        raise ValueError(f"task={name!r} must be one of {', '.join(TASKS)}")
    return TASKS[name]


def make_task(name: str, prompt: str = "default") -> Task:
    """Return the task called `name`; raises ValueError if there is none, or no such prompt."""
    return find_task(name)(prompt)


@dataclass(frozen=True)
class TaskConfig:
    """Settings of the task: its data set and its prompt."""

    task: Annotated[str, f"the task: {', '.join(TASKS)}"] = "sentiment"
    dataset: Annotated[str, "a name or a path; auto is the task's default", local_path] = "auto"
    prompt: Annotated[str, "a template's name, or a text with {text} in it", line_ends] = "default"


@dataclass(frozen=True)
class DataConfig(TaskConfig):
    """Settings of the data: the task, and which of its examples in how long sequences."""

    block_size: Annotated[int, "longest sequence in tokens; 0 is the model's limit", Bounds(0)] = 0
    train_size: Annotated[int, "examples drawn from the training split; 0 is all", Bounds(0)] = 5000
    train_balanced: Annotated[bool, "draw equally from each label, as shots= does"] = False
    test_size: Annotated[int, "evenly spaced test examples; 0 is all", Bounds(0)] = 0
    seed: Annotated[int, "for adapters, data, dropout, sampling", Bounds(0, 2**63 - 1)] = 1337


Data = TypeVar("Data", bound=TaskConfig)


def resolve_dataset(config: Data) -> Data:
    """Replace dataset="auto" by the default data set of the task."""
    auto = config.dataset == "auto"
    return replace(config, dataset=find_task(config.task).dataset) if auto else config


class Example(NamedTuple):
    """Token ids of one prompt and of its answer, which ends with end-of-text."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Batch:
    """Sequences behind one shared `prefix` (1, P), padded on the right.

    `inputs` and `targets` are (B, T); a target is the token after its input, or -100.
    """

    prefix: Tensor
    inputs: Tensor
    targets: Tensor

    @property
    def supervised_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in (self.prefix, self.inputs, self.targets)))


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """Return the permutation of `range(size)` in which an epoch visits its examples."""
    return random.Random(f"order {seed} {epoch}").sample(range(size), size)


def common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Return the longest prefix of all `prompts` that leaves each at least one token."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    differ = (i for i in range(limit) if first[i] != last[i])
    return first[: next(differ, limit)]


def make_batches(examples: Sequence[Example], prefix: list[int], batch_size: int) -> list[Batch]:
    """Sort `examples` by length and split them into batches with `equal_parts`."""
    by_length = sorted(examples, key=lambda example: len(example.prompt) + len(example.answer))
    lengths = [len(e.prompt) + len(e.answer) - len(prefix) for e in by_length]
    return [collate(by_length[part], prefix) for part in equal_parts(lengths, batch_size)]


def equal_parts(lengths: Sequence[int], batch_size: int) -> list[slice]:
    """Split rows of these `lengths` into batches with about the same number of tokens.

    There are as many batches as with `batch_size` rows each, but a batch of short rows holds more
    of them: all batches need about the same memory and time.
    """
    number, total = -(-len(lengths) // batch_size), list(accumulate(lengths))
    bounds = [0]
    for i in range(1, number + 1):
        bound = bisect_left(total, i * total[-1] / number) + 1
        rest = number - i  # each later batch needs at least one row
        bounds.append(min(max(bound, bounds[-1] + 1), len(lengths) - rest))
    return [slice(start, end) for start, end in pairwise(bounds)]


def collate(examples: Sequence[Example], prefix: list[int]) -> Batch:
    """Drop the shared `prefix`, pad on the right, and shift: position t predicts token t+1."""
    start = len(prefix)
    inputs, targets = [], []
    for prompt, answer in examples:
        inputs.append((prompt + answer)[start:-1])
        targets.append([IGNORE] * (len(prompt) - start - 1) + answer)
    shared = torch.tensor([prefix], dtype=torch.long)  # (1, P), also for P = 0
    return Batch(shared, pad(inputs, value=0), pad(targets, IGNORE))


def pad(rows: Sequence[list[int]], value: int) -> Tensor:
    """Return `rows` as one tensor (B, T), padded on the right with `value`."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


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
        self.task, self.block_size = task, block_size
        self.train_size, self.seed, self.share_prefix = train_size, seed, share_prefix
        self.balanced = balanced
        self.tokenizer = task.tokenizer = tokenizer or get_tokenizer()  # GPT-2's
        self.demonstrations = Demonstrations(task, self.tokenizer)  # none
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
        question = max(map(self.task.prompt, questions), key=len)
        self.demonstrations = draw_demonstrations(
            shots, self.demonstrations, self.records("train"), question, self.block_size - room)

    def _add_instruction_finetuning(self, rec: Record) -> Record:
        return rec | {"instr_tuned_text": self.task.prompt(rec) + self.task.answer(rec)}

    def spread(self, split: str, number: int = 0) -> list[Record]:
        """Return `number` evenly spaced records of a split, always the same ones; 0 means all."""
        records = self.records(split)
        number = min(number or len(records), len(records))
        return [records[i * len(records) // number] for i in range(number)]

    @property
    def longest_answer(self) -> int:
        """Default limit of an answer in tokens: the task's, but at most half of a sequence.

        Each choice with its end-of-text fits, however many tokens the tokenizer makes of it.
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

    def encode(self, record: Record) -> Example:
        """Return prompt and answer; an answer that was cut does not end with end-of-text."""
        if self.task.reasoning:
            raise ValueError("this prompt= asks for reasons, which the training examples lack")
        prompt = self.encode_prompt(record)
        answer = [*self.encode_answer(self.task.answer(record)), self.tokenizer.eot_token]
        return Example(prompt, answer[: self.block_size - len(prompt)])

    @property
    def answers_cut(self) -> int:
        """Number of training answers that were too long for a sequence."""
        return sum(e.answer[-1] != self.tokenizer.eot_token for e in self._training_set[0])

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
    def _training_set(self) -> tuple[list[Example], list[int]]:
        examples = [self.encode(record) for record in self.records("train")]
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
        return make_batches(chosen, prefix, batch_size)

    def batches(self, records: Iterable[Record], batch_size: int) -> list[Batch]:
        """Return supervised batches of `records`, shortest first."""
        examples = [self.encode(record) for record in records]
        prefix = self.prefix([example.prompt for example in examples])
        return make_batches(examples, prefix, batch_size)


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
