"""Keys and values that are kept: the cache of generation, and a prefix that batches share.

Dimensions as in `model.py`; S is the number of slots in use.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

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


class Cache:
    """Keys and values of a batch during generation, in buffers that are allocated once.

    Row i has `lengths[i]` prompt tokens, padded on the right to the longest prompt; new tokens
    take the slots after it. The cache does not hold the prefix that all rows share.
    """

    def __init__(self, lengths: Tensor, slots: int) -> None:
        self.slots = slots
        self.buffers: list[KeyValue] = []  # of each layer, each (B, K, slots, D)
        self.restart(lengths)

    def restart(self, lengths: Tensor) -> None:
        """Forget all tokens and wait for prompts of `lengths` (B,); the buffers are kept."""
        self.lengths, self.rows = lengths, slice(None)  # the rows that are running
        self.prompt_slots = self.used = 0

    def is_full(self) -> bool:
        return self.used == self.slots

    def turns(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield parts of the next `tokens` (B, T) to run in turn, and which positions (B, 1) count.

        Rows of prompts run with few others on a CPU, so that they are padded less: sort them by
        length. After the last part the tokens count as used.
        """
        if self.used:
            yield tokens, None
        else:
            yield from self._prompts(tokens)
            self.prompt_slots = tokens.size(1)
        self.used += tokens.size(1)

    def _prompts(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        B = len(tokens)
        on_cpu = tokens.device.type == "cpu"
        size = max(1, PART_TOKENS * B // int(self.lengths.sum())) if on_cpu else B
        for start in range(0, B, size):
            self.rows = slice(start, start + size)
            lengths = self.lengths[self.rows]
            yield tokens[self.rows, : int(lengths.max())], lengths[:, None] - 1
        self.rows = slice(None)

    def append(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
        """Write the next `k` and `v` (B, K, T, D) of a layer; return all it holds (B, K, S, D)."""
        if layer == len(self.buffers):  # not before: autocast decides the dtype
            shape = (len(self.lengths), k.size(1), self.slots, k.size(3))
            self.buffers.append((k.new_zeros(shape), v.new_zeros(shape)))
        end = self.used + k.size(2)
        keys, values = (buffer[self.rows, :, :end] for buffer in self.buffers[layer])
        keys[:, :, self.used :], values[:, :, self.used :] = k, v
        return keys, values

    def next_positions(self) -> Tensor:
        """Return the position (B, 1) of each row's next token, counted from the row's start."""
        return (self.lengths + self.used - self.prompt_slots)[:, None]

    def next_mask(self) -> Tensor:
        """Return which slots the next tokens see (B, 1, 1, S + 1): all but the padding."""
        slots = torch.arange(self.used + 1, device=self.lengths.device)
        return ((slots < self.lengths[:, None]) | (slots >= self.prompt_slots))[:, None, None]


class SharedPrefix:
    """A prefix, as `prefill` computed it, that all batches share: one forward and backward pass.

    The batches accumulate their gradients in `past`; `backward` propagates the sum to the adapters.
    """

    def __init__(self, computed: Prefix) -> None:
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
        return second
    return [(torch.cat((k, more_k), dim=2), torch.cat((v, more_v), dim=2))
            for (k, v), (more_k, more_v) in zip(first, second, strict=True)]


def prefix_length(prefix: Prefix | None) -> int:
    return prefix[0][0].size(2) if prefix else 0
