"""An estimate of how long a run takes."""

import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch

from bench.flops import matrix_peak, useful_flops
from dataloader import CustomDataLoader
from experiments.jobs import Job
from models.families import load_config
from models.tokenizer import load_tokenizer
from runtime.device import resolve_device, resolve_dtype
from runtime.metrics import read_metrics, training_seconds
from tasks.registry import find_task, make_task
from train import TrainConfig

STARTUP = 6.0  # seconds before a script starts to compute
EFFICIENCY = 0.25  # speed of a run relative to one large matrix product


class Estimate:
    """Estimate the seconds of a run from its useful FLOPs and the speed of this machine.

    Runs that have finished correct the speed. Raises ValueError or OSError if the model or the
    data is missing.
    """

    def __init__(self, config: TrainConfig, at_once: int, jobs: Iterable[Job]) -> None:
        self.config, self.shape = config, load_config(config.init_from)
        self.tokens = cache(self.count_tokens)  # many runs share a prompt
        task, device = make_task(config.task, config.prompt), resolve_device(config.device)
        self.records = {split: task.read(config.dataset, split)
                        for split in ("train", "validation", "test")}
        peak = matrix_peak(resolve_dtype(config.dtype, device), device)["plain"]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the runs need it
        sharing = max(1.0, at_once / max(1, torch.cuda.device_count()))
        self.rate = EFFICIENCY * peak / sharing
        done = [job for job in jobs if job.script == "train.py" and job.finished]
        measured = sum(training_seconds(read_metrics(job.folder), run.window, run.max_iters)
                       for job, run in zip(done, map(self.run, done), strict=True))
        if measured:
            self.rate *= sum(map(self.training, done)) / measured

    def count_tokens(self, prompt: str) -> tuple[float, int, float]:
        """Return the mean tokens of an example after the prefix, of the prefix, of an answer."""
        task = make_task(self.config.task, prompt)
        longest = self.config.block_size or self.shape.block_size
        loader = CustomDataLoader(
            self.config.dataset, task, longest, tokenizer=load_tokenizer(self.config.init_from))
        some = self.records["test"][:100]
        prompts = [loader.encode_prompt(record) for record in some]
        answers = [loader.encode_answer(task.answer(record)) for record in some]
        prefix = len(loader.prefix(prompts))
        answer = 1 + statistics.mean(map(len, answers)) + task.reasoning_room
        return statistics.mean(map(len, prompts)) - prefix + answer - 2, prefix, answer

    def flops(self, settings: Mapping[str, Any], verb: str) -> float:
        """Return the FLOPs that an example takes in a run of `settings`."""
        own, prefix, answers = self.tokens(settings.get("prompt", self.config.prompt))
        run = replace(self.config, **{name: settings.get(name, getattr(TrainConfig, name))
                                      for name in ("method", "lora_rank", "lora_targets")})
        shape = replace(self.shape, lora_targets=run.targets)
        # LoRA's siblings have as little of their own to compute as adapters of a small rank.
        rank = run.lora_rank if run.trained in ("lora", "full") else 8
        shown = settings.get("shots", 0) * (prefix + own)  # computed once, but seen by all
        return useful_flops(
            shape, own, (prefix + shown) / self.config.batch_size, rank, verb, answers)

    def run(self, job: Job) -> TrainConfig:
        """Return the settings of a job, as far as they are training's."""
        known = {field.name for field in fields(TrainConfig)} & job.settings.keys()
        return replace(self.config, **{name: job.settings[name] for name in known})

    def training(self, job: Job) -> float:
        """Estimate the seconds of the optimizer steps."""
        run = self.run(job)
        return run.max_iters * run.window * self.flops(job.settings, "train") / self.rate

    def seconds(self, job: Job) -> float:
        """Estimate the seconds of a whole job."""
        test = min(self.config.test_size or sys.maxsize, len(self.records["test"]))
        scoring = self.flops(job.settings, "score") / self.rate
        if job.script == "generate.py":
            return STARTUP + test * scoring
        run = self.run(job)
        limit = run.eval_iters * run.eval_batch_size or sys.maxsize
        validated = min(limit, len(self.records["validation"]))
        times = 2 + max(0, run.max_iters - 1) // run.eval_interval
        passes = 2 if find_task(run.task).quick else 1  # the loss, and the answers
        scored = 1 if times == 2 else 2  # checkpoints; the best is the last if there is one
        return STARTUP + self.training(job) + (passes * validated * times + scored * test) * scoring
