"""Predictions, their scores with 95 % intervals, and the tables that show them."""

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# The counts of the label words stand beside these results, so no label may have their names.
RESERVED = {"accuracy", "n", "interval_95", "garbage", "confusion", "constrained_accuracy",
            "calibrated_accuracy"}
# Texts without content, as Zhao et al. (2021) use them: what the model answers is its bias.
CONTENT_FREE = ("N/A", "", "[MASK]")


class Completion(NamedTuple):
    """The model's continuation of one prompt, and the log-probabilities a task asks for."""

    text: str
    tokens: int
    ended: bool  # with end-of-text; False if the limit of tokens cut it off
    choice_logprobs: list[float]  # of each choice's first token, in nats, among all tokens
    # nats and tokens of each of the task's `answers_of`, if it scores their likelihood
    likelihoods: Sequence[tuple[float, int]] = ()
    reasoning: str = ""  # before the answer, if the prompt asks for it


class Prediction(NamedTuple):
    """The answer to one prompt of a classification: its text, its label, the label words' odds."""

    generated: str
    label: int  # -1 is garbage
    label_logprobs: list[float]  # of each label's first token, in nats, among all tokens
    reasoning: str = ""
    calibrated: int | None = None  # the likeliest label after contextual calibration


class TextPrediction(NamedTuple):
    """A long answer, and how likely the model finds the right one."""

    generated: str
    tokens: int
    ended: bool  # with end-of-text; False if the limit of tokens cut it off
    reference_nats: float  # of the right answer with its end-of-text, as far as it fits
    reference_tokens: int
    reasoning: str = ""


def fields(prediction: Any) -> dict[str, Any]:
    """Return the fields of a prediction, a NamedTuple; without those that keep their default."""
    default = prediction._field_defaults
    return {name: value for name, value in prediction._asdict().items()
            if name not in default or value != default[name]}


class Metric(NamedTuple):
    """How a table shows one of the results."""

    title: str
    factor: float = 1  # 100 shows a share in percent
    digits: int = 2  # after the decimal point

    def show(self, value: float) -> str:
        return f"{self.factor * value:.{self.digits}f}"


def wilson_interval(right: float, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of the proportion right / n (Wilson, 1927)."""
    z, share = 1.959964, right / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return (low if right else 0.0), (high if right < n else 1.0)  # rounding would step outside


def summarize(
    labels: Sequence[int], predictions: Sequence[Prediction], names: Sequence[str]
) -> dict[str, Any]:
    """Return accuracy and counts; garbage is wrong. `confusion` is [truth][predicted word].

    `constrained_accuracy` takes the likeliest label word as the answer, whatever the model
    generated.
    """
    guesses = [prediction.label for prediction in predictions]
    likelier = [row.index(max(row)) for row in (guess.label_logprobs for guess in predictions)]
    right = sum(map(operator.eq, labels, guesses))
    pairs = Counter(zip(labels, guesses, strict=True))
    columns = dict(enumerate(names)) | {-1: "garbage"}
    calibrated = [guess.calibrated for guess in predictions if guess.calibrated is not None]
    return {
        "accuracy": right / len(labels),
        "n": len(labels),
        "interval_95": wilson_interval(right, len(labels)),
        **{word: guesses.count(guess) for guess, word in columns.items()},
        "confusion": {
            truth: {word: pairs[label, guess] for guess, word in columns.items()}
            for label, truth in enumerate(names)
        },
        "constrained_accuracy": sum(map(operator.eq, labels, likelier)) / len(labels),
        **({"calibrated_accuracy": sum(map(operator.eq, labels, calibrated)) / len(labels)}
           if calibrated else {}),
    }


def calibrate(predictions: Sequence[Prediction], content_free: int) -> list[Prediction]:
    """Return the predictions before the last `content_free`, which answer texts without content.

    Each gets its label after contextual calibration, that of the largest p / q, where q is the
    label's mean probability in the last predictions (Zhao et al. 2021, section 5).
    """
    odds = np.array([prediction.label_logprobs for prediction in predictions])  # (n, labels)
    bias = np.logaddexp.reduce(odds[-content_free:])  # (labels,)
    labels = (odds[:-content_free] - bias).argmax(axis=1).tolist()
    return [prediction._replace(calibrated=label)
            for prediction, label in zip(predictions, labels, strict=False)]


def describe(results: Mapping[str, Any]) -> str:
    low, high = results["interval_95"]
    counts = ", ".join(f"{results[word]} {word}" for word in answer_words(results))
    return (
        f"accuracy {results['accuracy']:.4f} (95 % interval {low:.3f} to {high:.3f}, "
        f"n={results['n']}): {counts}; "
        f"constrained accuracy {results['constrained_accuracy']:.4f}"
        + (f", calibrated {results['calibrated_accuracy']:.4f}"
           if "calibrated_accuracy" in results else "")
    )


def answer_words(results: Mapping[str, Any]) -> list[str]:
    """Return the columns of the confusion matrix: the label words and "garbage"."""
    return [*results["confusion"], "garbage"]


def columns(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of `table` that show the results of one checkpoint, by title."""
    low, high = results["interval_95"]
    return {
        "test accuracy": f"{results['accuracy']:.4f}",
        "95 % interval": f"{low:.3f} to {high:.3f}",
        **{word: str(results[word]) for word in answer_words(results)},
        "constrained": f"{results['constrained_accuracy']:.4f}",
    }


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Align `rows`, which have the same columns, under their titles."""
    lines = [dict(zip(rows[0], rows[0], strict=True)), *rows]
    widths = {title: max(len(line[title]) for line in lines) for title in rows[0]}
    return "\n".join(
        "  ".join(line[title].rjust(width) for title, width in widths.items()) for line in lines
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first of `rows` has its titles."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return ["", lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
