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
        group["lr"] = rate * group.get("rate_factor", 1.0)
    return rate


def configure_optimizer(
    model: nn.Module, config: OptimizerConfig, lora_plus_ratio: float = 1.0
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, with weight decay on matrices only.

    LoRA's B learns `lora_plus_ratio` times faster than all else (LoRA+, Hayou et al. 2024,
    arXiv:2402.12354).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():  # allocated now, not between the first step's activations
        parameter.grad = torch.zeros_like(parameter)
    fast = {name for name in trained if name.endswith("lora_B")} if lora_plus_ratio != 1 else set()
    decayed = {name for name, parameter in trained.items() if parameter.ndim >= 2}
    groups = [
        {"params": decayed - fast, "weight_decay": config.weight_decay},
        {"params": fast, "weight_decay": config.weight_decay, "rate_factor": lora_plus_ratio},
        {"params": trained.keys() - decayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group | {"params": [p for name, p in trained.items() if name in group["params"]]}
         for group in groups if group["params"]],
        lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True,
    )
