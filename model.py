"""GPT-2 (Radford et al., 2019) in nanoGPT's shape, with LoRA on selected projections.

Dimensions: B batch, T tokens, P tokens of a shared prefix, S tokens of a row after it, W positions
that need an output, C width (n_embd), H heads, D = C / H, V vocabulary. Tensor names are GPT-2's,
so that its published checkpoints load unchanged.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.hub_format import END_OF_TEXT, read_hub_layout, write_hub_layout
from lora import LoRALinear, check_state, is_lora_name, lora_layers
from runtime.kernels import attend, linear
from runtime.kv_cache import Cache, KeyValue

IGNORE = -100  # target of a position that is not supervised
MAX_RANK = 10_000  # more than any projection has features
LORA_TARGETS = ("c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
Prefix = list[KeyValue]  # of all layers, of batch 1
Store = Callable[[Tensor, Tensor], KeyValue]  # appends keys and values, returns those of all tokens


class Projection(LoRALinear):
    product = staticmethod(linear)


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2 and its adapters; the defaults are `gpt2` (124M) without LoRA.

    `lora_qkv="split"` gives q, k and v a rank-r pair each; "shared" gives them one A.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("c_attn",)
    lora_qkv: str = "split"

    def __post_init__(self) -> None:
        if unknown := set(self.lora_targets) - set(LORA_TARGETS):
            raise ValueError(
                f"lora_targets: unknown {', '.join(sorted(unknown))}; "
                f"allowed are {', '.join(LORA_TARGETS)}"
            )
        if self.lora_rank > MAX_RANK:
            raise ValueError(f"lora_rank={self.lora_rank} must be at most {MAX_RANK:,}")
        if self.lora_rank and not self.lora_targets:
            raise ValueError(f"lora_rank={self.lora_rank} needs at least one of lora_targets")
        if self.lora_qkv not in ("split", "shared"):
            raise ValueError(f"lora_qkv={self.lora_qkv!r} must be split or shared")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")

    def linear(self, target: str, in_features: int, out_features: int) -> Projection:
        """Make the projection called `target`, adapted if it is among `lora_targets`."""
        return Projection(
            in_features, out_features,
            lora_rank=self.lora_rank if target in self.lora_targets else 0,
            lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout,
            lora_groups=3 if (target, self.lora_qkv) == ("c_attn", "split") else 1,
        )


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
        self.c_attn = config.linear("c_attn", config.n_embd, 3 * config.n_embd)
        self.c_proj = config.linear("attn.c_proj", config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, prefix: KeyValue | None, mask: Tensor | None, at: Tensor | None,
        store: Store | None,
    ) -> tuple[Tensor, KeyValue]:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if at is not None:
            q = at_positions(q.transpose(1, 2), at).transpose(1, 2)  # (B, H, W, D)
        if store is not None:
            k, v = store(k, v)  # each (B, H, S, D)
        y = attend(q, k, v, prefix, mask, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, -1, C)  # (B, T or W, C)
        return self.resid_dropout(self.c_proj(y)), (k, v)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = config.linear("mlp.c_fc", config.n_embd, 4 * config.n_embd)
        self.c_proj = config.linear("mlp.c_proj", 4 * config.n_embd, config.n_embd)
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

    def forward(
        self, x: Tensor, prefix: KeyValue | None = None, mask: Tensor | None = None,
        at: Tensor | None = None, store: Store | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Return the output for `x` (B, T, C), and the rows' own keys and values.

        The output is (B, T, C), or (B, W, C) at the positions `at` (B, W). `store` appends the keys
        and values of `x` to a cache and returns all that it holds.
        """
        attended, own = self.attn(self.ln_1(x), prefix, mask, at, store)
        x = attended + (x if at is None else at_positions(x, at))
        return x + self.mlp(self.ln_2(x)), own


class GPT(nn.Module):
    """GPT-2 with the output head tied to the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, config.layer_norm_epsilon),
        })
        for name, parameter in self.named_parameters():
            self._init_weight(name, parameter)

    def _init_weight(self, name: str, parameter: Tensor) -> None:
        """Draw from N(0, 0.02), scaled down into the residual stream (GPT-2 paper, section 2.3)."""
        if is_lora_name(name) or ".ln_" in name:
            return
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            residual = name.endswith("c_proj.weight")
            nn.init.normal_(parameter, std=0.02 / (2 * self.config.n_layer) ** (0.5 * residual))

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, past: Prefix | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor, Tensor | None]:
        """Return (logits, loss) for token ids `idx` (B, T) that follow `past`.

        Without `targets` the logits are (B, T, V) and the loss is None. `targets` (B, T) holds the
        token after each position, or -100 where none is supervised. With it the logits are
        (supervised positions, V) in row-major order and the loss is their mean cross-entropy in
        nats per token; with `reduction="none"` it is the cross-entropy of each position.

        Raises ValueError if the sequence with its past is longer than the block size.
        """
        self._check_length(idx.size(1) + prefix_length(past))
        if targets is None:
            return self._head(self._run_blocks(idx, past)[0]), None
        supervised = targets != IGNORE  # (B, T)
        # Each row's supervised positions in order; rows with fewer are filled with other positions.
        most = int(supervised.sum(dim=1).max())
        at = supervised.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, W)
        x, _ = self._run_blocks(idx, past, at)
        logits = self._head(x[supervised.gather(1, at)])
        return logits, F.cross_entropy(logits, targets[supervised], reduction=reduction)

    def prefill(self, idx: Tensor) -> Prefix:
        """Return keys and values of a prefix `idx` (1, P), differentiable, to use as `past`."""
        if len(idx) != 1:
            raise ValueError(f"all rows share a prefix: it is 1 sequence, not {len(idx)}")
        if not idx.numel():
            return []
        self._check_length(idx.size(1))
        return self._run_blocks(idx, at=idx.new_empty(1, 0))[1]

    def _check_length(self, length: int) -> None:
        limit = self.config.block_size
        if length > limit:
            raise ValueError(f"sequence of {length} tokens is longer than block_size={limit}")

    def _run_blocks(
        self, idx: Tensor, prefix: Prefix | None = None, at: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Prefix]:
        """Return the final hidden states of `idx` (B, T), and its keys and values in each layer.

        The states are (B, T, C), or (B, W, C) at the positions `at` (B, W): the last block computes
        only keys and values at all others. An empty `cache` takes the prompts, a used one the next
        token of each row.
        """
        P, T = prefix_length(prefix), idx.size(1)
        positions, mask = torch.arange(P, P + T, device=idx.device), None
        if cache is not None and cache.used:
            positions, mask = P + cache.next_positions(), cache.next_mask()
        # The residual stream has the precision of the layer norms, not that of the matrices.
        dtype = self.transformer.ln_f.weight.dtype
        x = self.transformer.wte(idx).to(dtype) + self.transformer.wpe(positions).to(dtype)
        x = self.transformer.drop(x)  # (B, T, C)
        keys_and_values = []
        for layer, block in enumerate(self.transformer.h):
            store = partial(cache.append, layer) if cache is not None else None
            chosen = at if layer == self.config.n_layer - 1 else None
            if chosen is not None:
                mask = torch.arange(T, device=idx.device) <= at[:, None, :, None]  # (B, 1, W, T)
            x, own = block(x, prefix[layer] if prefix else None, mask, chosen, store)
            keys_and_values.append(own)
        if cache is not None:
            cache.advance(T)
        return self.transformer.ln_f(x), keys_and_values

    def _head(self, x: Tensor) -> Tensor:
        """Return logits in the embedding's precision: 16 bits would make label words equal."""
        weight = self.transformer.wte.weight
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(weight.dtype), weight)  # (..., C) x (C, V) -> (..., V)

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        past: Prefix | None = None,
    ) -> Tensor:
        """Return `idx` (B, T) followed by up to `max_new_tokens` new tokens per row.

        Rows that have ended are padded with end-of-text; generation stops when all have ended.
        """
        steps = self.stream(idx, max_new_tokens, temperature, top_k, past)
        return torch.cat([idx, *(token for _, token in steps)], dim=1)

    @torch.no_grad()
    def stream(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        past: Prefix | None = None, lengths: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each step the logits (B, V) and the tokens (B, 1) chosen from them.

        Rows of different `lengths` (B,) are padded on the right. temperature=0 or top_k=1 is
        greedy. Without `past` and `lengths`, generation continues beyond the block size with the
        last `block_size` tokens.

        Raises ValueError for a row without tokens, for a negative `temperature` or `top_k`, or if
        rows with a `past` or with `lengths` would exceed the block size.
        """
        limit = self.config.block_size
        room = limit - prefix_length(past)
        longest = idx.size(1) if lengths is None else int(lengths.max())
        if not idx.size(1) or (lengths is not None and int(lengths.min()) < 1):
            raise ValueError("each prompt needs at least one token")
        if (past is not None or lengths is not None) and longest + max_new_tokens - 1 > room:
            raise ValueError(f"prompt and {max_new_tokens} new tokens exceed block_size={limit}")
        context = tokens = idx[:, :longest][:, -room:]  # (B, T)
        B, T = context.shape
        lengths = idx.new_full((B,), T) if lengths is None else lengths
        cache = Cache(lengths, slots=min(T + max_new_tokens - 1, room))
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if cache.is_full():  # the window slides, which changes the position of every token
                cache.restart(torch.full_like(lengths, room))
                tokens = context
            at = None if cache.used else cache.lengths[:, None] - 1  # (B, 1)
            x, _ = self._run_blocks(tokens, past, at, cache)
            logits = self._head(x[:, -1])  # (B, V)
            # A vocabulary may be padded with tokens that no tokenizer knows.
            tokens = choose_token(logits[:, : END_OF_TEXT + 1], temperature, top_k).masked_fill(
                ended[:, None], END_OF_TEXT)  # (B, 1)
            yield logits, tokens
            ended |= tokens[:, 0] == END_OF_TEXT
            if ended.all():
                return
            context = torch.cat((context, tokens), dim=1)[:, -room:]

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, **changes: Any) -> "GPT":
        """Load `gpt2-mini`, a local folder or a hub id in the Hugging Face layout, in float32.

        A Path is a local folder, never a hub id.
        `changes` are fields of `GPTConfig` (dropout, LoRA); fresh adapters change no output.

        Raises ValueError for an architecture or tensors that are not GPT-2's, OSError for files
        that are missing or out of reach.
        """
        shape, weights = read_hub_layout(name_or_dir)
        with torch.device("meta"):  # the weights come from the file: do not initialise any
            model = cls(GPTConfig(**shape, **changes))
        base = {name: t for name, t in model.state_dict().items() if not is_lora_name(name)}
        check_state(base, weights, str(name_or_dir))
        model.load_state_dict(weights, strict=False, assign=True)
        for layer in lora_layers(model).values():
            layer.lora_A = nn.Parameter(torch.empty_like(layer.lora_A, device="cpu"), False)
            layer.lora_B = nn.Parameter(torch.empty_like(layer.lora_B, device="cpu"), False)
            layer.reset_lora_parameters()
        return model

    def store_frozen_projections(self, dtype: torch.dtype) -> None:
        """Convert frozen projections to the compute `dtype` once, instead of at every use."""
        for module in self.modules():
            if isinstance(module, LoRALinear) and not module.weight.requires_grad:
                module.weight.data = module.weight.data.to(dtype)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model in the Hugging Face layout, adapters merged into the weights."""
        weights = {name: t for name, t in self.state_dict().items() if not is_lora_name(name)}
        for name, layer in lora_layers(self).items():
            weights[f"{name}.weight"] = layer.merged_weight()
        write_hub_layout(folder, asdict(self.config), weights)


class SharedPrefix:
    """Keys and values of a prefix that all batches share: one forward and one backward pass.

    The batches accumulate their gradients in `past`; `backward` propagates the sum to the adapters.
    """

    def __init__(self, model: GPT, prefix: Tensor) -> None:
        self.computed = [tensor for pair in model.prefill(prefix.to(model.device))
                         for tensor in pair]
        self.leaves = [self._leaf(tensor) for tensor in self.computed]
        self.past = list(zip(self.leaves[::2], self.leaves[1::2], strict=True))

    @staticmethod
    def _leaf(computed: Tensor) -> Tensor:
        leaf = computed.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        leaf.requires_grad = computed.requires_grad
        leaf.grad = torch.zeros_like(leaf) if computed.requires_grad else None
        return leaf

    def backward(self) -> None:
        pairs = [(tensor, leaf.grad.to(tensor.dtype))
                 for tensor, leaf in zip(self.computed, self.leaves, strict=True)
                 if tensor.requires_grad]
        if pairs:  # empty without a prefix, or if no adapter acts on keys and values
            tensors, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(tensors, gradients)


def at_positions(x: Tensor, at: Tensor) -> Tensor:
    """Return `x` (B, T, ...) at the positions `at` (B, W): (B, W, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], at]


def prefix_length(prefix: Prefix | None) -> int:
    return prefix[0][0].size(2) if prefix else 0


def choose_token(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Pick the next token (B, 1) from `logits` (B, V); temperature 0 or top_k 1 is greedy."""
    if not (temperature >= 0 and (top_k or 0) >= 0):
        raise ValueError(f"temperature={temperature} and top_k={top_k} must not be negative")
    if temperature == 0 or top_k == 1:
        return logits.argmax(dim=-1, keepdim=True)
    # Subtract the largest logit first, so that no temperature overflows; one that float32 rounds
    # to zero would divide zero by zero.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)
