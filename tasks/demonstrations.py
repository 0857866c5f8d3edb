"""Labelled examples before a question: a model learns from its context (Brown et al. 2020).

`python generate.py shots=16` shows sixteen, each in the form of the prompt with its answer.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Annotated

from configurator import Bounds
from models.tokenizer import Tokenizer
from tasks.base import Task
from tasks.sources import Record

SEPARATOR = "\n\n"  # between the examples


@dataclass(frozen=True)
class ShotsConfig:
    """Settings of the examples that are shown before each question."""

    shots: Annotated[int, "training examples shown before each question", Bounds(0)] = 0
    shots_seed: Annotated[int, "decides which examples", Bounds(0, 2**63 - 1)] = 0
    shots_order: Annotated[int, "decides in which order", Bounds(0, 2**63 - 1)] = 0


def draw(
    records: Sequence[Record], number: int, seed: int,
    group: Callable[[Record], Hashable] | None = None,
) -> list[Record]:
    """Draw `number` records; with a `group`, one of each group in turn until it runs out.

    A larger number then draws the same records and more.
    """
    if group is None:
        return random.Random(f"subset {seed}").sample(records, number)
    groups: dict[Hashable, list[Record]] = {}
    for record in random.Random(f"balanced {seed}").sample(records, len(records)):
        groups.setdefault(group(record), []).append(record)
    turns = zip_longest(*groups.values())
    return [record for turn in turns for record in turn if record is not None][:number]


class Demonstrations:
    """The examples shown before every question of `task`; none by default."""

    def __init__(self, task: Task, tokenizer: Tokenizer, examples: Sequence[Record] = ()) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.turns = [(task.prompt(example), task.answer(example)) for example in examples]
        reasoned = task.reasoning and task.reasoning.stop  # its template holds examples
        self.stop = self._next_example() if reasoned or (examples and not task.chat) else ""
        self.facts: dict[str, int] = {}  # of the results
        self.ids: list[int] = []
        for prompt, answer in () if task.chat else self.turns:
            for text in (prompt, answer, SEPARATOR):  # tokenized apart, as in training
                self.ids += self._continue(text)

    def cut(self, text: str) -> str:
        """Return an answer up to where the model goes on to an example of its own."""
        return text.partition(self.stop)[0] if self.stop else text

    def _next_example(self) -> str:
        """Return the text with which another example would begin; "" if an answer may hold it."""
        before = self.task.template.partition("{text}")[0]
        return SEPARATOR if self.task.one_line else SEPARATOR + before if before else ""

    def _continue(self, text: str) -> list[int]:
        """Return the ids of `text`, which follows those before it, if there are any."""
        encode = self.tokenizer.encode_answer if self.ids else self.tokenizer.encode_ordinary
        return encode(text)

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of the examples and of `prompt`; in a chat they are earlier messages."""
        if self.task.chat:
            said = [text for prompt, answer in self.turns for text in (prompt, answer.lstrip())]
            return self.tokenizer.encode_chat(*said, prompt)
        return [*self.tokenizer.start, *self.ids, *self._continue(prompt)]


def draw_demonstrations(
    config: ShotsConfig, none: Demonstrations, records: Sequence[Record], question: str, room: int
) -> Demonstrations:
    """Draw the examples of `config` from `records`, equally from each label, in random order.

    `none` holds no examples. Raises ValueError if there are too few records, or
    if the examples are too long; the message names the largest number that fits. Of `room` tokens
    they may take what `question` leaves free, at least half.
    """
    task, tokenizer, shots = none.task, none.tokenizer, config.shots
    if task.reasoning:
        raise ValueError(f"shots={shots}: the training examples give no reasons, but this prompt "
                         "asks for them; choose another prompt or shots=0")
    if shots > len(records):
        raise ValueError(f"shots={shots}, but the training split has {len(records):,} examples")
    drawn = draw(records, shots, config.shots_seed, task.group)
    alone = len(none.encode(question))
    free = max(room - min(alone, room // 2), 0)

    def length(number: int) -> int:
        return len(Demonstrations(task, tokenizer, drawn[:number]).encode(question)) - alone

    fits = bisect_right(range(1, shots + 1), free, key=length)
    if fits < shots:
        raise ValueError(f"shots={shots} examples are too long: {free} tokens are free for them, "
                         f"and shots={fits} is the most that fits")
    order = random.Random(f"order {config.shots_seed} {config.shots_order}")
    shown = Demonstrations(task, tokenizer, order.sample(drawn, shots))
    shown.facts = asdict(ShotsConfig(shots, config.shots_seed, config.shots_order))
    return shown
