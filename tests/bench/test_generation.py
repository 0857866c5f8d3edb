"""Long answers: the contenders generate the same tokens, of the forced lengths."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_models import noisy
from made_workers import InProcess

from bench.__main__ import main
from bench.generation import answer_limits, check_lengths, draw_prompts
from bench.generators import Generator, Prompts, TransformersGenerator
from bench.report import markdown, plot
from bench.settings import BenchConfig
from bench.worker import Contender
from model import GPT, GPTConfig
from models.families import load_decoder
from train import TrainConfig

SETTINGS = ("generate_single", "generate", "generate_mixed")
CPU = torch.device("cpu")


@pytest.fixture
def small(llama: str, reviews: str, tmp_path: Path) -> BenchConfig:
    return BenchConfig(
        model=llama, what="generate", device="cpu", dtype="bfloat16", dataset=reviews, rounds=1,
        prompts=7, prompt_tokens=6, new_tokens=12, fewest_new_tokens=2, generate_batch_size=3,
        out_dir=str(tmp_path))


@pytest.fixture(params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, llama: str, tmp_path: Path) -> str:
    """A model of each family whose answers depend on the text."""
    if request.param == "llama":
        return llama
    noisy(GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=16))).save_pretrained(tmp_path)
    return str(tmp_path)


def test_contenders_generate_the_same_tokens_up_to_each_rows_limit(folder: str) -> None:
    config = TrainConfig(device="cpu", dtype="float32")
    ours, theirs = (cls(folder, config, CPU) for cls in (Generator, TransformersGenerator))
    rows, limits = torch.randint(50257, (7, 6)).tolist(), [2, 12, 5, 12, 1, 9, 3]
    found = ours.generate(Prompts(rows, limits, batch_size=3))
    assert [len(answer) for answer in found] == limits
    assert len({token for answer in found for token in answer}) > 5
    assert theirs.generate(Prompts(rows, limits, batch_size=3)) == found
    whole = ours.generate(Prompts(rows, [12] * 7, batch_size=7))
    assert [answer[:limit] for answer, limit in zip(whole, limits, strict=True)] == found
    assert theirs.generate(Prompts(rows, [12] * 7, batch_size=7)) == whole


def test_no_token_ends_an_answer(llama: str, tmp_path: Path) -> None:
    config, prompts = TrainConfig(device="cpu", dtype="float32"), Prompts([[5, 6, 7]], [8], 1)
    answer = Generator(llama, config, CPU).generate(prompts)
    model = load_decoder(llama)
    model.config = replace(model.config, end_of_text=(answer[0][2],))
    model.save_pretrained(tmp_path)
    assert len(model.generate(torch.tensor(prompts.rows), 8, temperature=0)[0]) == 3 + 3
    for generator in (Generator, TransformersGenerator):
        assert generator(str(tmp_path), config, CPU).generate(prompts) == answer


@pytest.mark.usefixtures("_gpt2_tokenizer")
def test_generation_is_compared_in_every_setting_and_precision(
    small: BenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.turns.Worker", InProcess)
    monkeypatch.setattr("bench.turns.matrix_peak", None)  # no peak of a product is needed
    main(small)
    report = json.loads(Path(small.out_dir, "bench.json").read_text())
    keys = [f"{setting}.transformers.{dtype}"
            for setting in SETTINGS for dtype in ("float32", "bfloat16")]
    assert list(report["ratios"]) == list(report["spreads"]) == keys
    assert list(report["memory_ratios"]) == keys
    rows = report["generation"]
    assert list(rows) == ["ours.float32", "ours.bfloat16", "transformers.float32"]
    for setting in SETTINGS:
        speeds = {name: row[f"{setting}_tokens_per_second"] for name, row in rows.items()}
        ratio = speeds["ours.float32"] / speeds["transformers.float32"]
        assert report["ratios"][f"{setting}.transformers.float32"] == pytest.approx(ratio)
        assert rows["ours.float32"][f"{setting}_equal_tokens"] == 1
        assert 0 < rows["ours.bfloat16"][f"{setting}_equal_tokens"] <= 1
        assert rows["ours.float32"][f"{setting}_memory_mib"] > 100
    assert all(key in markdown(report) for key in keys)
    assert "| generate mixed tokens per second | " in markdown(report)
    panels = plot(report).axes
    assert [panel.get_title() for panel in panels] == [
        "generate single", "generate", "generate mixed"]
    assert {panel.get_xlabel() for panel in panels} == {"tokens a second"}


def test_settings_are_the_issues_bars() -> None:
    limits = answer_limits(BenchConfig())
    assert limits["generate_single"] == [256]
    assert limits["generate"] == [256] * 16
    mixed = limits["generate_mixed"]
    assert (len(mixed), min(mixed), max(mixed), sum(mixed) / 64) == (64, 16, 256, 135.53125)
    assert mixed != sorted(mixed)
    in_order = answer_limits(BenchConfig(sort_answers=True))["generate_mixed"]
    assert in_order == sorted(mixed, reverse=True)


@pytest.mark.usefixtures("_gpt2_tokenizer")
def test_all_contenders_get_the_same_prompts_and_the_warm_up_is_short(
    small: BenchConfig, llama: str
) -> None:
    ask = draw_prompts(small, llama, [2, 12])
    ours, theirs = Contender("generator", "float32"), Contender("transformers", "float32")
    first = ask(ours, 1)
    assert first == ask(theirs, 1) != ask(ours, 2)
    assert ([len(row) for row in first.rows], first.limits) == ([6, 6], [2, 12])
    assert ask(ours, 0).limits == [2, 4]
    with pytest.raises(ValueError, match=r"prompt_tokens=9999, but dataset='.*' has \d+$"):
        draw_prompts(replace(small, prompt_tokens=9999), llama, [2])


def test_answers_that_no_sequence_holds_are_refused(small: BenchConfig, llama: str) -> None:
    check_lengths(replace(small, prompt_tokens=244), llama)
    with pytest.raises(ValueError, match="prompt_tokens=245 and new_tokens=12 exceed the model's"):
        check_lengths(replace(small, prompt_tokens=245), llama)
