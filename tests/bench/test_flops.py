"""The useful FLOPs are those that torch counts, in every family."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.flops import count_weights, useful_flops
from lora import mark_only_lora_as_trainable
from model import GPT, IGNORE, Decoder, DecoderConfig, GPTConfig
from models.families import FAMILIES
from models.llama import Llama, LlamaConfig

SIZE = {"block_size": 64, "vocab_size": 103, "n_layer": 3, "n_embd": 24}
SHAPES: dict[type[Decoder], DecoderConfig] = {
    GPT: GPTConfig(n_head=4, **SIZE),
    Llama: LlamaConfig(n_head=4, n_kv_head=2, head_size=10, mlp_size=37, tied=True,
                       end_of_text=(0,), **SIZE),
}
ROWS, OWN, PREFIX = 5, 13, 10
IDX = torch.arange(ROWS * OWN).view(ROWS, OWN)
TARGETS = torch.full_like(IDX, IGNORE)
TARGETS[:, -2:] = 1  # a label word and end-of-text
PROMPT = torch.arange(PREFIX)[None]


@pytest.fixture(autouse=True)
def _countable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute all products with torch's own kernels, which its counter knows."""
    monkeypatch.setattr("runtime.kernels.onednn_is_faster", lambda: False)


def counted(action: Callable[[], object]) -> float:
    """Return the FLOPs of the linear layers in `action`, of one row, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        action()
    found = counter.get_flop_counts()["Global"]
    return sum(found.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)) / ROWS


@pytest.fixture(params=SHAPES)
def family(request: pytest.FixtureRequest) -> type[Decoder]:
    return request.param


def test_every_family_is_counted() -> None:
    assert set(SHAPES) == set(FAMILIES)


def test_forward_pass_with_a_prefix_is_a_third_of_full_training(family: type[Decoder]) -> None:
    shape = SHAPES[family]
    model = family(shape)
    flops = counted(lambda: model(IDX, TARGETS, model.prefill(PROMPT)))
    assert useful_flops(shape, OWN, PREFIX / ROWS, 0, "train") == pytest.approx(3 * flops)


def test_full_training_step_is_counted_to_the_last_product(family: type[Decoder]) -> None:
    model = family(SHAPES[family])
    flops = counted(lambda: model(IDX, TARGETS)[1].backward())
    assert useful_flops(model.config, OWN, 0, 0, "train") == flops


@pytest.mark.parametrize("targets", [("qkv",), ("attention",), ("all",)])
def test_lora_training_step_is_counted(family: type[Decoder], targets: tuple[str, ...]) -> None:
    """All but the gradient of the first block's input, which nothing frozen needs."""
    shape = replace(SHAPES[family], lora_targets=targets)
    model = family(replace(shape, lora_rank=3))
    mark_only_lora_as_trainable(model)
    flops = counted(lambda: model(IDX, TARGETS)[1].backward())
    first = [layer for name, layer in model.blocks[0].named_modules()
             if name.rpartition(".")[2] in shape.groups["qkv"]]
    unneeded = 2 * OWN * sum(layer.weight.numel() + layer.lora_A.numel() for layer in first)
    assert useful_flops(shape, OWN, 0, 3, "train") == flops + unneeded


def test_scoring_is_counted_but_for_the_last_keys_of_an_answer(family: type[Decoder]) -> None:
    shape = SHAPES[family]
    model, answers = family(shape).eval(), 4
    past = model.prefill(PROMPT)
    flops = counted(lambda: [*islice(model.stream(IDX.tolist(), answers, 0, past=past), answers)])
    flops += counted(lambda: model.prefill(PROMPT))
    last = 2 * (answers - 1) * count_weights(shape, 0)[0].qkv
    expected = useful_flops(shape, OWN, PREFIX / ROWS, 4, "score", answers) + last
    assert expected == pytest.approx(flops)
