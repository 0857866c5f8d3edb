"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190).

Section 4.2 puts P positions before the text whose keys and values are parameters, in every layer;
queries see them as they see tokens. Trained directly, they are P × 2·L·K·D numbers. Section 4.3
computes them in training from P small vectors by a network, which is dropped afterwards:

    prefix = W_2 tanh(W_1 e + b_1) + b_2        e (P, K·D), W_1 (inner, K·D), W_2 (2·L·K·D, inner)

L layers, K heads of keys and values, D features a head. The text begins at position P.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.files import read_fitting, read_json, write_json, write_tensors
from checkpoints.peft_format import ADAPTER, ADAPTER_CONFIG
from model import Decoder
from runtime.kv_cache import Prefix

TENSOR = "prompt_embeddings"  # as PEFT calls it: (P, 2·L·K·D), the key of layer l before its value


class LearnedPrefix(nn.Module):
    """The keys and values of P positions, each (1, K, P, D), in all layers."""

    def __init__(self, start: Tensor, shape: tuple[int, int, int], inner: int = 0) -> None:
        """Start at `start` (P, 2·L·K·D), or with `inner` features at a random network's output."""
        super().__init__()
        self.shape = shape  # 2·L, K, D
        self.network = nn.Identity()
        if inner:
            size = shape[1] * shape[2]
            self.network = nn.Sequential(
                nn.Linear(size, inner), nn.Tanh(), nn.Linear(inner, start.size(1)))
            start = torch.randn(len(start), size)
        self.embedding = nn.Parameter(start)

    def flat(self) -> Tensor:
        return self.network(self.embedding)  # (P, 2·L·K·D)

    def forward(self) -> Prefix:
        parts = self.flat().unflatten(1, self.shape).permute(1, 2, 0, 3)[:, None]
        return list(zip(parts[::2], parts[1::2], strict=True))  # of each layer, (1, K, P, D) twice


def add_prefix(model: Decoder, tokens: int, inner: int = 0) -> None:
    """Put a learned prefix of `tokens` positions on `model` and train nothing else.

    It starts as what the model computes for random tokens (section 7.4), so that the model begins
    nearly untouched; with a network of `inner` features it starts at random. Raises ValueError if
    no position is left for text.
    """
    config = model.config
    if tokens >= config.block_size:
        raise ValueError(f"prefix_tokens={tokens} must leave room in {config.block_size} positions")
    model.requires_grad_(False)
    vocabulary = min(config.known_tokens or config.vocab_size, config.vocab_size)
    words = torch.randint(vocabulary, (1, tokens))
    computed = model.prefill(words.to(model.device))
    model.learned_prefix = LearnedPrefix(*flatten(computed), inner).to(model.device)
    model.config = replace(config, prefix_tokens=tokens)


def flatten(prefix: Prefix) -> tuple[Tensor, tuple[int, int, int]]:
    """Return a prefix as PEFT stores it, (P, 2·L·K·D), and its shape (2·L, K, D)."""
    stacked = torch.cat([tensor for pair in prefix for tensor in pair])  # (2·L, K, P, D)
    return stacked.permute(2, 0, 1, 3).flatten(1).float(), (*stacked.shape[:2], stacked.size(3))


def save_prefix(model: Decoder, folder: Path, base_model: str) -> None:
    """Write the prefix of `model` in PEFT's layout, without the network that computes it."""
    prefix: LearnedPrefix = model.learned_prefix
    layers, heads, size = prefix.shape[0] // 2, *prefix.shape[1:]
    write_json(folder / ADAPTER_CONFIG, {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": base_model, "num_virtual_tokens": model.config.prefix_tokens,
        "num_layers": layers, "num_attention_heads": heads, "token_dim": heads * size,
        "num_transformer_submodules": 1, "encoder_hidden_size": heads * size,
        "prefix_projection": False,
    })
    write_tensors(folder / ADAPTER, {TENSOR: prefix.flat().detach()})


def load_prefix(model: Decoder, folder: Path) -> None:
    """Replace the prefix of `model` by the one in `folder`, which `save_prefix` or PEFT wrote.

    Raises ValueError, before anything changes, for another method or if the shape differs.
    """
    kind = read_json(folder / ADAPTER_CONFIG).get("peft_type")
    if kind != "PREFIX_TUNING":
        raise ValueError(f"{folder} holds peft_type={kind!s:.80}, not a learned prefix")
    prefix: LearnedPrefix = model.learned_prefix
    tensors = read_fitting(folder / ADAPTER, {TENSOR: prefix.flat()}, "prefix")
    model.learned_prefix = LearnedPrefix(tensors[TENSOR], prefix.shape).to(model.device)
