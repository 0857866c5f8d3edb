"""GPT-2 (Radford et al., 2019) in nanoGPT's shape, with LoRA on selected projections.

`Decoder` is the machinery that GPT-2 shares with the families in `models/`: it computes losses
behind a shared prefix, generates, loads and saves. Dimensions: B batch, T tokens, P tokens of a
shared prefix, S tokens of a row after it, W positions that need an output, C width (n_embd), H
heads, K heads of keys and values (here H), D features of a head (here C / H), V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.layouts import END_OF_TEXT, GPT2, Layout
from checkpoints.pretrained import read_shape, read_weights, write_pretrained
from lora import LoRALinear, is_lora_name, lora_layers
from runtime.attention import attend
from runtime.batching import Queue, Step, pad
from runtime.device import shapes_only
from runtime.kernels import at_positions, choose_token, cross_entropies, dropout_linear, linear
from runtime.kv_cache import Cache, KeyValue, Prefix, View, join_prefixes, prefix_length

IGNORE = -100  # target of a position that is not supervised
MAX_RANK = 10_000  # more than any projection has features


class Projection(LoRALinear):
    product = staticmethod(linear)

    def dropped_product(self, x: Tensor, weight: Tensor) -> Tensor:
        return dropout_linear(x, weight, self.lora_dropout.p if self.training else 0.0)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What the shapes of all families share, and the adapters; raises ValueError if they misfit.

    `lora_targets` are names of projections, or groups of them. `lora_qkv="split"` gives q, k and v
    a rank-r pair each; "shared" gives them one A.
    """

    groups: ClassVar[Mapping[str, tuple[str, ...]]]  # of projections: qkv, attention, all
    known_tokens: ClassVar[int | None] = None  # in a vocabulary that is padded

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    end_of_text: tuple[int, ...] = (END_OF_TEXT,)  # each of these tokens ends an answer
    dropout: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("qkv",)
    lora_qkv: str = "split"
    lora_rank_stabilized: bool = False
    prefix_tokens: int = 0  # learned keys and values before all tokens

    def __post_init__(self) -> None:
        allowed = (*self.groups, *self.groups["all"])
        if unknown := set(self.lora_targets) - set(allowed):
            raise ValueError(f"lora_targets: unknown {', '.join(sorted(unknown))}; "
                             f"allowed are {', '.join(allowed)}")
        if self.lora_rank > MAX_RANK:
            raise ValueError(f"lora_rank={self.lora_rank} must be at most {MAX_RANK:,}")
        if self.lora_rank and not self.lora_targets:
            raise ValueError(f"lora_rank={self.lora_rank} needs at least one of lora_targets")
        if self.lora_qkv not in ("split", "shared"):
            raise ValueError(f"lora_qkv={self.lora_qkv!r} must be split or shared")

    def projection(
        self, target: str, in_features: int, out_features: int, bias: bool = True, parts: int = 1
    ) -> Projection:
        """Make the projection called `target`, of `parts` fused ones, adapted if targeted."""
        targeted = any(target in self.groups.get(name, (name,)) for name in self.lora_targets)
        return Projection(
            in_features, out_features, bias, lora_rank=self.lora_rank if targeted else 0,
            lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout,
            lora_groups=parts if self.lora_qkv == "split" else 1,
            lora_rank_stabilized=self.lora_rank_stabilized,
        )


@dataclass(frozen=True, kw_only=True)
class GPTConfig(DecoderConfig):
    """Shape of a GPT-2 and its adapters; the defaults are `gpt2` (124M) without LoRA."""

    known_tokens = END_OF_TEXT + 1
    groups = {  # noqa: RUF012
        "qkv": ("c_attn",), "attention": ("c_attn", "attn.c_proj"),
        "all": ("c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    }

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")


SIZES = {  # as OpenAI published them
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = config.projection("c_attn", config.n_embd, 3 * config.n_embd, parts=3)
        self.c_proj = config.projection("attn.c_proj", config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, view: View) -> tuple[Tensor, KeyValue]:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if view.at is not None:
            q = at_positions(q.transpose(1, 2), view.at).transpose(1, 2)  # (B, H, W, D)
        if view.store is not None:
            k, v = view.store(k, v)  # each (B, H, S, D)
        y = attend(q, k, v, view.prefix, view.mask, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, -1, C)  # (B, T or W, C)
        return self.resid_dropout(self.c_proj(y)), (k, v)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = config.projection("mlp.c_fc", config.n_embd, 4 * config.n_embd)
        self.c_proj = config.projection("mlp.c_proj", 4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, view: View) -> tuple[Tensor, KeyValue]:
        """Return the output for `x` (B, T, C), and the rows' own keys and values.

        The output is (B, T, C), or (B, W, C) at the positions `view.at`.
        """
        attended, own = self.attn(self.ln_1(x), view)
        x = attended + (x if view.at is None else at_positions(x, view.at))
        return x + self.mlp(self.ln_2(x)), own


class Decoder(nn.Module):
    """What all families compute alike, on their own `blocks`, `embed` and `rotation`."""

    layout: ClassVar[Layout]  # of checkpoints
    config_class: ClassVar[type[DecoderConfig]]
    fan_in_fan_out = False  # whether transformers stores projections transposed

    blocks: nn.ModuleList
    norm: nn.Module  # after the last block
    head: Tensor  # weight (V, C) of the output layer

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.learned_prefix: Callable[[], Prefix] = list  # none; a module if the method has one

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Return the input (B, T, C) of the first block, in the precision of the norms."""
        raise NotImplementedError

    def rotation(self, positions: Tensor) -> Tensor | None:
        """Return what the blocks rotate queries and keys by, if they do."""
        return None

    def init_weights(self, residual: tuple[str, ...]) -> None:
        """Draw from N(0, 0.02), less where a layer writes to the residual stream (GPT-2, 2.3)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                shrinks = name.endswith(residual)
                std = 0.02 / (2 * self.config.n_layer) ** (0.5 * shrinks)
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        return self.head.device

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, past: Prefix | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (logits, loss) for token ids `idx` (B, T) that follow `past`.

        Without `targets` the logits are (B, T, V) and the loss is None. `targets` (B, T) holds the
        token after each position, or -100 where none is supervised: the logits are then (supervised
        positions, V) in row-major order, the loss is their mean cross-entropy in nats per token.
        Raises ValueError if the tokens are more than the block size.
        """
        if targets is None:
            return self._head(self._run_blocks(idx, self._before(idx, past))[0]).contiguous(), None
        logits = self._head(self._states_at(idx, targets, past)).contiguous()
        return logits, F.cross_entropy(logits, targets[targets != IGNORE])

    def nats(self, idx: Tensor, targets: Tensor, past: Prefix | None = None) -> Tensor:
        """Return the cross-entropy (supervised positions,) without all logits at once."""
        x = self._states_at(idx, targets, past)
        with torch.autocast(x.device.type, enabled=False):
            return cross_entropies(x.to(self.head.dtype), self.head, targets[targets != IGNORE])

    def _states_at(self, idx: Tensor, targets: Tensor, past: Prefix | None) -> Tensor:
        """Return the final hidden states at the supervised positions, in row-major order."""
        supervised = targets != IGNORE  # (B, T)
        # Each row's supervised positions in order; rows with fewer are filled with other positions.
        most = int(supervised.sum(dim=1).max())
        at = supervised.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, W)
        return self._run_blocks(idx, self._before(idx, past), at)[0][supervised.gather(1, at)]

    def prefill(self, idx: Tensor) -> Prefix:
        """Return, to use as `past`, a learned prefix and then `idx` (1, P), differentiable."""
        if len(idx) != 1:
            raise ValueError(f"all rows share a prefix: it is 1 sequence, not {len(idx)}")
        learned = self._before(idx)
        if not idx.numel():
            return learned
        own = self._run_blocks(idx, learned, at=idx.new_empty(1, 0))[1]
        return join_prefixes(learned, own)

    def _before(self, idx: Tensor, past: Prefix | None = None) -> Prefix:
        """Return what stands before `idx` (B, T): `past`, or a learned prefix; check the length."""
        past, limit = past or self.learned_prefix(), self.config.block_size
        if (length := idx.size(1) + prefix_length(past)) > limit:
            raise ValueError(f"sequence of {length} tokens is longer than block_size={limit}")
        return past

    def _run_blocks(
        self, idx: Tensor, prefix: Prefix | None = None, at: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Prefix]:
        """Return the final hidden states of `idx` (B, T), and its keys and values in each layer.

        The states are (B, T, C), or (B, W, C) at the positions `at` (B, W): the last block computes
        only keys and values at all others. A `cache` takes prompts, or the next token of each row.
        """
        P, T = prefix_length(prefix), idx.size(1)
        positions, mask = torch.arange(P, P + T, device=idx.device), None
        if cache is not None and cache.joining is None:
            positions, mask = P + cache.next_positions(), cache.next_mask()
        x, rotation = self.embed(idx, positions), self.rotation(positions)  # (B, T, C)
        keys_and_values = []
        for layer, block in enumerate(self.blocks):
            store = partial(cache.append, layer) if cache is not None else None
            chosen = at if layer == self.config.n_layer - 1 else None
            if chosen is not None:
                mask = torch.arange(T, device=idx.device) <= at[:, None, :, None]  # (B, 1, W, T)
            before = prefix[layer] if prefix else None
            x, own = block(x, View(before, mask, chosen, store, rotation))
            keys_and_values.append(own)
        return self.norm(x), keys_and_values

    def _head(self, x: Tensor) -> Tensor:
        """Return logits in the head's precision: 16 bits would make label words equal."""
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(self.head.dtype), self.head)  # (..., C) x (C, V) -> (..., V)

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        past: Prefix | None = None,
    ) -> Tensor:
        """Return `idx` (B, T) and up to `max_new_tokens` more per row, padded with end-of-text."""
        new: list[list[int]] = [[] for _ in idx]
        for step in self.stream(idx.tolist(), max_new_tokens, temperature, top_k, past):
            for row, token in zip(step.rows, step.tokens.tolist(), strict=True):
                new[row] += token
        return torch.cat([idx, pad(new, self.config.end_of_text[0]).to(idx)], dim=1)

    @torch.no_grad()
    def stream(
        self, prompts: Sequence[list[int]], max_new_tokens: int | Sequence[int],
        temperature: float = 1.0, top_k: int | None = None, past: Prefix | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Step]:
        """Yield the next token of each running row of `prompts`, step by step.

        `batch_size` rows of mean length run at once, all by default; one that has ended leaves, and
        another takes its place. Each may have its own limit of tokens. temperature=0 or top_k=1 is
        greedy. Without `past` a row continues beyond the block size, from its last tokens. Raises
        ValueError for a row without tokens, a negative `temperature` or `top_k`, or too long a row.
        """
        past, size = past or self.learned_prefix(), self.config.block_size
        window = size - prefix_length(past)
        queue = Queue(prompts, max_new_tokens, batch_size, window, self.config.end_of_text)
        if past and max(queue.limits, default=0) > window + 1:  # the last token is not computed
            raise ValueError(f"prompt and {max_new_tokens} new tokens exceed block_size={size}")
        cache, tokens = Cache(queue.tokens), torch.empty(0, 1, device=self.device)
        while (joining := queue.admit()) or queue.rows:
            if not cache.used:
                cache.shape(queue.places, queue.slots)
            last = [self._run_blocks(part, past, at, cache)[0][:, -1]  # (B, C)
                    for part, at in cache.turns(tokens, joining)]
            logits = self._head(torch.cat(last))  # (R, V)
            new = choose_token(logits[:, : self.config.known_tokens], temperature, top_k)
            step = Step(queue.rows, logits, new)  # nothing of it is used again
            queue.reorder(places := cache.keep(queue.accept(new.flatten().tolist())))
            tokens = new[places]
            yield step

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, prepare: Callable[["Decoder"], Any] = lambda _: None,
        **changes: Any,
    ) -> "Decoder":
        """Load a checkpoint of this family by its name, its path or its hub id, in float32.

        A Path is local, never a hub id. `prepare` may change dtypes of the model before its weights
        are read. `changes` are fields of the config; new adapters change no output. Raises
        ValueError for another architecture or tensors, OSError for files out of reach.
        """
        shape = read_shape(name_or_dir, cls.layout)
        with shapes_only():  # the weights come from the file
            prepare(model := cls(cls.config_class(**shape, **changes)))
        base = {name: t for name, t in model.state_dict().items() if not is_lora_name(name)}
        weights = read_weights(name_or_dir, cls.layout, base)
        model.load_state_dict(weights, strict=False, assign=True)
        for layer in lora_layers(model).values():
            layer.lora_A = nn.Parameter(torch.empty_like(layer.lora_A, device="cpu"), False)
            layer.lora_B = nn.Parameter(torch.empty_like(layer.lora_B, device="cpu"), False)
            layer.reset_lora_parameters()
        return model

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model in the Hugging Face layout, adapters merged into the weights."""
        weights = {name: t for name, t in self.state_dict().items() if not is_lora_name(name)}
        for name, layer in lora_layers(self).items():
            weights[f"{name}.weight"] = layer.merged_weight()
        write_pretrained(folder, self.layout, asdict(self.config), weights)


class GPT(Decoder):
    """GPT-2 with the output head tied to the token embedding."""

    layout, config_class, fan_in_fan_out = GPT2, GPTConfig, True

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, config.layer_norm_epsilon),
        })
        self.init_weights(residual=("c_proj",))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h

    @property
    def norm(self) -> nn.LayerNorm:
        return self.transformer.ln_f

    @property
    def head(self) -> Tensor:
        return self.transformer.wte.weight

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        # The residual stream has the precision of the layer norms, not that of the matrices.
        dtype = self.norm.weight.dtype
        x = self.transformer.wte(idx).to(dtype) + self.transformer.wpe(positions).to(dtype)
        return self.transformer.drop(x)  # (B, T, C)
