"""Keys and values that are kept: the cache of generation, and a prefix that batches share.

Dimensions as in `model.py`; R rows are running, S is the number of slots in use.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from runtime.batching import pad
from runtime.kernels import last_contiguous

KeyValue = tuple[Tensor, Tensor]  # of one layer, each (B, K, tokens, D)
Prefix = list[KeyValue]  # of all layers, of batch 1
Store = Callable[[Tensor, Tensor], KeyValue]  # appends keys and values, returns those of all tokens


class View(NamedTuple):
    """What the tokens of one forward pass see in one layer, and which need an output."""

    prefix: KeyValue | None = None  # of the tokens before them, for all rows
    mask: Tensor | None = None  # (B or 1, 1, T or W, S): which own keys are seen; None is causal
    at: Tensor | None = None  # positions (B, W) that need an output; None is all
    store: Store | None = None  # appends to the cache of generation
    rotation: Tensor | None = None  # of the positions, in families that rotate queries and keys


# A part of the prompts has about as many tokens: enough for fast products, few for little padding.
PART_TOKENS = 512
SLOTS = 16  # a step attends to a multiple of so many, masked


class Cache:
    """Keys and values of the rows that are being generated, in buffers that are allocated once.

    Row i holds `used[i]` tokens in its first slots, and its next token takes the next one. The
    cache does not hold the prefix that all rows share.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens  # in all rows together
        self.memory: list[KeyValue] = []  # of each layer, each (tokens, K, D)
        self.buffers: list[KeyValue] = []  # the same memory as (places, K, slots, D)
        self.used: list[int] = []
        self.joining: slice | None = None  # the rows whose prompts run now; None: all, one token

    def turns(
        self, tokens: Tensor, prompts: list[list[int]]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what to run in turn, and which positions (B, 1) of it count; None is the last.

        First the next `tokens` (R, 1) of the rows, if there are any, then `prompts`, which become
        the next rows. On a CPU they run in parts, which are padded less: sort them by length.
        """
        if self.used:
            self.at = torch.tensor(self.used, device=tokens.device)  # (R,)
            self.each = torch.arange(len(self.used), device=tokens.device)
            used = max(self.used) + 1  # rounded up: oneDNN builds a kernel for every new size
            self.end = min(self.slots, -(-used // SLOTS) * SLOTS)
            yield tokens, None
            self.used = [length + 1 for length in self.used]
        size, on_cpu = len(prompts), tokens.device.type == "cpu"
        if on_cpu and prompts:
            size = max(1, PART_TOKENS * len(prompts) // sum(map(len, prompts)))
        for start in range(0, len(prompts), size or 1):
            part = prompts[start : start + size]
            lengths, rows = [len(prompt) for prompt in part], len(self.used)
            self.joining = slice(rows, rows + len(part))
            last = torch.tensor(lengths, device=tokens.device)[:, None] - 1
            yield pad(part, value=0).to(tokens.device), last
            self.used += lengths
        self.joining = None

    def shape(self, places: int, slots: int) -> None:
        """Make room for so many rows of so many tokens; there are none yet."""
        self.places, self.slots = places, slots
        self.buffers = [(self._as_rows(keys), self._as_rows(values))
                        for keys, values in self.memory]

    def _as_rows(self, memory: Tensor) -> Tensor:
        shape = self.places, memory.size(1), self.slots, memory.size(2)
        return memory.view(-1)[: math.prod(shape)].view(shape)

    def append(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
        """Store the new `k` and `v` (B, K, T, D) of a layer; return all that its rows attend to."""
        if layer == len(self.buffers):  # not before: autocast decides the dtype
            keys, values = (x.new_zeros(self.tokens, x.size(1), x.size(3)) for x in (k, v))
            self.memory.append((keys, values))
            self.buffers.append((self._as_rows(keys), self._as_rows(values)))
        keys, values = self.buffers[layer]
        if self.joining is not None:
            keys[self.joining, :, : k.size(2)], values[self.joining, :, : k.size(2)] = k, v
            return k, v
        keys[self.each, :, self.at], values[self.each, :, self.at] = k[:, :, 0], v[:, :, 0]
        rows = len(k)
        return keys[:rows, :, : self.end], values[:rows, :, : self.end]

    def next_positions(self) -> Tensor:
        """Return the position (R, 1) of each row's next token, counted from the row's start."""
        return self.at[:, None]

    def next_mask(self) -> Tensor:
        """Return which slots the next tokens see (R, 1, 1, S): their own row's, and themselves."""
        slots = torch.arange(self.end, device=self.at.device)
        return (slots <= self.at[:, None])[:, None, None]

    def keep(self, rows: list[int]) -> list[int]:
        """Drop all rows but these (ascending); return which of them now stands in each place.

        Only the last rows move, into the places that have become free.
        """
        movers = [row for row in rows if row >= len(rows)]
        kept = set(rows)
        order = [place if place in kept else movers.pop() for place in range(len(rows))]
        for place, row in enumerate(order):
            if place != row:
                end = self.used[row]
                for buffer in itertools.chain.from_iterable(self.buffers):
                    buffer[place, :, :end] = buffer[row, :, :end]
        self.used = [self.used[row] for row in order]
        return order


class SharedPrefix:
    """A prefix that all batches share, of the tokens `idx` (1, P); `prefill` computes it.

    The batches accumulate their gradients in `past`; `backward` propagates the sum to the adapters,
    for which it computes the prefix again: no activation of it is kept beside those of a batch.
    """

    def __init__(self, prefill: Callable[[Tensor], Prefix], idx: Tensor) -> None:
        computed = checkpoint(prefill, idx, use_reentrant=False)
        self.computed = [tensor for pair in computed for tensor in pair]
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


def join_prefixes(first: Prefix, second: Prefix) -> Prefix:
    """Return the keys and values of two prefixes, one after the other; the first may be empty."""
    if not first:
        return [(last_contiguous(k), last_contiguous(v)) for k, v in second]
    return [(torch.cat((k, more_k), dim=2), torch.cat((v, more_v), dim=2))
            for (k, v), (more_k, more_v) in zip(first, second, strict=True)]


def prefix_length(prefix: Prefix | None) -> int:
    return prefix[0][0].size(2) if prefix else 0
