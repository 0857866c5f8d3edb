"""Random models whose answers are worth comparing, and samplers of them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataloader import CustomDataLoader
from generate import ModelSampler
from model import GPT, GPTConfig
from tasks.python_code import PythonCodesTask
from tasks.scores import Prediction
from tasks.sentiment import PROMPTS, SentimentTask

TINY = GPTConfig(block_size=64, vocab_size=101, n_layer=2, n_head=2, n_embd=32)
END, POSITIVE, NEGATIVE = 50256, 3967, 4633
GPT2_PROMPTS = {name: text for name, text in PROMPTS.items() if name != "chat"}
LORA_TARGETS = GPTConfig.groups["all"]
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def noisy(model: GPT) -> GPT:
    """Make every parameter count."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def shaken(model: GPT) -> GPT:
    """Make every parameter count, and the two labels and end-of-text likely answers."""
    noisy(model)
    with torch.no_grad():
        one, other = 2 * torch.randn(2, model.config.n_embd)
        model.transformer.wte.weight[[POSITIVE, NEGATIVE, END]] = torch.stack((one, -one, other))
    return model


def stubborn(model: GPT, token: int) -> GPT:
    """Make `model` say `token` whatever it is asked."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[token] = 5
    return model


def make_sampler(
    model: GPT, dataset: str = "", prompt: str = "terse", share_prefix: bool = True, **changes: Any
) -> ModelSampler:
    task, block_size = SentimentTask(prompt), model.config.block_size
    loader = CustomDataLoader(dataset, task, block_size, share_prefix=share_prefix)
    return ModelSampler(model, loader, **changes)


def assert_same(predictions: list[Prediction], expected: list[Prediction]) -> None:
    assert [p[:2] for p in predictions] == [p[:2] for p in expected]
    close([p.label_logprobs for p in predictions], [p.label_logprobs for p in expected])


def loader_of(dataset: str, block_size: int = 128, **changes: Any) -> CustomDataLoader:
    return CustomDataLoader(dataset, PythonCodesTask(), block_size, **changes)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON lines file, such as predictions.jsonl."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
