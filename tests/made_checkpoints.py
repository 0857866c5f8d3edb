"""Tiny checkpoints of transformers, and adapted models of ours that load them."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from made_models import TINY
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lora import lora_layers
from model import GPT

IDX = torch.arange(12).view(2, 6)
CONV1D = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
SHAPE = {
    "vocab_size": TINY.vocab_size, "n_positions": TINY.block_size, "n_layer": TINY.n_layer,
    "n_head": TINY.n_head, "n_embd": TINY.n_embd,
}

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def make_reference(folder: Path) -> GPT2LMHeadModel:
    """Write a random GPT-2 of transformers without zero parameters to `folder`; return it."""
    reference = GPT2LMHeadModel(GPT2Config(**SHAPE, layer_norm_epsilon=1e-3)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    return reference


def make_adapted(folder: Path, **changes: Any) -> GPT:
    """Load the checkpoint in `folder` with adapters whose B is not zero."""
    settings = {"lora_rank": 4, "lora_alpha": 6.0} | changes
    model = GPT.from_pretrained(str(folder), **settings)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    return model


def hub_tensors(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Return the tensors of `model` by our names, untransposed."""
    tensors = model.transformer.state_dict(prefix="transformer.")
    return {name: t.t() if name.endswith(CONV1D) else t for name, t in tensors.items()}
