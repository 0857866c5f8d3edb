"""The key-value cache of generation.

Dimensions as in `model.py`; S is the number of slots that a row can see.
"""

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]  # of one layer, each (B, H, tokens, D)


class Cache:
    """Keys and values of a batch during generation, in buffers that are allocated once.

    Row i has `lengths[i]` prompt tokens, padded on the right to the longest prompt; new tokens
    follow in the slots after it. A prefix that all rows share is not in the cache.
    """

    def __init__(self, lengths: Tensor, slots: int) -> None:
        self.lengths, self.slots = lengths, slots
        self.prompt_slots = self.used = 0
        self.buffers: list[KeyValue] = []  # of each layer (B, H, slots, D)

    def append(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
        """Write the next `k` and `v` (B, H, T, D) of a layer; return all that it holds."""
        if layer == len(self.buffers):
            shape = (*k.shape[:2], self.slots, k.size(3))
            self.buffers.append((k.new_empty(shape), v.new_empty(shape)))
        end = self.used + k.size(2)
        for buffer, new in zip(self.buffers[layer], (k, v), strict=True):
            buffer[:, :, self.used : end] = new
        keys, values = self.buffers[layer]
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` slots as used: all layers have appended them."""
        self.prompt_slots = self.prompt_slots or tokens
        self.used += tokens

    def next_positions(self) -> Tensor:
        """Return the position (B, 1) of each row's next token, counted without the prefix."""
        return (self.lengths + self.used - self.prompt_slots)[:, None]

    def next_mask(self) -> Tensor:
        """Return which slots each row's next token can see (B, 1, 1, S): all but the padding."""
        slots = torch.arange(self.used + 1, device=self.lengths.device)
        return ((slots < self.lengths[:, None]) | (slots >= self.prompt_slots))[:, None, None]
