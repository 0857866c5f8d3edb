"""A model reasons first and answers behind the cue; its reasoning is kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_models import make_sampler, noisy, read_lines

from generate import GenerateConfig, main
from model import GPT, GPTConfig
from tasks.reasoning import Reasoning, WorkedExample, reasoned_prompts
from tasks.sentiment import SentimentTask
from train import Run, TrainConfig


def test_reasoning_ends_at_the_stop_or_the_cue() -> None:
    chain = Reasoning("{text}", " So the answer is", "\n")
    assert chain.cut(" It is dull. So the answer is negative.\n") == " It is dull."
    assert chain.cut(" It is dull.\n\nText: another") == " It is dull."
    assert chain.cut(" It is dull") == " It is dull"
    assert chain.cut("") == ""
    assert Reasoning("{text}", "\nTherefore", "").cut("1. one\n\n2. two") == "1. one\n\n2. two"


def test_prompts_hold_the_worked_examples_with_their_reasons() -> None:
    example = WorkedExample("2 + 2?", "Two and two are four.", "4")
    prompts = reasoned_prompts("Question: {text}", "a number", [example], 9)
    assert prompts["chain_of_thought"].template == (
        "Question: 2 + 2?\nAnswer: Two and two are four. So the answer is 4.\n\n"
        "Question: {text}\nAnswer:")
    assert prompts["step_by_step"].template == (
        "Question: {text}\nAnswer: Let's think step by step.")
    assert prompts["step_by_step"].cue == "\nTherefore, the answer (a number) is"
    assert [*reasoned_prompts("{text}", "x", [], 9)] == ["step_by_step"]


@pytest.mark.parametrize("prompt", ["chain_of_thought", "step_by_step"])
def test_answer_follows_prompt_reasoning_and_cue(reviews: str, prompt: str) -> None:
    torch.manual_seed(3)
    model = noisy(GPT(GPTConfig(block_size=512, n_layer=2, n_head=2, n_embd=16)))
    sampler = make_sampler(model, reviews, prompt)
    loader, reasoning = sampler.loader, sampler.reasoning
    records = loader.records("test")
    assert len({said.reasoning for said in sampler.predict(records)}) > 3
    for record, said in zip(records, sampler.predict(records), strict=True):
        ids = loader.encode_prompt(record)
        thought = model.generate(torch.tensor([ids]), reasoning.tokens, temperature=0)
        new = thought[0, len(ids) :].tolist()
        assert said.reasoning == reasoning.cut(loader.tokenizer.decode(new))
        encode = loader.tokenizer.encode_ordinary
        whole = ids + encode(said.reasoning) + encode(reasoning.cue)
        odds = model(torch.tensor([whole]))[0][0, -1].log_softmax(-1)[sampler.choice_ids]
        torch.testing.assert_close(torch.tensor(said.label_logprobs), odds, rtol=1e-4, atol=1e-4)


def test_reasoning_is_written_and_shown(
    checkpoint: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = {"init_from": checkpoint, "out_dir": str(tmp_path), "dataset": reviews,
                "device": "cpu", "dtype": "float32", "prompt": "step_by_step"}
    main(GenerateConfig(**settings))
    (path,) = tmp_path.glob("*/predictions*.jsonl")
    assert all(row["reasoning"] for row in read_lines(path))
    main(GenerateConfig(**settings, text="a witty film"))
    assert "reasoning: " in capsys.readouterr().out


def test_prompts_that_reason_do_not_train_and_are_not_calibrated(
    config: TrainConfig, model: GPT
) -> None:
    with pytest.raises(ValueError, match="asks for reasons, which the training examples lack"):
        Run(replace(config, prompt="step_by_step"))
    with pytest.raises(ValueError, match="calibrate=True needs labels, and a prompt"):
        make_sampler(model, prompt="step_by_step", calibrate=True)


def test_any_label_task_can_reason_step_by_step() -> None:
    assert SentimentTask("step_by_step").template.startswith(
        "Text: {text}\nQuestion: Is this text negative or positive?")
