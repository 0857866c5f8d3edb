"""The key-value cache of generation.

Dimensions as in `model.py`; S is the number of slots in use.
"""

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]  # of one layer, each (B, H, tokens, D)


class Cache:
    """Keys and values of a batch during generation, in buffers that are allocated once.

    Row i has `lengths[i]` prompt tokens, padded on the right to the longest prompt; new tokens
    take the slots after it. The cache does not hold the prefix that all rows share.
    """

    def __init__(self, lengths: Tensor, slots: int) -> None:
        self.slots = slots
        self.buffers: list[KeyValue] = []  # of each layer, each (B, H, slots, D)
        self.restart(lengths)

    def restart(self, lengths: Tensor) -> None:
        """Forget all tokens and wait for prompts of `lengths` (B,); the buffers are kept."""
        self.lengths = lengths
        self.prompt_slots = self.used = 0

    def is_full(self) -> bool:
        return self.used == self.slots

    def append(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
        """Write the next `k` and `v` (B, H, T, D) of a layer; return all it holds (B, H, S, D)."""
        if layer == len(self.buffers):  # not before: autocast decides the dtype
            shape = (*k.shape[:2], self.slots, k.size(3))
            self.buffers.append((k.new_empty(shape), v.new_empty(shape)))
        end = self.used + k.size(2)
        keys, values = self.buffers[layer]
        keys[:, :, self.used : end], values[:, :, self.used : end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more slots as used, once all layers have filled them."""
        self.prompt_slots = self.prompt_slots or tokens
        self.used += tokens

    def next_positions(self) -> Tensor:
        """Return the position (B, 1) of each row's next token, counted from the row's start."""
        return (self.lengths + self.used - self.prompt_slots)[:, None]

    def next_mask(self) -> Tensor:
        """Return which slots the next tokens see (B, 1, 1, S + 1): all but the padding."""
        slots = torch.arange(self.used + 1, device=self.lengths.device)
        return ((slots < self.lengths[:, None]) | (slots >= self.prompt_slots))[:, None, None]
