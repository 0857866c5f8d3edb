"""A worker runs one contender in a separate process and measures it."""

import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.worker import (
    SHAPES,
    Contender,
    Way,
    Worker,
    random_checkpoint,
    spread,
    stored_checkpoint,
)
from dataloader import make_loader
from generate import ModelSampler
from model import GPT
from models.families import load_decoder
from models.tokenizer import get_tokenizer
from tasks.sentiment import SentimentTask
from train import TrainConfig


@pytest.fixture
def settings(reviews: str) -> TrainConfig:
    return TrainConfig(dataset=reviews, device="cpu", dtype="float32", lora_rank=4)


def test_random_model_answers_as_a_fine_tuned_one(settings: TrainConfig) -> None:
    with random_checkpoint("gpt2-mini", seed=0) as folder:
        model = GPT.from_pretrained(folder)
        loader = make_loader(settings, model.config)
        answers = ModelSampler(model, loader).predict(loader.records("test"))
    assert {answer.generated for answer in answers} == {" positive"}
    idx = torch.tensor([get_tokenizer().encode_ordinary("Label: positive")])
    assert model.generate(idx, 3, temperature=0)[0, -1] == get_tokenizer().eot_token


def test_stored_checkpoint_has_the_weights_and_the_tokenizer_of_the_original(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OwnTokenizer:
        def save_pretrained(self, folder: Path, max_length: int) -> None:
            (folder / "tokenizer.json").write_text(str(max_length))

    monkeypatch.setattr("bench.worker.load_tokenizer", {llama: OwnTokenizer()}.__getitem__)
    with stored_checkpoint(llama) as folder:
        assert Path(folder, "tokenizer.json").is_file()
        stored, original = load_decoder(folder), load_decoder(llama)
    assert not Path(folder).exists()
    assert stored.config == original.config
    torch.testing.assert_close(stored.state_dict(), original.state_dict(), rtol=0, atol=0)


def test_reviews_drawn_are_spread_over_all_lengths() -> None:
    records = [{"text": "x" * length} for length in range(100)]
    chosen = spread(records, 10, random.Random(0))
    lengths = [len(record["text"]) for record in chosen]
    assert sorted(length // 10 for length in lengths) == list(range(10))
    assert lengths != sorted(lengths)
    assert len(spread(records, 300, random.Random(0))) == 300


@pytest.mark.parametrize("way", ["ours", "handout", "peft"])
def test_worker_trains_scores_and_measures_time_memory_and_size(
    way: Way, settings: TrainConfig, reviews: str
) -> None:
    records = SentimentTask().read(reviews, "test")[:3]
    with random_checkpoint("gpt2-mini", seed=0) as folder:
        worker = Worker(Contender(way, "float32", 3, 3), folder, settings)
        scored, trained = worker.ask("score", records), worker.ask("train", records)
        size = worker.ask("checkpoint_bytes", None).result
        worker.stop()
    assert not worker.process.is_alive()
    # The baselines generate beyond end-of-text and decode it.
    assert [answer.split("<")[0] for answer in scored.result] == [" positive"] * 3
    assert 0 < scored.seconds < scored.age < trained.age
    assert 1e8 < scored.memory <= trained.memory
    ranks = {"ours": 12, "peft": 4}  # ours is saved as one pair of rank 4 for each of q, k and v
    weights = (4 * ranks[way] * (256 + 768) if way in ranks  # in 4 layers
               else sum(p.numel() for p in GPT(SHAPES["gpt2-mini"]).parameters()))
    assert 4 * weights < size < 1.05 * 4 * weights + 10_000  # bytes; room for configs and headers


def test_worker_that_dies_is_one_clear_error(settings: TrainConfig) -> None:
    broken = replace(settings, dtype="wrong")
    with random_checkpoint("gpt2-mini", seed=0) as folder:
        worker = Worker(Contender("ours", "float32", 1, 1), folder, broken)
        with pytest.raises(OSError, match=r"ours\.float32: the process died with exit code 1"):
            worker.ask("train", [])


def test_only_the_parent_handles_an_interrupt(settings: TrainConfig) -> None:
    before = signal.getsignal(signal.SIGINT)
    with random_checkpoint("gpt2-mini", seed=0) as folder:
        worker = Worker(Contender("ours", "float32", 1, 1), folder, settings)
        assert signal.getsignal(signal.SIGINT) is before
        os.kill(worker.process.pid, signal.SIGINT)
        assert worker.ask("checkpoint_bytes", None).result > 0
        worker.stop()
    assert worker.process.exitcode == 0
