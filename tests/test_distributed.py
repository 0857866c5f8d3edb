"""Under torchrun the same global batch gives the same losses."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import distributed
from runlog import read_metrics
from train import Run, TrainConfig, train

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(checkpoint: str, reviews: str, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        init_from=checkpoint, dataset=reviews, out_dir=str(tmp_path / "alone"), device="cpu",
        dtype="float32", lora_rank=4, lora_alpha=8.0, lora_dropout=0.0, learning_rate=1e-2,
        batch_size=4, gradient_accumulation_steps=2, max_iters=4, eval_interval=2,
        wandb_mode="disabled",
    )


def test_two_processes_lose_what_one_does(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    shared = replace(config, out_dir=str(tmp_path / "shared"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "train.py", *(f"{name}={value}" for name, value in asdict(shared).items()),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters (") == 1  # only rank 0 speaks
    for mine, alone in zip(read_metrics(Path(shared.out_dir)),
                           read_metrics(Path(config.out_dir)), strict=True):
        assert mine.keys() == alone.keys()
        for key in {"train_loss", "validation_loss"} & mine.keys():
            assert mine[key] == pytest.approx(alone[key], abs=1e-6)
    assert (Path(shared.out_dir) / "last" / "results.json").is_file()


def test_processes_that_cannot_share_the_window_are_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="must be a multiple of the 3 processes"):
        Run(config)


def test_one_process_is_rank_zero_of_one_and_sums_nothing() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.start_processes("cpu", "auto") == torch.device("cpu")
    tensor = torch.ones(3)
    distributed.sum_over_ranks([tensor])
    torch.testing.assert_close(tensor, torch.ones(3))
