"""What a run is: when it resumes, extends, moves to other hardware, or finds its inputs changed."""

import json
import os
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import train as script
from checkpoints.files import read_json, write_json
from checkpoints.trainer_state import read_state, write_state
from configurator import run_script
from runtime.metrics import read_metrics
from runtime.run_folder import is_finished, read_run
from train import TrainConfig, train


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Return the exit code of `python train.py` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    try:
        run_script(script.main, TrainConfig)
    except SystemExit as end:
        return end.code
    return 0


def resume(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    return call(monkeypatch, "init_from=resume", f"out_dir={config.out_dir}", *arguments)


def stop_at(iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT (Ctrl-C) in the given step."""
    step = script.take_step

    def stopped(run: script.Run) -> str:
        if run.iteration == iteration:
            signal.raise_signal(signal.SIGINT)
        return step(run)

    monkeypatch.setattr(script, "take_step", stopped)


def test_interrupted_extension_goes_on_to_its_own_end(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(config, max_iters=2))
    folder = Path(config.out_dir)
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        assert resume(config, patch, "max_iters=6") == 130
    assert not is_finished(folder)
    assert read_run(config.out_dir).settings["max_iters"] == 6
    assert resume(config, monkeypatch) == 0
    assert is_finished(folder)
    assert read_metrics(folder)[-1]["iteration"] == 6


def test_fewer_steps_than_taken_are_refused_and_change_nothing(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, max_iters=2))
    before = Path(config.out_dir, "config.json").read_bytes()
    assert resume(config, monkeypatch, "max_iters=1") == 2
    assert "max_iters=1 is less than the 2 steps that the run has taken" in capsys.readouterr().err
    assert Path(config.out_dir, "config.json").read_bytes() == before
    assert is_finished(Path(config.out_dir))


def test_run_stopped_before_its_first_state_starts_again(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, max_iters=2)
    train(config)
    expected = read_metrics(Path(config.out_dir))
    for name in ("trainer_state.pt", "metrics.jsonl", "finished.json"):
        Path(config.out_dir, name).unlink()
    for name in ("best", "last"):
        shutil.rmtree(Path(config.out_dir, name))
    assert resume(config, monkeypatch) == 0
    found = read_metrics(Path(config.out_dir))
    assert [line.get("train_loss") for line in found] == [
        line.get("train_loss") for line in expected]


def test_finished_run_without_its_state_keeps_its_checkpoints(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, max_iters=1))
    Path(config.out_dir, "trainer_state.pt").unlink()
    assert resume(config, monkeypatch, "max_iters=2") == 2
    assert "it has best and last, but no trainer_state.pt" in capsys.readouterr().err
    assert is_finished(Path(config.out_dir))


def test_run_of_a_gpu_resumes_on_a_cpu_that_is_named(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, max_iters=1, dtype="auto"))
    path = Path(config.out_dir, "config.json")
    run = read_json(path)
    run["settings"]["device"] = "cuda"
    write_json(path, run | {"device": "Tesla T4", "dtype": "float16"})
    assert resume(config, monkeypatch, "max_iters=2") == 2
    assert "device='cuda' is not usable here; try auto or cpu" in capsys.readouterr().err
    assert resume(config, monkeypatch, "max_iters=2", "device=cpu") == 0
    saved = read_run(config.out_dir)
    assert (saved.device, saved.settings["device"]) == ("cpu", "cpu")
    assert saved.dtype in ("float32", "bfloat16")


@pytest.mark.parametrize("name", ["base model", "data set"])
def test_changed_inputs_are_refused(
    name: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, data = tmp_path / "base", tmp_path / "data"
    shutil.copytree(config.init_from, base)
    shutil.copytree(config.dataset, data)
    config = replace(config, init_from=str(base), dataset=str(data), max_iters=1)
    train(config)
    if name == "data set":
        with open(data / "train.jsonl", "a") as file:
            file.write("\n" + json.dumps({"text": "new", "label": 1}))
    else:
        weights = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert resume(config, monkeypatch, "max_iters=2") == 2
    assert f"the {name} changed since the run began" in capsys.readouterr().err
    assert is_finished(Path(config.out_dir))


def test_base_that_changes_in_training_is_no_base_of_the_scores(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(config.init_from, base)
    config = replace(config, init_from=str(base), max_iters=1)
    fit = script.fit

    def spoil(run: script.Run) -> None:
        fit(run)
        path = base / "config.json"
        path.write_text(path.read_text().replace('"n_head": 2', '"n_head": 4'))

    monkeypatch.setattr(script, "fit", spoil)
    with pytest.raises(ValueError, match="the base model changed since the run began"):
        train(config)
    assert not is_finished(Path(config.out_dir))


def test_test_split_that_cannot_be_asked_costs_no_training(
    config: TrainConfig, tmp_path: Path
) -> None:
    shutil.copytree(config.dataset, tmp_path / "data")
    with open(tmp_path / "data" / "test.jsonl", "a") as file:
        file.write('\n{"text": "", "label": 0}')
    with pytest.raises(ValueError, match="a prompt without words"):
        train(replace(config, dataset=str(tmp_path / "data"), prompt="{text}"))
    assert not Path(config.out_dir).exists()


def test_paths_are_found_from_another_working_directory(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(config.init_from, tmp_path / "base")
    shutil.copytree(config.dataset, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    relative = replace(config, init_from="base", dataset="data", out_dir="run", max_iters=1)
    assert call(monkeypatch, *(f"{name}={value}" for name, value in asdict(relative).items())) == 0
    monkeypatch.chdir(os.path.expanduser("~"))
    assert resume(config, monkeypatch, "max_iters=2") == 0
    assert read_run(config.out_dir).settings["init_from"] == str(tmp_path / "base")
    assert read_run(config.out_dir).settings["dataset"] == str(tmp_path / "data")


@pytest.mark.parametrize(("name", "value", "message"), [
    ("max_iters", "2", "max_iters='2' must be of type int"),
    ("max_iters", -1, "saved setting max_iters=-1 must be at least 0"),
    ("lora_dropout", 7.0, "saved setting lora_dropout=7.0 must be at most 1"),
    ("dtype", "int8", "saved setting dtype='int8' must be one of auto, float32"),
    ("lora_qkv", ["split"], "must be of type str"),
    ("init_from", 3, "must be of type str"),
])
def test_settings_edited_by_hand_are_checked(
    name: str, value: object, message: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(config.out_dir, "config.json")
    write_json(path, {"settings": asdict(config) | {name: value}, "device": "cpu", "dtype": "x"})
    assert resume(config, monkeypatch) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("edit", [
    {"iteration": "4"}, {"iteration": -1}, {"settings": [1]}, {"checkpoints": []},
    {"checkpoints": {"../evil": {"iteration": 1, "loss": 1.0}}}, {"checkpoints": {"best": {}}}])
def test_state_of_odd_progress_is_refused(
    edit: dict[str, object], config: TrainConfig, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(replace(config, max_iters=1))
    path = Path(config.out_dir, "trainer_state.pt")
    write_state(path, read_state(path) | edit)
    assert resume(config, monkeypatch) == 2
    assert "is damaged: its iteration, settings or checkpoints" in capsys.readouterr().err


def test_moments_of_another_shape_are_refused_before_anything_changes(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, max_iters=1))
    path = Path(config.out_dir, "trainer_state.pt")
    state, before = read_state(path), Path(config.out_dir, "config.json").read_bytes()
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    write_state(path, state)
    assert resume(config, monkeypatch, "max_iters=2") == 2
    assert "is damaged: the optimizer's exp_avg 0 is (3,)" in capsys.readouterr().err
    del state["optimizer"]["state"][0]
    write_state(path, state)
    assert resume(config, monkeypatch, "max_iters=2") == 2
    assert Path(config.out_dir, "config.json").read_bytes() == before


def test_checkpoint_that_is_gone_is_missed_before_the_training(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, max_iters=1))
    shutil.rmtree(Path(config.out_dir, "best"))
    assert resume(config, monkeypatch, "max_iters=2") == 2
    assert "best is gone, to which" in capsys.readouterr().err


def test_validations_of_a_run_are_not_logged_twice(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert call(patch, *(f"{k}={v}" for k, v in asdict(config).items())) == 130
    before = read_metrics(Path(config.out_dir))
    assert resume(config, monkeypatch, "eval_only=True") == 0
    assert read_metrics(Path(config.out_dir)) == before
    assert resume(config, monkeypatch) == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_other_files_stays_as_it_is(
    overwrite: bool, config: TrainConfig, tmp_path: Path
) -> None:
    for name in ("base/thesis.txt", "config.json", "metrics.jsonl"):
        (tmp_path / "proj" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proj" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"files that no run wrote \(base, config.json, metrics"):
        train(replace(config, out_dir=str(tmp_path / "proj"), overwrite=overwrite))
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert names == ["proj", "proj/base", "proj/base/thesis.txt", "proj/config.json",
                     "proj/metrics.jsonl"]


def test_run_cannot_replace_the_model_it_starts_from(config: TrainConfig) -> None:
    full = replace(config, lora_rank=0, max_iters=1)
    train(full)
    best = Path(full.out_dir, "best")
    before = (best / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"init_from='.*best' is in out_dir="):
        train(replace(config, init_from=str(best), overwrite=True))
    assert (best / "model.safetensors").read_bytes() == before
