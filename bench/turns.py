"""Contenders take turns in one run, each in a process of its own: load on the machine hits all."""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from bench.flops import matrix_peak
from bench.settings import BenchConfig
from bench.worker import Contender, Measure, Worker, spread
from methods.build import MethodName
from runtime.device import DTYPES, resolve_device
from tasks.sources import Record
from train import TrainConfig

SIBLINGS: tuple[MethodName, ...] = ("bitfit", "bottleneck", "prefix", "full")  # of LoRA
MIB = 2**20
Ask = Callable[[Contender, int], Any]  # what a contender gets in a turn; turn 0 warms it up


class Turns(NamedTuple):
    """The measures of one contender."""

    first: Measure  # the warm-up
    rounds: list[Measure]
    saved: int  # bytes of its checkpoint; 0 if none was asked for

    @property
    def seconds(self) -> float:
        return statistics.median(measure.seconds for measure in self.rounds)

    @property
    def mib(self) -> float:
        return self.rounds[-1].memory / MIB


def training_config(config: BenchConfig, contender: Contender) -> TrainConfig:
    """Return the homework's training settings for one contender."""
    method = contender.way if contender.way in SIBLINGS else "lora"
    rank = config.lora_rank if method == "lora" else 0
    return TrainConfig(
        method=method, prompt=config.prompt,
        device=config.device, dtype=contender.dtype, dataset=config.dataset, train_size=0,
        batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed,
        lora_rank=rank, lora_alpha=4.0 * rank)


def draw_reviews(verb: str, records: Sequence[Record], seed: int) -> Ask:
    """Return what draws, for each turn, as many reviews as a contender takes for `verb`."""
    rng = random.Random(seed)
    return lambda contender, turn: spread(records, getattr(contender, verb), rng)


def take_turns(
    contenders: Sequence[Contender], verb: str, ask: Ask, folder: str, config: BenchConfig,
    details: bool = False,
) -> tuple[dict[str, Turns], dict[str, dict[str, float]]]:
    """Run `verb` in each contender once to warm up and then `rounds` times, in turns.

    Returns each contender's measures and {}; with `details` also the size of each checkpoint, and
    the machine's median peaks for each precision.
    """
    device = resolve_device(config.device)
    workers: dict[str, Worker] = {}
    measures: dict[str, list[Measure]] = {contender.name: [] for contender in contenders}
    dtypes = dict.fromkeys(one.dtype for one in contenders) if details else {}
    peaks: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in dtypes}
    for turn in tqdm(range(config.rounds + 1), verb, unit="round"):
        for contender in contenders:
            if turn == 0:  # one after another: a start would slow another's first step down
                workers[contender.name] = Worker(
                    contender, folder, training_config(config, contender))
            asked = ask(contender, turn)
            measures[contender.name].append(workers[contender.name].ask(verb, asked))
        for dtype, found in peaks.items():
            found.append(matrix_peak(DTYPES[dtype], device))
    turns = {}
    for name, worker in workers.items():
        saved = worker.ask("checkpoint_bytes", None).result if details else 0
        turns[name] = Turns(measures[name][0], measures[name][1:], saved)
        worker.stop()
    medians = {dtype: {kind: statistics.median(peak[kind] for peak in found) for kind in found[0]}
               for dtype, found in peaks.items()}
    return turns, medians
