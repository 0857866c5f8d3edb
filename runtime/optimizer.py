"""AdamW and its learning rate schedule, for fine-tuning and pretraining."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from configurator import Bounds


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer, with the homework's defaults."""

    max_iters: Annotated[int, "optimizer steps", Bounds(0)] = 80
    learning_rate: Annotated[float, "peak rate", Bounds(0)] = 2.5e-4
    weight_decay: Annotated[float, "weight decay, on matrices only", Bounds(0)] = 0.1
    beta1: Annotated[float, "decay rate of the gradient's mean", Bounds(0, 1)] = 0.9
    beta2: Annotated[float, "decay rate of the gradient's second moment", Bounds(0, 1)] = 0.95
    grad_clip: Annotated[float, "largest gradient norm; 0 disables clipping", Bounds(0)] = 1.0
    warmup_iters: Annotated[int, "steps of linear warm-up", Bounds(0)] = 0
    decay_lr: Annotated[bool, "cosine decay down to min_lr"] = False
    lr_decay_iters: Annotated[int, "step at which min_lr is reached; 0 is max_iters", Bounds(0)] = 0
    min_lr: Annotated[float, "rate at the end of the decay", Bounds(0)] = 2.5e-5


def learning_rate_at(iteration: int, config: OptimizerConfig) -> float:
    """Return the rate: linear warm-up, then constant or a cosine from learning_rate to min_lr."""
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return config.learning_rate
    steps = max(1, (config.lr_decay_iters or config.max_iters) - config.warmup_iters)
    progress = min(1.0, (iteration - config.warmup_iters) / steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, iteration: int, config: OptimizerConfig
) -> float:
    """Set the learning rate of `iteration` in `optimizer` and return it."""
    rate = learning_rate_at(iteration, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def configure_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, with weight decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # allocated now, not between the activations of the first step
        parameter.grad = torch.zeros_like(parameter)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True,
    )
