"""A contender runs in a process of its own, and what is counted is what it did."""

import os
import random
import signal
from dataclasses import replace

import pytest
import torch

from bench.worker import Contender, Way, Worker, random_checkpoint, spread
from dataloader import SentimentTask, make_loader
from generate import ModelSampler
from model import GPT
from models.tokenizer import get_tokenizer
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


def test_reviews_drawn_are_spread_over_all_lengths() -> None:
    records = [{"text": "x" * length} for length in range(100)]
    chosen = spread(records, 10, random.Random(0))
    lengths = [len(record["text"]) for record in chosen]
    assert sorted(length // 10 for length in lengths) == list(range(10))
    assert lengths != sorted(lengths)
    assert len(spread(records, 300, random.Random(0))) == 300


@pytest.mark.parametrize("way", ["ours", "handout", "peft"])
def test_worker_trains_scores_and_tells_time_memory_and_size(
    way: Way, settings: TrainConfig, reviews: str
) -> None:
    records = SentimentTask().read(reviews, "test")[:3]
    with random_checkpoint("gpt2-mini", seed=0) as folder:
        worker = Worker(Contender(way, "float32", 3, 3), folder, settings)
        scored, trained = worker.ask("score", records), worker.ask("train", records)
        size = worker.ask("checkpoint_bytes", None).result
        worker.stop()
    assert not worker.process.is_alive()
    # The baselines generate past the end, and decode it.
    assert [answer.split("<")[0] for answer in scored.result] == [" positive"] * 3
    assert 0 < scored.seconds < scored.age < trained.age
    assert 1e8 < scored.memory <= trained.memory
    adapters = 4 * 4 * 4 * (256 + (256 if way == "peft" else 3 * 256))  # bytes of rank 4, 4 layers
    assert size > adapters


def test_worker_that_dies_is_one_clear_error(settings: TrainConfig) -> None:
    broken = replace(settings, dtype="wrong")
    with random_checkpoint("gpt2-mini", seed=0) as folder:
        worker = Worker(Contender("ours", "float32", 1, 1), folder, broken)
        with pytest.raises(OSError, match=r"ours.float32: its process died with exit code 1"):
            worker.ask("train", [])


def test_interrupt_is_the_parents_alone(settings: TrainConfig) -> None:
    before = signal.getsignal(signal.SIGINT)
    with random_checkpoint("gpt2-mini", seed=0) as folder:
        worker = Worker(Contender("ours", "float32", 1, 1), folder, settings)
        assert signal.getsignal(signal.SIGINT) is before
        os.kill(worker.process.pid, signal.SIGINT)
        assert worker.ask("checkpoint_bytes", None).result > 0
        worker.stop()
    assert worker.process.exitcode == 0
