"""Programming questions with answers in Python; training never sees an answer of the test."""

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from models.tokenizer import get_tokenizer
from tasks import code_scores
from tasks.base import Task
from tasks.code_scores import strip_fences
from tasks.sources import SPLITS, Record, data_digest, has_splits, read_records, read_rows

FIELDS = ("instruction", "input", "output")


def read_split(dataset: str, split: str) -> list[Record]:
    """Return the records of a split: `question`, `output` and the fields of the row.

    A folder with train, validation and test files keeps its splits, but for the training records
    whose answer is in validation or test. Any other data set is split 80/10/10 by answer, the same
    way in every run.

    Raises ValueError for rows with other fields and for a split without records.
    """
    return _splits(dataset, data_digest(dataset))[split]


def census(dataset: str) -> dict[str, int]:
    """Return the number of rows in a data set, of those dropped and of those kept."""
    rows = ([row for split in SPLITS for row in read_records(dataset, split)]
            if has_splits(dataset) else read_rows(dataset))
    filled = [tuple(row[field] for field in FIELDS) for row in rows if not _blank(row)]
    records = [record for split in SPLITS for record in read_split(dataset, split)]
    return {
        "rows": len(rows), "without instruction or answer": len(rows) - len(filled),
        "duplicates": len(filled) - len(set(filled)), "kept": len(records),
        "different answers": len({answer_key(record["output"]) for record in records}),
    }


@lru_cache(maxsize=1)
def _splits(dataset: str, digest: str) -> dict[str, list[Record]]:
    """Return all splits; another `digest` reads files again that were edited."""
    if has_splits(dataset):
        splits = {split: prepare(read_records(dataset, split), f"{dataset}: {split}")
                  for split in SPLITS}
        splits = without_leaks(splits)
    else:
        splits = split_by_answer(prepare(read_rows(dataset), dataset))
    if empty := [split for split in SPLITS if not splits[split]]:
        raise ValueError(f"{dataset}: the {empty[0]} split is empty; a data set without "
                         "split files needs ten rows with different answers")
    return splits


def prepare(rows: Sequence[Any], where: str) -> list[Record]:
    """Return each row once, with its `question` and without `text`, which holds the answer.

    Skips rows without an instruction or an answer: they teach nothing.
    """
    records = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(
                isinstance(row.get(field), str) for field in FIELDS):
            raise ValueError(f"{where} row {number} needs the texts {', '.join(FIELDS)}, "
                             f"but is {row!r:.80}")
        record = {field: row[field] for field in FIELDS}
        if not _blank(row):
            records[tuple(record.values())] = record | {"question": question(record)}
    return list(records.values())


def _blank(row: Record) -> bool:
    return not row["instruction"].strip() or not strip_fences(row["output"]).strip()


def question(record: Record) -> str:
    context = record["input"].strip()
    return record["instruction"].strip() + (f"\nInput: {context}" if context else "")


def answer_key(output: str) -> str:
    """Return `output` without white space and fences: equal for answers that differ only there."""
    return "".join(strip_fences(output).replace("`", "").split())


def split_by_answer(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Split 80/10/10 so that all records of one answer are in one split."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(answer_key(record["output"]), []).append(record)
    keys = sorted(groups)
    random.Random("python_codes").shuffle(keys)
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for key in keys:
        wanting = [split for split in ("validation", "test")
                   if len(splits[split]) < len(records) // 10]
        splits[wanting[0] if wanting else "train"] += groups[key]
    return splits


def without_leaks(splits: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    """Leave out the training records whose answer is in validation or test, too."""
    held_out = {answer_key(record["output"]) for name in SPLITS[1:] for record in splits[name]}
    train = [record for record in splits["train"] if answer_key(record["output"]) not in held_out]
    return {**splits, "train": train}


class PythonCodesTask(Task):
    """Answer a question about programming with Python code.

    Reading drops the data set's `text` field, because it holds the answer. The model learns to
    write code fences; scoring strips them.
    """

    name = "python_codes"
    dataset = "python_codes"
    prompts: Mapping[str, str] = {
        "default": "Instruction: Answer with Python code.\nText: {text}\nAnswer:",
        "plain": "{text}\n",
        "chat": "Answer with Python code.\n\n{text}",
    }
    text_field = "question"
    answer_tokens = 256
    likelihood = True
    headline = "perplexity"
    metrics = code_scores.METRICS

    def read(self, dataset: str, split: str) -> list[Record]:
        return read_split(dataset, split)

    def answer(self, record: Record) -> str:
        return f"\n{record['output'].strip()}"

    def summarize(self, records: Sequence[Record], predictions: Sequence[Any]) -> dict[str, Any]:
        tokenizer = self.tokenizer or get_tokenizer()
        return code_scores.summarize(
            [record["output"] for record in records], predictions, tokenizer.encode_ordinary)

    def row(self, record: Record) -> Record:
        return {"question": record["question"], "reference": record["output"]}

    def facts(self, records: Sequence[Record]) -> dict[str, str]:
        return code_scores.facts([record["output"] for record in records])

    def display(self, answer: str) -> str:
        return strip_fences(answer)

    def explain_scores(self) -> str:
        return (f"{super().explain_scores()} The bootstrap gives these intervals. Scores compare "
                "code without its fences; generated code is never executed.")

    def left_out(self, dataset: str) -> int:
        if not has_splits(dataset):
            return 0
        return len(prepare(read_records(dataset, "train"), dataset)) - len(
            read_split(dataset, "train"))

    census = staticmethod(census)
    tell = staticmethod(code_scores.tell)
    describe = staticmethod(code_scores.describe)
    columns = staticmethod(code_scores.columns)
    explain_references = staticmethod(code_scores.explain_references)
