"""Word problems whose answer is a number: what chain of thought was made for."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

from tasks.base import Task
from tasks.reasoning import Reasoning, WorkedExample, reasoned_prompts
from tasks.scores import Completion, Metric, wilson_interval
from tasks.sources import Record, read_records, show_row

NUMBER = re.compile(r"(?<![\d.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))")
TOLERANCE = 1e-6  # relative, for numbers below 1 absolute: answers are exact


class NumberPrediction(NamedTuple):
    """The answer to a word problem: its text and its number."""

    generated: str
    number: float | None  # None if there is none
    reasoning: str = ""


def read_number(answer: str) -> float | None:
    """Return the last number in the first line of `answer` that has one, or None.

    Thousands may be separated by commas; a currency or a unit may stand beside the number.
    """
    lines = (NUMBER.findall(line.replace("\u2212", "-")) for line in answer.splitlines())
    found = next((numbers for numbers in lines if numbers), [])
    return float(found[-1].replace(",", "")) if found else None


class ArithmeticTask(Task):
    """Solve a word problem; the answer is right if its number is."""

    name = "arithmetic"
    dataset = "arithmetic"
    one_line = True
    prompts: Mapping[str, str] = {
        "default": "Question: {text}\nAnswer:",
        "chat": "{text} Give only the number.",
    }
    answer_tokens = 16
    noun = "problems"
    headline = "accuracy"
    metrics = {  # noqa: RUF012
        "accuracy": Metric("right, %", 100, 1), "numbers": Metric("with a number, %", 100, 1)}

    @property
    def reasoned(self) -> Mapping[str, Reasoning]:
        return reasoned_prompts("Question: {text}", "a number", worked_examples(), tokens=100)

    def read(self, dataset: str, split: str) -> list[Record]:
        if (dataset, split) == (self.dataset, "validation"):
            raise ValueError("task=arithmetic has no validation split: it is for generate.py, not "
                             "for training")
        rows = read_records(dataset, split)
        for number, row in enumerate(rows, 1):
            fields = row if isinstance(row, dict) else {}
            if not isinstance(fields.get("text"), str) or _number(fields) is None:
                raise ValueError(f"{dataset}: {split} row {number} needs the field text, and a "
                                 f"number in the field answer, but is {show_row(row)}")
        return rows

    def answer(self, record: Record) -> str:
        return f" {_answer(record)}"

    def judge(self, completion: Completion) -> NumberPrediction:
        return NumberPrediction(completion.text, read_number(completion.text),
                                completion.reasoning)

    def summarize(self, records: Sequence[Record], predictions: Sequence[Any]) -> dict[str, Any]:
        right = sum(map(is_right, records, predictions))
        return {"n": len(records), "accuracy": right / len(records),
                "numbers": sum(said.number is not None for said in predictions) / len(records),
                "interval_95": {"accuracy": wilson_interval(right, len(records))}}

    def describe(self, results: Mapping[str, Any]) -> str:
        low, high = results["interval_95"]["accuracy"]
        return (f"{results['accuracy']:.1%} right (95 % interval {low:.3f} to {high:.3f}, "
                f"n={results['n']}), {results['numbers']:.1%} with a number")

    def tell(self, prediction: NumberPrediction) -> list[str]:
        reasoning = [f"reasoning: {prediction.reasoning!r}"] if prediction.reasoning else []
        return [*reasoning, f"answer: {prediction.generated!r}", f"number: {prediction.number}"]


def _answer(record: Record) -> str:
    return str(record.get("answer", ""))


def _number(record: Record) -> float | None:
    """Return the right answer, which may be a number or its text; None if it is neither."""
    with suppress(ValueError):
        number = float(_answer(record).replace(",", ""))
        return number if math.isfinite(number) else None
    return None


def is_right(record: Record, prediction: NumberPrediction) -> bool:
    wanted, said = _number(record), prediction.number
    return said is not None and abs(said - wanted) <= TOLERANCE * max(1.0, abs(wanted))


@lru_cache(maxsize=1)
def worked_examples() -> list[WorkedExample]:
    """Return the training problems of the package with the reasons for their answers."""
    rows = read_records("arithmetic", "train")
    return [WorkedExample(row["text"], row["reason"], _answer(row)) for row in rows]
