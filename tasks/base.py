"""What a task is: its questions, its right answers, and the scores of generated answers.

`registry.py` lists the tasks in `TASKS`.
"""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from models.tokenizer import Tokenizer, get_tokenizer
from tasks import scores
from tasks.reasoning import Reasoning, WorkedExample, reasoned_prompts
from tasks.scores import Completion, Metric, Prediction, TextPrediction
from tasks.sources import SPLITS, Record, label_text, read_records, show_row

Answers = Literal["word", "text"]


def prompt_template(prompt: str, prompts: Mapping[str, str]) -> str:
    """Return the template called `prompt`, or `prompt` itself if it holds a `{text}`.

    Raises ValueError for anything else, naming the known templates.
    """
    if prompt in prompts:
        return prompts[prompt]
    if "{text}" in prompt:
        return prompt
    raise ValueError(
        f"prompt={prompt!r} must be one of {', '.join(prompts)}, or a template with {{text}} in it"
    )


def filled(where: str, text: str) -> str:
    """Return a text of the command line; raises ValueError if it holds no word."""
    if not text.strip():
        raise ValueError(f"{where} holds no words to answer")
    return text


def line_ends(where: str, text: str) -> str:
    r"""Return a prompt of the command line or a config file, with `\n` as a line end.

    Raises ValueError, naming the place `where` it was set, for bytes that are not UTF-8.
    """
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{where} must be UTF-8")
    return text.replace("\\n", "\n")


class Task(ABC):
    """Questions, right answers and scores: everything that depends on the data.

    To add a task, write a subclass and list it in `TASKS` in registry.py; training, scoring,
    generation and the experiments' report need nothing else. If the answer is one of a few words,
    subclass `ClassificationTask` and set `name`, `dataset`, `prompts` and `labels`. If the answer
    is a longer text, subclass `Task`, set the attributes without a default, and define three
    methods:

        class SummaryTask(Task):
            name, dataset, answer_tokens = "summary", "data/summaries", 100
            prompts = {"default": "Summarize.\\nText: {text}\\nSummary:"}
            headline, metrics = "length", {"length": Metric("letters", digits=0)}

            def read(self, dataset, split):
                return read_records(dataset, split)  # rows with the fields text and summary

            def answer(self, record):
                return f" {record['summary']}"

            def summarize(self, records, predictions):
                lengths = [len(prediction.generated) for prediction in predictions]
                return {"n": len(records), "length": statistics.mean(lengths)}

    The other methods have defaults for long answers. `answers` chooses the plan and the sections
    of the report: "word" needs the results of a `ClassificationTask`; "text" needs `metrics`, and
    rows and predictions with the fields `reference` and `generated`.
    """

    name: str  # the value of the setting `task`
    dataset: str  # the default data set
    prompts: Mapping[str, str]  # templates with {text}, by name; one is "default"
    answer_tokens: int  # default limit of a generated answer
    headline: str  # the result that a finished run logs
    metrics: ClassVar[Mapping[str, Metric]] = {}  # the results that tables show, in this order
    answers: ClassVar[Answers] = "text"  # one word of a few, or a longer text
    text_field = "text"  # the field behind {text}, which is cut when a prompt is too long
    noun = "examples"
    quick = False  # whether every validation generates all answers, because they are short
    likelihood = False  # whether scoring also computes the likelihood of `answers_of`
    pairs = False  # whether a record has a chosen and a rejected answer
    logged: ClassVar[tuple[str, ...]] = ()  # the results that a validation logs if it is quick
    choices: Sequence[str] = ()  # the possible answers, if they are few
    one_line = False  # whether an answer is a single line
    tokenizer: Tokenizer | None = None  # of the model; the loader sets it

    def __init__(self, prompt: str = "default") -> None:
        reasoned = self.reasoned
        self.reasoning = reasoned.get(prompt)  # how the model reasons before it answers
        templates = {name: reasoning.template for name, reasoning in reasoned.items()}
        self.template = prompt_template(prompt, {**self.prompts, **templates})
        self.chat = prompt == "chat"  # in the model's own chat template

    @property
    def reasoned(self) -> Mapping[str, Reasoning]:
        """The prompts that let the model reason first, by name; they are not for training."""
        return {}

    @property
    def reasoning_room(self) -> int:
        """Tokens to keep free for the reasoning before an answer."""
        return self.reasoning.room(self.tokenizer or get_tokenizer()) if self.reasoning else 0

    def prompt(self, record: Record) -> str:
        return self.template.replace("{text}", record[self.text_field])

    @abstractmethod
    def read(self, dataset: str, split: str) -> list[Record]:
        """Return the records of a split, each with its `text_field`.

        Raises ValueError for an unknown data set or bad rows, OSError for missing files.
        """

    @abstractmethod
    def answer(self, record: Record) -> str:
        """Return the right answer with the space or line end that separates it from the prompt."""

    def answers_of(self, record: Record) -> list[tuple[str, bool]]:
        """Return the answers whose likelihood is scored, and whether each ends with end-of-text.

        The first is the right one, from which training learns.
        """
        return [(self.answer(record), True)]

    @abstractmethod
    def summarize(self, records: Sequence[Record], predictions: Sequence[Any]) -> dict[str, Any]:
        """Return the results of a split: its size `n`, `headline` and `metrics`, among others.

        `interval_95` may hold 95 % intervals (low, high) by the metric's name.
        """

    def judge(self, completion: Completion) -> Any:
        """Return the prediction in a completion: a NamedTuple, written to predictions.jsonl."""
        nats, tokens = completion.likelihoods[0] if completion.likelihoods else (0.0, 0)
        return TextPrediction(completion.text, completion.tokens, completion.ended, nats, tokens,
                              completion.reasoning)

    def group(self, record: Record) -> Hashable:
        """Return what a balanced draw of examples has equally often: the label, if there is one."""
        return None

    def row(self, record: Record) -> Record:
        """Return the fields of a record that predictions.jsonl holds beside its prediction."""
        return {self.text_field: record[self.text_field], "reference": self.answer(record).strip()}

    def tell(self, prediction: Any) -> list[str]:
        """Return the lines that show one prediction."""
        return [self.display(prediction.generated)]

    def describe(self, results: Mapping[str, Any]) -> str:
        """Return the results in one line."""
        return ", ".join(f"{title} {cell}" for title, cell in self.columns(results).items())

    def columns(self, results: Mapping[str, Any]) -> dict[str, str]:
        """Return the cells of a table that show the results of one checkpoint, by title."""
        return {metric.title: metric.show(results[name]) for name, metric in self.metrics.items()}

    def display(self, answer: str) -> str:
        """Return an answer, generated or right, as a person should see it."""
        return answer.strip()

    def explain_scores(self) -> str:
        """Return the sentences at the head of the report that say how answers are scored."""
        return ("The models answer the test split greedily. Each score is the mean ± standard "
                "deviation over the seeds. Brackets hold the 95 % interval over the examples, "
                "where a score has one; its ends are averaged over the seeds.")

    def explain_references(self, results: Mapping[str, Any]) -> str:
        """Return what the report says about the right answers of the test split, if anything."""
        return ""

    def facts(self, records: Sequence[Record]) -> dict[str, str]:
        """Return what an analysis of a split shows beside the numbers of tokens."""
        return {}

    def shared(self, training: Sequence[Record], records: Sequence[Record]) -> int:
        """Count the `records` whose text is in `training` too, whatever its case and spacing."""
        def key(record: Record) -> str:
            return " ".join(record[self.text_field].split()).casefold()

        known = set(map(key, training))
        return sum(key(record) in known for record in records)

    def left_out(self, dataset: str) -> int:
        """Count the training records that `read` leaves out because they are held-out ones, too."""
        return 0

    def census(self, dataset: str) -> dict[str, int]:
        """Return the number of rows in a data set, and how many repeat another's text."""
        splits = [self.read(dataset, split) for split in SPLITS]
        texts = [record[self.text_field] for records in splits for record in records]
        return {"rows": len(texts), "repeated texts": len(texts) - len(set(texts))}


class ClassificationTask(Task):
    """Choose one of a few words; `labels` holds the words, by label."""

    labels: tuple[str, ...]
    worked_examples: Sequence[WorkedExample] = ()  # in the prompt `chain_of_thought`
    answers = "word"
    answer_tokens = 5
    quick = True
    one_line = True
    headline = "accuracy"
    logged = ("accuracy", "garbage")

    def __init__(self, prompt: str = "default") -> None:
        super().__init__(prompt)
        if taken := scores.RESERVED.intersection(self.labels):
            raise ValueError(f"{taken.pop()!r} cannot be a label: a score has this name")
        for label, word in enumerate(self.labels):
            if self.parse(word) != label:
                raise ValueError(f"{word!r} cannot be a label: no answer would be read as this one")

    @property
    def choices(self) -> Sequence[str]:
        return [self.answer({"label": label}) for label in range(len(self.labels))]

    @property
    def reasoned(self) -> Mapping[str, Reasoning]:
        kind = " or ".join(self.labels)
        question = f"Text: {{text}}\nQuestion: Is this text {kind}?"
        return reasoned_prompts(question, kind, self.worked_examples, tokens=60)

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
        label = label_text(record["label"])
        if not isinstance(record["text"], str) or label not in allowed:
            known, shown = f"{', '.join(allowed[:-1])} or {allowed[-1]}", show_row(record)
            raise ValueError(f"{where} needs a text and a label of {known}, but is {shown}")
        return record | {"label": int(label)}

    def answer(self, record: Record) -> str:
        return f" {self.labels[record['label']]}"

    def parse(self, generated: str) -> int:
        """Return the label whose word alone occurs in `generated`, in any case; else -1."""
        found = [label for label, word in enumerate(self.labels) if re.search(
            rf"(?<!\w){re.escape(word.lower())}(?!\w)", generated.lower())]
        return found[0] if len(found) == 1 else -1

    def judge(self, completion: Completion) -> Prediction:
        return Prediction(completion.text, self.parse(completion.text),
                          completion.choice_logprobs, completion.reasoning)

    def group(self, record: Record) -> int:
        return record["label"]

    def summarize(self, records: Sequence[Record], predictions: Sequence[Any]) -> dict[str, Any]:
        return scores.summarize([record["label"] for record in records], predictions, self.labels)

    def row(self, record: Record) -> Record:
        return {"text": record["text"], "truth": record["label"]}

    def tell(self, prediction: Prediction) -> list[str]:
        label = self.labels[prediction.label] if prediction.label >= 0 else "garbage"
        odds = zip(self.labels, prediction.label_logprobs, strict=True)
        said = {"reasoning": prediction.reasoning, "continuation": prediction.generated}
        lines = [f"{name}: {text!r}" for name, text in said.items() if text or name != "reasoning"]
        lines += [f"label: {label}",
                  *(f"P({word}) = {math.exp(logprob):.4f}" for word, logprob in odds)]
        if prediction.calibrated is not None:
            lines.append(f"calibrated: {self.labels[prediction.calibrated]}")
        return lines

    def describe(self, results: Mapping[str, Any]) -> str:
        return scores.describe(results)

    def columns(self, results: Mapping[str, Any]) -> dict[str, str]:
        return scores.columns(results)

    def explain_scores(self) -> str:
        return ("Accuracy is the share of *generated* answers to the test split that are right, "
                "mean ± standard deviation over the seeds. The 95 % interval beside it is Wilson's "
                f"for that mean on n {self.noun}.")

    def facts(self, records: Sequence[Record]) -> dict[str, str]:
        counts = Counter(self.labels[record["label"]] for record in records)
        return {word: f"{counts[word]:,}" for word in self.labels}
