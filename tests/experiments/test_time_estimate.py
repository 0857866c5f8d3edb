"""An estimate grows with the work, and learns from the runs that ended."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_runs import make_run

from bench.flops import matrix_peak, useful_flops
from experiments.jobs import Job
from experiments.time_estimate import STARTUP, Estimate
from model import GPTConfig
from train import TrainConfig


def job(folder: Path, script: str = "train.py", **settings: object) -> Job:
    return Job("run", script, settings, folder, "last/results.json")


def test_estimate_grows_with_steps_and_with_what_is_trained(
    config: TrainConfig, tmp_path: Path
) -> None:
    estimate = Estimate(config, 1, [])
    lora = estimate.seconds(job(tmp_path, lora_rank=4))
    assert STARTUP < lora < estimate.seconds(job(tmp_path, lora_rank=0))
    estimate.config = replace(config, max_iters=2 * config.max_iters)
    assert estimate.seconds(job(tmp_path, lora_rank=4)) > lora
    assert STARTUP < estimate.seconds(job(tmp_path, "generate.py")) < lora


def test_fewer_examples_and_shorter_ones_take_less(
    config: TrainConfig, questions: str, tmp_path: Path
) -> None:
    config = replace(config, task="python_codes", dataset=questions)
    whole = Estimate(config, 1, [])
    fewer = Estimate(replace(config, test_size=1), 1, [])
    shorter = Estimate(replace(config, block_size=32), 1, [])
    score = job(tmp_path, "generate.py", lora_rank=0)
    fewer.rate = shorter.rate = whole.rate  # it is measured anew each time
    assert fewer.seconds(score) < whole.seconds(score)
    assert shorter.training(job(tmp_path)) < whole.training(job(tmp_path))


def test_longer_prompt_takes_longer(config: TrainConfig, tmp_path: Path) -> None:
    estimate = Estimate(config, 1, [])
    shared, own = (estimate.training(job(tmp_path, prompt=prompt)) for prompt in
                   ("terse", "question"))  # the question stands behind the review: no prefix
    assert own > 1.3 * shared


@pytest.mark.parametrize("factor", [0.5, 20.0])
def test_finished_runs_correct_the_estimate(
    config: TrainConfig, tmp_path: Path, factor: float
) -> None:
    first = Estimate(config, 1, [])
    seconds = factor * first.training(job(tmp_path))
    reviews = config.max_iters * config.batch_size * config.gradient_accumulation_steps
    done = make_run(tmp_path / "done", "1")
    lines = [{"iteration": 0, "reviews_per_second": reviews / seconds},
             {"iteration": 80, "validation_loss": 1.0}]
    (done.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corrected = Estimate(config, 1, [done])
    assert corrected.training(job(tmp_path)) == pytest.approx(seconds)


def test_model_and_data_that_every_run_needs_must_be_there(config: TrainConfig) -> None:
    with pytest.raises(OSError, match="no train split"):
        Estimate(replace(config, dataset=config.init_from), 1, [])
    with pytest.raises(OSError, match=r"config\.json"):
        Estimate(replace(config, init_from=config.dataset), 1, [])


def test_useful_flops_are_twice_the_weights_that_a_token_meets() -> None:
    """By brute force: count the products of each matrix with each token that needs it."""
    shape, own, prefix, rank = GPTConfig(n_layer=3, n_head=2, n_embd=10), 29.0, 0.5, 4
    attention, output, mlp = 3 * 10 * 10, 10 * 10, 8 * 10 * 10
    forward = 2 * ((own + prefix) * (2 * (attention + output + mlp) + attention)
                   + 2 * (output + mlp) + 2 * shape.vocab_size * 10)
    another_token = 2 * 2 * (attention + output + mlp)
    assert useful_flops(shape, own, prefix, rank, "score") == forward + another_token
    assert useful_flops(shape, own, prefix, 0, "train") == 3 * forward
    pairs = 2 * (own + prefix) * 3 * 3 * (10 * rank + rank * 10)
    assert useful_flops(shape, own, prefix, rank, "train") == 2 * forward + 3 * pairs


def test_peak_is_of_a_plausible_size() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        peak = matrix_peak(dtype, torch.device("cpu"))
        assert 1e8 < peak["plain"] <= peak["best"] < 1e14
