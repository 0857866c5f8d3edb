"""What a task is: the questions, the right answers, and how answers are scored.

The tasks themselves stand in `dataloader.py`.
"""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tasks import scores
from tasks.scores import Completion, Prediction
from tasks.sources import SPLITS, Record, read_records


def prompt_template(prompt: str, prompts: Mapping[str, str]) -> str:
    """Return the template called `prompt`, or `prompt` itself if it holds a `{text}`.

    Raises ValueError for anything else, naming the templates there are.
    """
    if prompt in prompts:
        return prompts[prompt]
    if "{text}" in prompt:
        return prompt
    raise ValueError(
        f"prompt={prompt!r} must be one of {', '.join(prompts)}, or a template with {{text}} in it"
    )


class Task(ABC):
    """What is asked, what is right, and how answers are scored: all that depends on the data.

    A new task is a subclass with these attributes and the methods below, listed in `TASKS`; one
    with a few label words to choose from is a `ClassificationTask`.
    """

    name: str  # for task=...
    dataset: str  # the data set it is made for
    prompts: Mapping[str, str]  # templates with {text}, by name, a "default" among them
    text_field = "text"  # what {text} stands for, and what is cut when a prompt is too long
    noun = "examples"
    answer_tokens: int  # longest generated answer, unless asked otherwise
    quick = False  # answers are so short that every validation generates them all
    likelihood = False  # scoring also asks how likely the right answer is
    headline: str  # the result that a finished run logs
    logged: ClassVar[tuple[str, ...]] = ()  # the results that a validation logs, if it is quick
    choices: Sequence[str] = ()  # the possible answers, if they are few

    def __init__(self, prompt: str = "default") -> None:
        self.template = prompt_template(prompt, self.prompts)

    def prompt(self, record: Record) -> str:
        return self.template.replace("{text}", record[self.text_field])

    @abstractmethod
    def read(self, dataset: str, split: str) -> list[Record]:
        """Return the records of a split, each with its `text_field`.

        Raises ValueError for an unknown data set or bad rows, OSError for missing files.
        """

    @abstractmethod
    def answer(self, record: Record) -> str:
        """Return the right answer; the space or line end between it and the prompt is its own."""

    @abstractmethod
    def judge(self, completion: Completion) -> Any:
        """Return what a completion amounts to, as a NamedTuple whose fields are worth writing."""

    @abstractmethod
    def summarize(self, records: Sequence[Record], predictions: Sequence[Any]) -> dict[str, Any]:
        """Return the results of a split."""

    @abstractmethod
    def row(self, record: Record) -> Record:
        """Return what identifies a record beside its prediction."""

    @abstractmethod
    def tell(self, prediction: Any) -> list[str]:
        """Return the lines that show one prediction."""

    @abstractmethod
    def describe(self, results: Mapping[str, Any]) -> str:
        """Return the results in one line."""

    @abstractmethod
    def columns(self, results: Mapping[str, Any]) -> dict[str, str]:
        """Return the cells of a table that tell the results of one checkpoint."""

    def facts(self, records: Sequence[Record]) -> dict[str, str]:
        """Return what an analysis of a split should tell beside numbers of tokens."""
        return {}

    def census(self, dataset: str) -> dict[str, int]:
        """Return how many rows a data set has, and how many of them repeat another's text."""
        splits = [self.read(dataset, split) for split in SPLITS]
        texts = [record[self.text_field] for records in splits for record in records]
        return {"rows": len(texts), "repeated texts": len(texts) - len(set(texts))}


class ClassificationTask(Task):
    """Which of a few words is right? `labels` are the words, by label."""

    labels: tuple[str, ...]
    answer_tokens = 5
    quick = True
    headline = "accuracy"
    logged = ("accuracy", "garbage")

    def __init__(self, prompt: str = "default") -> None:
        super().__init__(prompt)
        if taken := scores.RESERVED.intersection(self.labels):
            raise ValueError(f"a label cannot be called {taken.pop()!r}: a score is")

    @property
    def choices(self) -> Sequence[str]:
        return [self.answer({"label": label}) for label in range(len(self.labels))]

    def read(self, dataset: str, split: str) -> list[Record]:
        records = read_records(dataset, split)
        if not records:
            raise ValueError(f"{dataset}: the {split} split is empty")
        return [self._checked(record, f"{dataset}: {split} row {row}")
                for row, record in enumerate(records, 1)]

    def _checked(self, record: Record, where: str) -> Record:
        if not isinstance(record, dict) or not {"text", "label"} <= record.keys():
            raise ValueError(f"{where} needs the fields text and label, but is {record!r:.80}")
        allowed = [str(label) for label in range(len(self.labels))]
        if not isinstance(record["text"], str) or str(record["label"]) not in allowed:
            known = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            raise ValueError(f"{where} needs a text and a label of {known}, but is {record!r:.80}")
        return record | {"label": int(record["label"])}

    def answer(self, record: Record) -> str:
        return f" {self.labels[record['label']]}"

    def parse(self, generated: str) -> int:
        """Return the label whose word alone occurs in `generated`, in any case; else -1."""
        found = [label for label, word in enumerate(self.labels) if re.search(
            rf"(?<!\w){re.escape(word.lower())}(?!\w)", generated.lower())]
        return found[0] if len(found) == 1 else -1

    def judge(self, completion: Completion) -> Prediction:
        return Prediction(completion.text, self.parse(completion.text), completion.choice_logprobs)

    def summarize(self, records: Sequence[Record], predictions: Sequence[Any]) -> dict[str, Any]:
        return scores.summarize([record["label"] for record in records], predictions, self.labels)

    def row(self, record: Record) -> Record:
        return {"text": record["text"], "truth": record["label"]}

    def tell(self, prediction: Prediction) -> list[str]:
        label = self.labels[prediction.label] if prediction.label >= 0 else "garbage"
        odds = zip(self.labels, prediction.label_logprobs, strict=True)
        return [f"continuation: {prediction.generated!r}", f"label: {label}",
                *(f"P({word}) = {math.exp(logprob):.4f}" for word, logprob in odds)]

    def describe(self, results: Mapping[str, Any]) -> str:
        return scores.describe(results)

    def columns(self, results: Mapping[str, Any]) -> dict[str, str]:
        return scores.columns(results)

    def facts(self, records: Sequence[Record]) -> dict[str, str]:
        counts = Counter(self.labels[record["label"]] for record in records)
        return {word: f"{counts[word]:,}" for word in self.labels}
