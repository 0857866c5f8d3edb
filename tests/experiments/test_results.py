"""Rows read the scores in their runs' folders."""

from pathlib import Path

from made_runs import make_run

from checkpoints.files import read_json, write_json
from experiments.finished_runs import load_run
from experiments.results import mean_and_deviation
from tasks.registry import resolve_dataset
from train import TrainConfig


def test_mean_of_one_seed_has_no_deviation() -> None:
    assert mean_and_deviation([0.81234]) == "0.812"
    assert mean_and_deviation([1.0, 3.0], digits=1) == "2.0 ± 1.4"


def test_best_loss_is_the_lowest_after_the_start(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", "10", loss=9.5).folder)
    assert run.validation_loss == 9.5  # not the 9.0 of step 0


def test_run_of_an_older_version_has_the_defaults_of_settings_it_does_not_name(
    tmp_path: Path
) -> None:
    job = make_run(tmp_path / "run", "10", batch_size=4)
    about = read_json(job.folder / "config.json")
    del about["settings"]["gradient_accumulation_steps"]
    write_json(job.folder / "config.json", about)
    assert load_run(job.folder).config == resolve_dataset(TrainConfig(batch_size=4))
