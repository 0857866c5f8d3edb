"""DPO runs through the homework's commands: train, stop, resume, score, refuse."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_models import read_lines
from made_runs import train_in_two_parts

import generate
from checkpoints.files import read_json, read_tensors, write_tensors
from checkpoints.peft_format import ADAPTER
from generate import GenerateConfig
from runtime.run_folder import REFERENCE_FILE
from train import TrainConfig, train


@pytest.fixture
def preferences(config: TrainConfig, pairs: str) -> TrainConfig:
    return replace(config, task="preferences", dataset=pairs, max_iters=4, eval_interval=2)


def adapter(config: TrainConfig, name: str = "last") -> dict[str, torch.Tensor]:
    return read_tensors(Path(config.out_dir, name, ADAPTER))


def test_interrupted_run_ends_as_an_uninterrupted_one(
    preferences: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(preferences, out_dir=str(tmp_path / "whole"))
    assert train_in_two_parts(preferences, monkeypatch) == train(whole)
    torch.testing.assert_close(adapter(preferences), adapter(whole), rtol=0, atol=0)


def test_training_widens_the_margin_and_logs_it(preferences: TrainConfig) -> None:
    train(replace(preferences, max_iters=20, beta=0.5))
    lines = read_lines(Path(preferences.out_dir, "metrics.jsonl"))
    first, *_, last = [line for line in lines if "validation_margin" in line]
    at_first = [first[f"validation_{name}"] for name in ("margin", "kl_estimate", "chosen_reward")]
    assert at_first == pytest.approx([0, 0, 0], abs=1e-5)
    assert first["validation_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert last["validation_margin"] > 0.3
    assert last["validation_reward_accuracy"] == 1
    assert last["validation_gradient_weight"] < 0.45
    assert last["validation_margin"] == pytest.approx(
        last["validation_chosen_reward"] - last["validation_rejected_reward"], abs=1e-5)
    assert all("train_chosen_log_prob" in line for line in lines if "train_loss" in line)


def test_supervised_loss_learns_the_chosen_answers_alone(
    preferences: TrainConfig, tmp_path: Path
) -> None:
    config = replace(preferences, preference_loss="supervised", max_iters=12)
    scores = train(replace(config, baseline=True))
    assert scores["best"]["perplexity"] < scores["base"]["perplexity"]
    assert not Path(config.out_dir, REFERENCE_FILE).exists()
    rows = read_lines(Path(preferences.dataset, "train.jsonl"))
    other = tmp_path / "others"
    other.mkdir()
    for split in ("train", "validation", "test"):
        rows = read_lines(Path(preferences.dataset, f"{split}.jsonl"))
        (other / f"{split}.jsonl").write_text("".join(
            f'{{"prompt": "{row["prompt"]}", "chosen": "{row["chosen"]}", "rejected": " x"}}\n'
            for row in rows))
    train(replace(config, dataset=str(other), out_dir=str(tmp_path / "other")))
    torch.testing.assert_close(
        adapter(config), adapter(replace(config, out_dir=str(tmp_path / "other"))), rtol=0, atol=0)


def test_generate_scores_alike_and_answers_a_text(
    preferences: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = train(preferences)
    results = Path(preferences.out_dir, "best", "results.json")
    before = results.read_bytes()
    generate.main(GenerateConfig(out_dir=preferences.out_dir, device="cpu"))
    assert f"ranking accuracy {scores['best']['ranking_accuracy']:.4f}" in capsys.readouterr().out
    assert results.read_bytes() == before
    row = read_lines(results.parent / "predictions.jsonl")[0]
    assert {"prompt", "reference", "rejected", "generated", "chosen_nats"} <= row.keys()
    generate.main(GenerateConfig(out_dir=preferences.out_dir, device="cpu", text="the film is"))
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("damage", "said"), [
    (lambda path: path.unlink(), "reference.safetensors"),
    (lambda path: path.write_bytes(path.read_bytes()[:100]), "reference.safetensors"),
    (lambda path: write_tensors(path, {"train": torch.ones(3, 2), "validation": torch.ones(8, 2)}),
     r"train is \(3, 2\), not \(24, 2\)"),
    (lambda path: write_tensors(path, {name: t + 1 for name, t in read_tensors(path).items()}),
     "log-probabilities changed since the run began"),
    (lambda path: write_tensors(path, {name: t / 0 for name, t in read_tensors(path).items()}),
     "reference.safetensors: train"),
])
def test_changed_reference_is_refused(
    preferences: TrainConfig, damage: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(preferences.out_dir, REFERENCE_FILE)
    with monkeypatch.context() as patch:
        patch.setattr("train.score_test", lambda run: {})
        train(replace(preferences, lr_decay_iters=4, max_iters=2))
    assert read_json(path.parent / "config.json")["reference_sha256"]
    damage(path)
    with pytest.raises((ValueError, OSError), match=said):
        train(replace(preferences, lr_decay_iters=4), resume=True)


def test_run_that_replaces_one_on_pairs_leaves_no_reference(
    preferences: TrainConfig, config: TrainConfig
) -> None:
    train(preferences)
    train(replace(config, max_iters=1, overwrite=True))
    assert not Path(config.out_dir, REFERENCE_FILE).exists()
