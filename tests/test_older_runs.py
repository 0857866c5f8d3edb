"""Folders that an older version left: they resume bit-equal, are scored, export, and count.

`older_runs.tar.xz` was made by commit d3db43f on a tiny GPT-2: each of a LoRA, a full and a
programming run with 2 and with 4 steps (otherwise the same), and an experiment's two runs.
"""

import os
import shutil
import sys
from dataclasses import asdict, make_dataclass
from pathlib import Path

import pytest
import torch

import generate
import train
from checkpoints.files import read_json, read_tensors, write_json
from checkpoints.trainer_state import STATE_FILE, read_state, write_state
from configurator import configure, run_script
from experiments.__main__ import plan_jobs
from experiments.jobs import make_job
from experiments.plan import ExperimentsConfig, plan
from generate import GenerateConfig
from runtime.device import describe
from runtime.metrics import read_metrics
from runtime.run_folder import FINISHED_FILE, is_finished
from train import TrainConfig

KINDS = ("lora", "full", "codes")
# Settings that these runs leave at their defaults: a version that lacked them left them out.
ADDED_LATER = ("compile", "backend", "lora_qkv", "test_size", "block_size", "baseline")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unpacks the folders and works beside them: the runs name their base relative to there."""
    shutil.unpack_archive(Path(__file__).with_name("older_runs.tar.xz"), tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, script: object, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    config = {train: TrainConfig, generate: GenerateConfig}[script]
    run_script(script.main, config)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return read_tensors(file)


def without_key_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out what changes no attention: its gradient is rounding, which AdamW makes a step."""
    return {name: torch.stack(tensor.chunk(3))[::2] if name.endswith("c_attn.bias") else tensor
            for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("older", [False, True], ids=["as it is", "without later settings"])
def test_older_run_resumes_as_if_never_stopped(
    runs: Path, kind: str, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = runs / f"{kind}_2", runs / f"{kind}_4"
    about = read_json(folder / "config.json")
    if older:
        state = read_state(folder / STATE_FILE)
        for name in ADDED_LATER:
            del about["settings"][name], state["settings"][name]
        write_json(folder / "config.json", about)
        write_state(folder / STATE_FILE, state)
    call(monkeypatch, train, "init_from=resume", f"out_dir={folder.name}", "max_iters=4")
    found, expected = weights(folder / "last"), weights(whole / "last")
    torch.testing.assert_close(  # a step of 1e-2 turns another rounding into 1e-5
        without_key_biases(found), without_key_biases(expected), rtol=1e-4, atol=5e-5)
    here = describe(torch.device("cpu"))
    if all(about[name] == here[name] for name in ("processor", "torch")):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert (folder / "last" / "predictions.jsonl").read_bytes() == (
            whole / "last" / "predictions.jsonl").read_bytes()
    mine, theirs = (read_metrics(path)[-1] for path in (folder, whole))
    mine = {name: value for name, value in mine.items() if not name.endswith("memory_mib")}
    assert mine == pytest.approx(theirs, rel=1e-4)  # older runs did not log their memory here
    assert read_json(folder / FINISHED_FILE) == {"iteration": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_older_run_is_scored_and_exports(
    runs: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs / f"{kind}_4"
    before = read_json(folder / "best" / "results.json")
    (folder / "best" / "results.json").unlink()
    resume = "init_from=resume", f"out_dir={folder.name}"
    call(monkeypatch, generate, *resume)
    after = read_json(folder / "best" / "results.json")
    assert after.keys() == {*before, "data_sha256"}
    for name, value in before.items():
        if isinstance(value, int | float):
            assert after[name] == pytest.approx(value, rel=1e-3), name
    call(monkeypatch, generate, *resume, "export=merged")
    assert {"config.json", "model.safetensors", "vocab.json"} <= set(os.listdir("merged"))


def test_older_finished_run_counts_as_finished_and_may_be_repeated(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs / "lora_4"
    assert not (folder / FINISHED_FILE).exists()
    assert is_finished(folder)
    settings = read_json(folder / "config.json")["settings"]
    repeated = [f"{name}={value}" for name, value in settings.items()]
    call(monkeypatch, train, *repeated)
    with pytest.raises(SystemExit):
        call(monkeypatch, train, *repeated, "lora_alpha=5")
    assert is_finished(folder)


def test_older_experiment_runs_are_not_run_again(runs: Path) -> None:
    arguments = ["init_from=base", "dataset=reviews", "device=cpu", "dtype=float32",
                 "train_size=0", "batch_size=4", "gradient_accumulation_steps=1", "max_iters=2",
                 "eval_interval=2", "seeds=1", "out_dir=experiments", "lr=1e-2"]
    config = configure(ExperimentsConfig, arguments)
    jobs = [job for row in plan_jobs(config, plan(config)).values() for job in row]
    finished = {job.name for job in jobs if job.finished}
    assert finished == {"r16_alpha64-seed1337", "zero_shot_default"}
    other = configure(ExperimentsConfig, [*arguments, "weight_decay=0.2"])
    jobs = [job for row in plan_jobs(other, plan(other)).values() for job in row]
    assert {job.name for job in jobs if job.finished} == {"zero_shot_default"}


def test_a_setting_added_later_does_not_rename_a_run(runs: Path) -> None:
    names = {}
    for cls in (TrainConfig, make_dataclass(
            "Later", [("added", int, 1)], bases=(TrainConfig,), frozen=True)):
        settings = asdict(cls(weight_decay=0.2))
        names[cls] = make_job("run", "train.py", settings, cls(), "out").folder.name
    assert len(set(names.values())) == 1
