"""Prompts that let a model reason before it answers: chain of thought, and step by step.

Both ask in two stages. First the model continues the prompt with its reasoning. Then the cue, such
as "So the label is", follows the reasoning, and the model continues with its answer. With worked
examples in the prompt this is the chain of thought of Wei et al. (2022); with "Let's think step by
step." alone it is that of Kojima et al. (2022, section 3.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from models.tokenizer import Tokenizer


class WorkedExample(NamedTuple):
    """A question with the reasons for its answer."""

    text: str
    reason: str
    answer: str


@dataclass(frozen=True)
class Reasoning:
    """A template with {text}, the cue that asks for the answer, and where the reasoning ends."""

    template: str
    cue: str
    stop: str = ""  # the reasoning ends before it, and before the cue
    tokens: int = 80  # the longest reasoning

    def cut(self, continuation: str) -> str:
        """Return the reasoning in what the model said."""
        ends = [end for end in (self.stop, self.cue.strip()) if end]
        found = [place for end in ends if (place := continuation.find(end)) >= 0]
        return continuation[: min(found, default=len(continuation))].rstrip()

    def room(self, tokenizer: Tokenizer) -> int:
        """Return the number of tokens that the reasoning and the cue may take."""
        return self.tokens + len(tokenizer.encode_answer(self.cue))

    def conclude(
        self, prompts: Sequence[list[int]], thoughts: Sequence[str], tokenizer: Tokenizer
    ) -> list[list[int]]:
        """Return the prompts followed by the reasoning and the cue."""
        encode = tokenizer.encode_answer
        return [prompt + encode(thought)[: self.tokens] + encode(self.cue)
                for prompt, thought in zip(prompts, thoughts, strict=True)]


def reasoned_prompts(
    question: str, kind: str, examples: Sequence[WorkedExample], tokens: int
) -> Mapping[str, Reasoning]:
    """Return the prompts `chain_of_thought`, if there are worked `examples`, and `step_by_step`.

    `question` holds {text}; `kind` says what an answer may be, such as "a number".
    """
    steps = Reasoning(f"{question}\nAnswer: Let's think step by step.",
                      f"\nTherefore, the answer ({kind}) is", tokens=tokens)
    if not examples:
        return {"step_by_step": steps}
    cue = " So the answer is"
    shown = [f"{question.replace('{text}', one.text)}\nAnswer: {one.reason}{cue} {one.answer}."
             for one in examples]
    chain = "\n\n".join([*shown, f"{question}\nAnswer:"])
    return {"chain_of_thought": Reasoning(chain, cue, "\n", tokens), "step_by_step": steps}
