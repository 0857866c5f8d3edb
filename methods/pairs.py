"""Batches of preference pairs, which DPO trains on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from methods.build import reference_model
from methods.dpo import Measures, PreferenceConfig, measure
from model import Decoder
from runtime.device import autocast
from runtime.kv_cache import Prefix
from runtime.processes import gather_shares, own_share, rank
from runtime.run_folder import read_reference


class Pair(NamedTuple):
    """A chosen and a rejected answer to one prompt: examples of `dataloader.py`."""

    chosen: Any
    rejected: Any
    reference: tuple[float, float]  # log-probabilities under the reference model, in nats

    @property
    def prompt(self) -> list[int]:
        return self.chosen.prompt

    @property
    def length(self) -> int:
        return max(self.chosen.length, self.rejected.length)


@dataclass(frozen=True)
class PairBatch:
    """n pairs: the first n of the `rows`, a batch of `dataloader.py`, hold the chosen answers.

    `reference` (2n,) holds the log-probabilities of the rows under the reference model.
    """

    measures: ClassVar[tuple[str, ...]] = Measures._fields

    rows: Any
    reference: Tensor
    objective: PreferenceConfig

    @property
    def prefix(self) -> Tensor:
        return self.rows.prefix

    @property
    def weight(self) -> int:
        return len(self.reference) // 2

    def measure(self, model: Decoder, past: Prefix) -> Tensor:
        """Return the `measures` as one tensor; `past` is the prefix, prefilled."""
        log_probs = self.rows.log_probs(model, past)  # (2n,)
        return torch.stack(measure(log_probs, self.reference, self.objective))

    def to(self, device: torch.device) -> "PairBatch":
        return replace(self, rows=self.rows.to(device), reference=self.reference.to(device))


def collate_pairs(
    pairs: Sequence[Pair], prefix: list[int], objective: PreferenceConfig,
    collate: Callable[[Sequence[Any], list[int]], Any],
) -> PairBatch:
    """Put `pairs` into one batch; `collate` makes the batch of all their rows."""
    chosen, rejected, reference = zip(*pairs, strict=True)
    rows = collate([*chosen, *rejected], prefix)
    return PairBatch(rows, torch.tensor(reference).T.flatten(), objective)


@torch.no_grad()
def reference_log_probs(
    loader: Any, model: Decoder, config: Any, dtype: torch.dtype, saved: Path | None
) -> dict[str, Tensor]:
    """Let `loader` serve the pairs of training and validation; return their log-probabilities.

    Each split has those of n pairs (n, 2) under the base of `model`, in nats. All ranks compute
    them once, before the training; a resumed run reads them from its folder, `saved`.
    """
    splits = {split: loader.records(split) for split in ("train", "validation")}
    if saved:
        found = read_reference(saved, {split: len(pairs) for split, pairs in splits.items()})
    else:
        with reference_model(model, config, model.device) as base, autocast(base.device, dtype):
            found = {split: _log_probs(loader, base, pairs, config.eval_batch_size)
                     for split, pairs in splits.items()}
    for split, log_probs in found.items():
        loader.compare(config, split, log_probs.tolist())
    return found


def _log_probs(loader: Any, base: Decoder, records: Sequence[Any], batch_size: int) -> Tensor:
    base.eval()
    own, progress = own_share(records), "" if rank() else "reference model"
    own = loader.likelihoods(base, own, batch_size, progress) if own else []
    base.train()
    return torch.tensor([[-nats for nats, _ in pair] for pair in gather_shares(own)])  # (n, 2)
