"""Pairs of answers to one prompt, of which a person or a reward model chose one.

Rows have trl's schema: `prompt`, `chosen`, `rejected`, each a text or a list of messages with
`role` and `content`; without `prompt`, both answers begin with the conversation that they continue.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from tasks.base import Task
from tasks.scores import Completion, Metric, wilson_interval
from tasks.sources import Record, read_records

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"  # as in Anthropic/hh-rlhf
WITHOUT_VALIDATION = ("ultrafeedback", "hh_rlhf")  # every twentieth row of train takes its place


class PreferencePrediction(NamedTuple):
    """What the model answers, and how likely it finds the chosen and the rejected answer."""

    generated: str
    tokens: int
    ended: bool  # with end-of-text; False if the limit of tokens cut it off
    chosen_nats: float
    chosen_tokens: int
    rejected_nats: float
    rejected_tokens: int


class PreferencesTask(Task):
    """Prefer the chosen answer. DPO trains on pairs, `preference_loss=supervised` on the chosen.

    A row may say with `chosen_ended` and `rejected_ended` that an answer is cut off: then no
    end-of-text follows it.
    """

    name = "preferences"
    dataset = "ultrafeedback"
    prompts: Mapping[str, str] = {"default": "{text}", "chat": "{text}"}
    text_field = "prompt"
    noun = "pairs"
    answer_tokens = 64
    likelihood = True
    pairs = True
    headline = "ranking_accuracy"
    metrics: Mapping[str, Metric] = {
        "ranking_accuracy": Metric("ranking accuracy", digits=4),
        "perplexity": Metric("perplexity of chosen"),
        "rejected_perplexity": Metric("of rejected"), "tokens": Metric("tokens", digits=1),
    }

    def read(self, dataset: str, split: str) -> list[Record]:
        rows = _carved(dataset, split) if dataset in WITHOUT_VALIDATION else read_records(
            dataset, split)
        return [read_pair(row, f"{dataset}: {split} row {number}")
                for number, row in enumerate(rows, 1)]

    def prompt(self, record: Record) -> str:
        text = super().prompt(record)
        return f"{HUMAN}{text}{ASSISTANT}" if record.get("dialogue") and not self.chat else text

    def answer(self, record: Record) -> str:
        return record["chosen"]

    def answers_of(self, record: Record) -> list[tuple[str, bool]]:
        return [(record[kind], record.get(f"{kind}_ended", True))
                for kind in ("chosen", "rejected")]

    def judge(self, completion: Completion) -> PreferencePrediction:
        chosen, rejected = completion.likelihoods or [(0.0, 0)] * 2
        return PreferencePrediction(
            completion.text, completion.tokens, completion.ended, *chosen, *rejected)

    def summarize(
        self, records: Sequence[Record], predictions: Sequence[PreferencePrediction]
    ) -> dict[str, Any]:
        n = len(records)
        right = sum(each.chosen_nats < each.rejected_nats for each in predictions)
        return {
            "ranking_accuracy": right / n, "n": n,
            "interval_95": {"ranking_accuracy": wilson_interval(right, n)},
            "perplexity": _perplexity([each[3:5] for each in predictions]),
            "rejected_perplexity": _perplexity([each[5:7] for each in predictions]),
            "tokens": sum(each.tokens for each in predictions) / n,
            "ended": sum(each.ended for each in predictions) / n,
        }

    def row(self, record: Record) -> Record:
        return super().row(record) | {"rejected": record["rejected"].strip()}

    def explain_scores(self) -> str:
        return (f"{super().explain_scores()} Ranking accuracy is the share of pairs whose chosen "
                "answer is likelier than the rejected one as a whole, without a reference model.")


def _perplexity(likelihoods: Sequence[tuple[float, int]]) -> float:
    nats, tokens = map(sum, zip(*likelihoods, strict=True))
    return math.exp(min(nats / tokens, 700.0))


def _carved(dataset: str, split: str) -> list[Record]:
    """Return a split of a hub data set without validation; every twentieth row of train is it."""
    if split == "test":
        return read_records(dataset, "test")
    rows = _train_rows(dataset)
    return rows[::20] if split == "validation" else [row for i, row in enumerate(rows) if i % 20]


@lru_cache(maxsize=1)
def _train_rows(dataset: str) -> list[Record]:
    return read_records(dataset, "train")


def read_pair(row: Any, where: str) -> Record:
    """Return the texts `prompt`, `chosen` and `rejected` of a row, and whether it is a `dialogue`.

    Raises ValueError, with the place `where`, for anything but the forms above.
    """
    fields = row if isinstance(row, dict) else {}
    answers = [fields.get("chosen"), fields.get("rejected")]
    if all(isinstance(answer, list) for answer in answers):
        pair = _read_messages(fields.get("prompt"), answers, where)
    elif all(isinstance(answer, str) for answer in answers):
        pair = _read_texts(fields.get("prompt"), answers, where)
    else:
        raise ValueError(f"{where} needs chosen and rejected, two texts or two lists of messages, "
                         f"but is {row!r:.80}")
    ended = {name: fields.get(name, True) for name in ("chosen_ended", "rejected_ended")}
    if not all(isinstance(value, bool) for value in ended.values()):
        raise ValueError(f"{where}: chosen_ended and rejected_ended must be true or false")
    if not all(pair[kind].strip() or ended[f"{kind}_ended"] for kind in ("chosen", "rejected")):
        raise ValueError(f"{where} has an empty answer without an end")
    if not pair["prompt"].strip():
        raise ValueError(f"{where} has an empty prompt; answers need something to follow")
    return pair | {name: value for name, value in ended.items() if not value}


def _read_texts(prompt: Any, answers: Sequence[str], where: str) -> Record:
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    start = answers[0].rfind(ASSISTANT)
    while start >= 0 and not answers[1].startswith(answers[0][: start + len(ASSISTANT)]):
        start = answers[0].rfind(ASSISTANT, 0, start)
    if prompt is not None or start < 0:
        raise ValueError(f"{where} needs a text as prompt, or two dialogues that share what comes "
                         f"before the last {ASSISTANT.strip()}")
    chosen, rejected = (answer[start + len(ASSISTANT):] for answer in answers)
    dialogue = answers[0][:start].removeprefix(HUMAN.rstrip()).strip()
    return {"prompt": dialogue, "chosen": chosen, "rejected": rejected, "dialogue": True}


def _read_messages(prompt: Any, answers: Sequence[list], where: str) -> Record:
    before = prompt if prompt is not None else answers[0][:-1]
    if isinstance(before, str):
        before = [{"role": "user", "content": before}]
    last = [answer[-1:] for answer in answers]
    whole = isinstance(before, list) and bool(before and last[0] and last[1])
    if not whole or not all(map(_is_message, [*before, *last[0], *last[1]])):
        raise ValueError(f"{where} needs messages with role and content, the last one an answer")
    if any(answer[:-1] != before and (prompt is None or answer[:-1]) for answer in answers):
        raise ValueError(f"{where} needs two conversations that differ in the last message alone")
    if any(message["role"] != "assistant" for (message,) in last):
        raise ValueError(f"{where} needs messages of the assistant as chosen and rejected")
    chosen, rejected = (f" {message['content'].strip()}" for (message,) in last)
    return {"prompt": _transcript(before), "chosen": chosen, "rejected": rejected, "dialogue": True}


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(name), str) for name in ("role", "content"))


def _transcript(messages: Sequence[Mapping[str, str]]) -> str:
    """Return messages as one text, without the first speaker's mark; the system speaks as user."""
    marks = {"assistant": f"{ASSISTANT} "}
    said = [marks.get(message["role"], HUMAN) + message["content"].strip() for message in messages]
    return "".join(said).removeprefix(HUMAN)
