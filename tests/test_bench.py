"""The benchmark measures what it says, and writes all it found."""

import json
import random
from pathlib import Path

import pytest
import torch

from bench import (
    SIZES,
    BenchConfig,
    Contender,
    Worker,
    main,
    matrix_peak,
    random_checkpoint,
    settings_of,
    spread,
    useful_flops,
)
from dataloader import get_tokenizer
from generate import ModelSampler, make_loader
from model import GPT, GPTConfig

RATIOS = {f"{verb}.{rival}.{dtype}" for verb in ("train", "score")
          for rival in ("handout", "peft") for dtype in ("float32", "bfloat16")}


@pytest.fixture
def config(reviews: str, tmp_path: Path) -> BenchConfig:
    return BenchConfig(
        model="gpt2-mini", what="train,score", lora_rank=4, batch_size=8, rounds=1, device="cpu",
        dtype="bfloat16", dataset=reviews, out_dir=str(tmp_path))


def test_benchmark_runs_every_contender_and_writes_its_report(config: BenchConfig) -> None:
    main(config)
    report = json.loads(Path(config.out_dir, "bench.json").read_text())
    assert report["ratios"].keys() == RATIOS
    for key, ratio in report["ratios"].items():
        low, high = report["spreads"][key]
        assert 0 < low <= ratio <= high
    rows = report["contenders"]
    assert list(rows) == ["ours.float32", "ours.bfloat16", "full.float32", "handout.float32",
                          "peft.float32"]
    for row in rows.values():
        assert row["train_reviews_per_second"] > 0
        assert row["train_memory"] > 1e8
        assert row["seconds_to_first_step"] > 0
    adapters = 4 * (256 + 256) * 3 * 4 * 4  # rank, in and out, q k v, layers, bytes
    assert adapters < rows["ours.float32"]["checkpoint_bytes"]
    weights = 4 * sum(p.numel() for p in GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256)).
                      parameters())
    assert rows["handout.float32"]["checkpoint_bytes"] > weights
    table = Path(config.out_dir, "bench.md").read_text()
    assert all(name in table for name in [*rows, *RATIOS])
    assert Path(config.out_dir, "bench.png").stat().st_size > 10_000


def test_random_model_answers_as_a_fine_tuned_one(config: BenchConfig) -> None:
    with random_checkpoint("gpt2-mini", seed=0) as folder:
        model = GPT.from_pretrained(folder)
        settings = settings_of(config, Contender("ours", "float32", 1, 1))
        loader = make_loader(settings, model)
        answers = ModelSampler(model, loader).predict_labels(loader.records("test"))
    assert {answer.generated for answer in answers} == {" positive"}
    idx = torch.tensor([get_tokenizer().encode_ordinary("Label: positive")])
    assert model.generate(idx, 3, temperature=0)[0, -1] == get_tokenizer().eot_token


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


def test_reviews_drawn_are_spread_over_all_lengths() -> None:
    records = [{"text": "x" * length} for length in range(100)]
    chosen = spread(records, 10, random.Random(0))
    lengths = [len(record["text"]) for record in chosen]
    assert sorted(length // 10 for length in lengths) == list(range(10))
    assert lengths != sorted(lengths)
    assert len(spread(records, 300, random.Random(0))) == 300


def test_peak_is_of_a_plausible_size() -> None:
    assert 1e8 < matrix_peak(torch.float32, torch.device("cpu")) < 1e14


def test_worker_that_dies_is_one_clear_error(config: BenchConfig) -> None:
    with random_checkpoint("gpt2-mini", seed=0) as folder:
        contender = Contender("ours", "float32", 1, 1)
        worker = Worker(contender, folder, settings_of(config, contender) | {"dtype": "wrong"})
        with pytest.raises(OSError, match=r"ours.float32: its process died with exit code 1"):
            worker.ask("train", [])


@pytest.mark.parametrize("what", ["", "speed", "train,speed"])
def test_unknown_parts_are_refused(what: str) -> None:
    with pytest.raises(ValueError, match="must be train, score or both"):
        main(BenchConfig(what=what))


def test_sizes_are_gpt2s() -> None:
    assert SIZES["gpt2-medium"] == (24, 16, 1024)
    assert GPTConfig(*[1024, 50257], *SIZES["gpt2"]) == GPTConfig()
