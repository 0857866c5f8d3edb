"""Every method runs through the homework's commands: train, stop, resume, score, refuse."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_models import read_lines
from made_runs import train_in_two_parts

import generate
from checkpoints.files import read_tensors
from checkpoints.peft_format import ADAPTER
from generate import GenerateConfig
from train import TrainConfig, train

METHODS = {
    "bitfit": {}, "bottleneck": {"bottleneck_size": 4, "bottleneck_norms": True},
    "prefix": {"prefix_tokens": 3},
    "projected prefix": {"method": "prefix", "prefix_tokens": 3, "prefix_projection": 8},
    "lora": {"lora_plus_ratio": 4.0, "lora_scaling": "rank_stabilized"},
}


@pytest.fixture(params=METHODS)
def by_method(config: TrainConfig, request: pytest.FixtureRequest) -> TrainConfig:
    changes = {"method": request.param} | METHODS[request.param]
    return replace(config, dropout=0.1, max_iters=4, eval_interval=2, **changes)


def test_interrupted_run_ends_as_an_uninterrupted_one(
    by_method: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(by_method, out_dir=str(tmp_path / "whole"))
    assert train_in_two_parts(by_method, monkeypatch) == train(whole)
    for name in ("best", "last"):
        expected, found = (read_tensors(Path(config.out_dir, name, ADAPTER))
                           for config in (whole, by_method))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_trained_checkpoint_is_scored_alike_by_generate(
    by_method: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = train(replace(by_method, max_iters=30, eval_interval=10))
    metrics = read_lines(Path(by_method.out_dir, "metrics.jsonl"))
    losses = [line["validation_loss"] for line in metrics if "validation_loss" in line]
    assert losses[-1] < losses[0]
    results = Path(by_method.out_dir, "best", "results.json")
    before = results.read_bytes()
    generate.main(GenerateConfig(out_dir=by_method.out_dir, device="cpu"))
    assert f"accuracy {scores['best']['accuracy']:.4f}" in capsys.readouterr().out
    assert results.read_bytes() == before


def test_only_what_a_plain_model_holds_is_exported(
    by_method: TrainConfig, tmp_path: Path
) -> None:
    train(replace(by_method, max_iters=1))
    ask = GenerateConfig(out_dir=by_method.out_dir, device="cpu", export=str(tmp_path / "plain"))
    if by_method.method in ("bottleneck", "prefix"):
        with pytest.raises(ValueError, match=r"export: transformers' model has no .*be merged"):
            generate.main(ask)
        assert not Path(ask.export).exists()
    else:
        generate.main(ask)
        assert Path(ask.export, "model.safetensors").is_file()
