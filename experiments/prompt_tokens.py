"""The tokens of a training sequence, each with the role it has."""

import copy
from typing import NamedTuple

from dataloader import CustomDataLoader
from runtime.batching import common_prefix
from tasks.demonstrations import ShotsConfig
from tasks.sources import Record

SHARED, TEXT, INSTRUCTION, SUPERVISED = "shared", "text", "instruction", "supervised"
ROLES = (SHARED, TEXT, INSTRUCTION, SUPERVISED)
NEIGHBOURS = 200  # training examples that decide what all prompts share


class Token(NamedTuple):
    """What a token stands for, and its role, one of `ROLES`."""

    piece: str
    role: str


def prompt_tokens(loader: CustomDataLoader, record: Record, shots: int, room: int) -> list[Token]:
    """Return the tokens of `record` with its answer, behind `shots` examples.

    `room` is kept free for a generated answer. Raises ValueError if the examples do not fit.
    """
    loader = copy.copy(loader)  # the examples are shown here alone
    if shots:
        loader.show(ShotsConfig(shots), [record], room)
    ids, answer = loader.encode(record)
    others = [loader.encode_prompt(other) for other in loader.records("train")[:NEIGHBOURS]]
    shared, decode = len(common_prefix([ids, *others])), loader.tokenizer.decode
    start, end = text_span(decode(ids), record[loader.task.text_field])
    found, place = [], 0
    for number, token in enumerate(ids, 1):
        before, place = place, len(decode(ids[:number], errors="ignore"))
        in_text = start < place and before < end
        role = SHARED if number <= shared else TEXT if in_text else INSTRUCTION
        found.append(Token(decode([token]), role))
    return found + [Token(decode([token]), SUPERVISED) for token in answer]


def text_span(prompt: str, text: str) -> tuple[int, int]:
    """Return where the last `text` of a prompt, which may be cut at its end, begins and ends."""
    while text not in prompt:
        text = text[:-1]
    start = prompt.rindex(text)
    return start, start + len(text)
