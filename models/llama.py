"""Llama (Touvron et al. 2023, arXiv:2302.13971), which SmolLM2, TinyLlama, Llama 3 and Qwen2 share.

It differs from GPT-2 in RMSNorm, rotary positions, grouped-query attention and SwiGLU. Dimensions
as in `model.py`; K heads of keys and values, D = head_size. Tensor names are those of the hub.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from checkpoints.layouts import LLAMA
from model import Decoder, DecoderConfig
from runtime.attention import attend
from runtime.elementwise import rms_norm, rotate, swiglu
from runtime.kernels import at_positions
from runtime.kv_cache import KeyValue, View

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Shape of a Llama and its adapters.

    `rope_scaling` holds Llama 3's factor, low and high frequency factor, and original length in
    tokens. Raises ValueError if the sizes do not fit together.
    """

    groups = {  # noqa: RUF012
        "qkv": QKV, "attention": (*QKV, "o_proj"),
        "all": (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"),
    }

    n_kv_head: int
    head_size: int
    mlp_size: int
    norm_epsilon: float = 1e-6
    rope_base: float = 1e4
    rope_scaling: tuple[float, ...] | None = None
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} must be even for rotary positions")
        if self.lora_rank and self.lora_qkv == "shared":
            raise ValueError("lora_qkv=shared is for GPT-2, which has q, k and v in one matrix")


class RMSNorm(nn.Module):
    """Divide by the root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


def frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Return the angle (D/2,) by which each pair of features turns per position (arXiv:2104.09864).

    With `rope_scaling`, slow rotations are slower by `factor`, fast ones stay, and those between
    are interpolated (Llama 3.1, arXiv:2407.21783).
    """
    D = config.head_size
    turns = config.rope_base ** (-torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    if config.rope_scaling is None:
        return turns
    factor, low, high, length = config.rope_scaling
    rotations = turns * length / (2 * math.pi)  # within the original length
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return turns * (kept + (1 - kept) / factor)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size, self.dropout = config.head_size, config.dropout
        C, D, bias = config.n_embd, config.head_size, config.qkv_bias
        self.q_proj = config.projection("q_proj", C, config.n_head * D, bias)
        self.k_proj = config.projection("k_proj", C, config.n_kv_head * D, bias)
        self.v_proj = config.projection("v_proj", C, config.n_kv_head * D, bias)
        self.o_proj = config.projection("o_proj", config.n_head * D, C, config.output_bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, view: View) -> tuple[Tensor, KeyValue]:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))  # (B, H or K, T, D)
        q, k = rotate(q, view.rotation), rotate(k, view.rotation)
        if view.at is not None:
            q = at_positions(q.transpose(1, 2), view.at).transpose(1, 2)  # (B, H, W, D)
        if view.store is not None:
            k, v = view.store(k, v)  # each (B, K, S, D)
        y = attend(q, k, v, view.prefix, view.mask, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)  # (B, T or W, H·D)
        return self.resid_dropout(self.o_proj(y)), (k, v)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        C, inner, bias = config.n_embd, config.mlp_size, config.mlp_bias
        self.gate_proj = config.projection("gate_proj", C, inner, bias)
        self.up_proj = config.projection("up_proj", C, inner, bias)
        self.down_proj = config.projection("down_proj", inner, C, bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x))))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, view: View) -> tuple[Tensor, KeyValue]:
        """Return the output and the rows' own keys and values, as GPT-2's block does."""
        attended, own = self.self_attn(self.input_layernorm(x), view)
        x = attended + (x if view.at is None else at_positions(x, view.at))
        return x + self.mlp(self.post_attention_layernorm(x)), own


class Llama(Decoder):
    """A decoder of the Llama family, its head tied to the token embedding or not."""

    layout, config_class = LLAMA, LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.n_embd),
            "layers": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "norm": RMSNorm(config.n_embd, config.norm_epsilon),
        })
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights(residual=("o_proj", "down_proj"))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def norm(self) -> RMSNorm:
        return self.model.norm

    @property
    def head(self) -> Tensor:
        return (self.model.embed_tokens if self.config.tied else self.lm_head).weight

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        return self.model.embed_tokens(idx).to(self.norm.weight.dtype)  # (B, T, C)

    def rotation(self, positions: Tensor) -> Tensor:
        """Return what `rotate` takes: (2, T, D) for positions (T,), (2, B, 1, 1, D) for (B, 1)."""
        angles = positions[..., None] * frequencies(self.config, positions.device)  # (..., T, D/2)
        if angles.ndim == 3:
            angles = angles[:, None]  # one position per row, for all heads
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))
