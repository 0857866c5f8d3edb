"""Models without a computation, and a tokenizer of words: they stand in for real ones.

`Script` answers as a script says, so that the probes see how a submission asks and reads answers;
`StandIn` has the places into which other methods put their modules.
"""

import re
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Words:
    """A tokenizer with a token per word, which makes up its vocabulary as it reads."""

    eot_token, size = 0, 500
    start, digests, has_chat = (), {}, False

    def __init__(self) -> None:
        self.words = [""]

    def encode_ordinary(self, text: str) -> list[int]:
        found = re.findall(r" ?\w+|\s|[^\w\s]", text)
        self.words += [word for word in dict.fromkeys(found) if word not in self.words]
        return [self.words.index(word) for word in found]

    encode_answer = encode_ordinary

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self.words[i] for i in ids)


class Script(nn.Module):
    """A model that answers each text as `answers` says, and notes how it was asked."""

    def __init__(self, words: Words, answers: dict[str, str]) -> None:
        super().__init__()
        self.words, self.answers, self.asked = words, answers, []
        self.config = SimpleNamespace(end_of_text=(0,), block_size=400, prefix_tokens=0)
        self.device = torch.device("cpu")

    def prefill(self, idx: Tensor) -> list[int]:
        return idx[0].tolist()

    def answer(self, prompt: list[int]) -> list[int]:
        self.asked.append(prompt)
        text = self.words.decode(prompt)
        said = [answer for own, answer in self.answers.items() if re.search(rf"\b{own}\b", text)]
        return [*self.words.encode_ordinary(said[0] if said else " film"), 0]

    def stream(
        self, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float = 1.0,
        top_k: int | None = None, past: Any = None, batch_size: int | None = None,
    ) -> Iterator[SimpleNamespace]:
        answers = [self.answer([*(past or []), *prompt])[:max_new_tokens] for prompt in prompts]
        for step in range(max(map(len, answers))):
            rows = [row for row, answer in enumerate(answers) if step < len(answer)]
            tokens = torch.tensor([answers[row][step] for row in rows])[:, None]
            logits = torch.zeros(len(rows), Words.size).scatter_(1, tokens, 9.0)
            yield SimpleNamespace(rows=rows, logits=logits, tokens=tokens)

    def generate(self, idx: Tensor, max_new_tokens: int, *rest: Any, **more: Any) -> Tensor:
        answers = [self.answer(row)[:max_new_tokens] for row in idx.tolist()]
        width = max(map(len, answers))
        new = torch.tensor([answer + [0] * (width - len(answer)) for answer in answers])
        return torch.cat([idx, new], dim=1)


class Block(nn.Module):
    """A block's sub-layers by their names in GPT-2, each ending in the module of a slot."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = (nn.ModuleDict({name: nn.Identity(), "c_proj": nn.Linear(1, 1)})
                               for name in ("resid_dropout", "dropout"))


class StandIn(nn.Module):
    """What other methods need of a decoder; its keys and values are rows of a table of tokens."""

    def __init__(self, config: Any, table: Tensor, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config, self.shape, self.learned_prefix, self.asked = config, shape, list, []
        self.device = torch.device("cpu")
        self.h = nn.ModuleList(Block() for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.table = nn.Parameter(table)

    def prefill(self, idx: Tensor) -> list[tuple[Tensor, Tensor]]:
        self.asked.append(idx.tolist())
        parts = self.table[idx[0]].unflatten(1, self.shape).permute(1, 2, 0, 3)[:, None]
        return list(zip(parts[::2], parts[1::2], strict=True))  # each (1, heads, tokens, features)
