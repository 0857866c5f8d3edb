"""A contender of the benchmark without a process of its own."""

import time
from typing import Any

import torch

from bench.worker import WAYS, Contender, Measure, checkpoint_bytes
from runtime.device import peak_memory
from train import TrainConfig


class InProcess:
    """A contender in this process, with the interface of `Worker`."""

    def __init__(self, contender: Contender, folder: str, config: TrainConfig) -> None:
        self.started = time.perf_counter()
        self.contender = WAYS[contender.way](folder, config, torch.device("cpu"))

    def ask(self, verb: str, argument: Any) -> Measure:
        begun = time.perf_counter()
        result = (checkpoint_bytes(self.contender) if verb == "checkpoint_bytes" else
                  getattr(self.contender, verb)(argument))
        ended = time.perf_counter()
        memory = peak_memory(torch.device("cpu"))
        return Measure(result, ended - begun, memory, ended - self.started)

    def stop(self) -> None:
        pass
