"""How long a training or a scoring run may take, before it was made."""

import statistics
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from checkpoint import read_hub_shape
from dataloader import CustomDataLoader, SentimentTask
from devices import resolve_device, resolve_dtype
from jobs import Job
from measure import matrix_peak, useful_flops
from model import GPTConfig
from runlog import read_metrics, read_run, training_seconds
from train import TrainConfig

STARTUP = 6.0  # seconds until a script computes
EFFICIENCY = 0.25  # the speed of a run, as a share of one large matrix product's


class Estimate:
    """Seconds of a run: its useful FLOPs at this machine's speed, corrected by runs that ended.

    Raises ValueError or OSError if the model or the data, which every run needs, are not there.
    """

    def __init__(self, config: TrainConfig, at_once: int, jobs: Iterable[Job]) -> None:
        self.config, self.shape = config, GPTConfig(**read_hub_shape(config.init_from))
        task, device = SentimentTask(config.prompt), resolve_device(config.device)
        self.records = {split: task.read(config.dataset, split)
                        for split in ("train", "validation", "test")}
        peak = matrix_peak(resolve_dtype(config.dtype, device), device)["plain"]
        sharing = max(1.0, at_once / max(1, torch.cuda.device_count()))
        self.rate = EFFICIENCY * peak / sharing
        done = [job for job in jobs if job.script == "train.py" and job.finished]
        measured = sum(training_seconds(read_run(str(job.folder))["settings"],
                                        read_metrics(job.folder)) for job in done)
        if measured:
            self.rate *= sum(map(self.training, done)) / measured

    def flops(self, settings: Mapping[str, Any], verb: str) -> float:
        """Return the FLOPs that a review takes in a run of `settings`."""
        task = SentimentTask(settings.get("prompt", self.config.prompt))
        loader = CustomDataLoader(self.config.dataset, task, self.shape.block_size)
        prompts = [loader.encode_prompt(record) for record in self.records["test"][:100]]
        prefix = len(loader.prefix(prompts))
        own = statistics.mean(map(len, prompts)) - prefix
        rank = settings.get("lora_rank", TrainConfig.lora_rank)
        return useful_flops(self.shape, own, prefix / self.config.batch_size, rank, verb)

    def training(self, job: Job) -> float:
        """Return the seconds that the optimizer's steps may take."""
        window = self.config.batch_size * self.config.gradient_accumulation_steps
        return self.config.max_iters * window * self.flops(job.settings, "train") / self.rate

    def seconds(self, job: Job) -> float:
        """Return the seconds that all of a job may take."""
        test, scoring = len(self.records["test"]), self.flops(job.settings, "score") / self.rate
        if job.script == "generate.py":
            return STARTUP + test * scoring
        limit = self.config.eval_iters * self.config.eval_batch_size or sys.maxsize
        validated = min(limit, len(self.records["validation"]))
        times = 2 + max(0, self.config.max_iters - 1) // self.config.eval_interval
        return STARTUP + self.training(job) + 2 * (validated * times + test) * scoring
