"""Folders like those of finished runs, for the tests of the report, and a run in two parts."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import train as training
from checkpoints.files import write_json
from experiments.jobs import Job
from experiments.results import Row
from runtime.run_folder import FINISHED_FILE
from tasks.registry import resolve_dataset
from train import TrainConfig, train


def make_run(folder: Path, right: str, loss: float = 0.5, **settings: Any) -> Job:
    """Write a run whose best checkpoint is right where `right` has a 1; the last is never right."""
    hits = [mark == "1" for mark in right]
    for name, judged in (("best", hits), ("last", [False] * len(hits))):
        accuracy = sum(judged) / len(judged)
        write_json(folder / name / "results.json", {
            "accuracy": accuracy, "constrained_accuracy": accuracy, "n": len(judged),
            "garbage": len(judged) - sum(judged)})
        rows = [{"text": "t", "truth": 1, "label": 1 if hit else -1, "generated": " a word"}
                for hit in judged]
        (folder / name / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "best" / "adapter_model.safetensors").write_bytes(b"0" * 2_500_000)
    write_json(folder / "config.json", {
        "settings": asdict(resolve_dataset(TrainConfig(**settings))), "device": "cpu",
        "dtype": "float32", "processor": "a chip", "parameters": {"trained": 5, "total": 1000},
        "commit": "abc", "validation_reviews": 7})
    lines = [{"iteration": 0, "validation_loss": 9.0, "validation_accuracy": 0.0, "memory_mib": 64},
             {"iteration": 0, "train_loss": 9.0, "reviews_per_second": 64.0},
             {"iteration": 40, "validation_loss": loss, "validation_accuracy": 0.5,
              "memory_mib": 2048},
             {"iteration": 80, "validation_loss": loss + 1, "validation_accuracy": 0.4,
              "memory_mib": 1024}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / FINISHED_FILE, {"iteration": 80})
    return Job(folder.name, "train.py", settings, folder)


def zero_shot(folder: Path, texts: list[str]) -> Job:
    """Write the scores of a base model whose answers repeat the texts."""
    scored = folder / "zero" / "zero_shot-x"
    write_json(scored / "results.json", {
        "accuracy": 0.0, "constrained_accuracy": 0.5, "garbage": len(texts), "n": len(texts)})
    rows = [{"text": text, "generated": text, "truth": 1, "label": -1} for text in texts]
    (scored / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Job("zero", "generate.py", {}, folder / "zero", "zero_shot-*/results*.json")


def missing(folder: Path) -> Job:
    return Job(folder.name, "train.py", {}, folder)


def row(label: str, *jobs: Job, errors: dict[str, str] | None = None, **changes: Any) -> Row:
    return Row(label, {"lora_rank": 16, "lora_alpha": 64.0, "learning_rate": 1e-3} | changes,
               jobs, errors or {})


def cells(lines: list[str]) -> list[list[str]]:
    """Return the cells of the Markdown tables in `lines`."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in lines if line.startswith("|") and not line.startswith("|--")]


def train_in_two_parts(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, Any]]:
    """Train half of the steps, resume, and return the scores; the first part scores nothing."""
    whole = replace(config, lr_decay_iters=config.max_iters)
    with monkeypatch.context() as patch:
        patch.setattr(training, "score_test", lambda run: {})
        train(replace(whole, max_iters=config.max_iters // 2))
    return train(whole, resume=True)
