"""The rate follows its schedule; the optimizer trains A and B only and decays only matrices."""

import pytest
import torch

from lora import is_lora_name
from methods.build import build_model
from model import GPT
from runtime.optimizer import (
    OptimizerConfig,
    configure_optimizer,
    learning_rate_at,
    set_learning_rate,
)
from train import TrainConfig


def test_learning_rate_warms_up_then_follows_the_cosine_to_its_floor() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_iters=4, decay_lr=True, lr_decay_iters=14,
                             min_lr=0.1, max_iters=20)
    rates = [learning_rate_at(iteration, config) for iteration in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.55)
    assert rates[14:] == pytest.approx([0.1] * 6)


def test_learning_rate_is_constant_unless_it_decays() -> None:
    config = OptimizerConfig(learning_rate=3e-4, max_iters=10, min_lr=1e-5)
    assert {learning_rate_at(iteration, config) for iteration in range(10)} == {3e-4}


def test_weight_decay_spares_biases_and_layer_norms(tiny: GPT) -> None:
    groups = configure_optimizer(tiny, OptimizerConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    matrices, vectors = ({id(p) for p in group["params"]} for group in groups)
    assert matrices == {id(p) for p in tiny.parameters() if p.ndim == 2}
    assert vectors == {id(p) for p in tiny.parameters() if p.ndim == 1}
    assert groups[0]["betas"] == (0.9, 0.95)


def test_optimizer_holds_only_the_adapters(config: TrainConfig) -> None:
    model = build_model(config.init_from, config, torch.device("cpu"), torch.float32)
    held = {id(p) for group in configure_optimizer(model, config).param_groups
            for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if is_lora_name(name)}


def test_every_group_gets_the_rate_of_the_iteration(tiny: GPT) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_iters=3)
    optimizer = configure_optimizer(tiny, config)
    assert set_learning_rate(optimizer, 1, config) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
