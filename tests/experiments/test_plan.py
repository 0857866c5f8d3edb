"""The plan holds the courses' questions, each kind of run under one name."""

import json
from dataclasses import replace
from pathlib import Path

from configurator import configure
from experiments.__main__ import check, plan_jobs
from experiments.plan import ALL_LINEAR, FACTORS, ExperimentsConfig, plan

ROOT = Path(__file__).parents[2]
CONFIG = ExperimentsConfig()
QUESTIONS = plan(CONFIG)


def changes(question: str) -> list[dict]:
    return [dict(variant.changes) for variant in QUESTIONS[question]]


def test_plan_has_the_homeworks_ranks_and_alphas() -> None:
    pairs = [(each["lora_rank"], each.get("lora_alpha")) for each in changes("curves")]
    assert pairs == [(16, 64), (128, 512), (196, 784), (0, None)]
    assert changes("curves")[-1]["dropout"] == 0.05
    assert [(each["lora_rank"], each.get("lora_alpha")) for each in changes("alpha")] == [
        (16, 64), (16, 256), (0, None)]
    assert [each.get("prompt") for each in changes("prompts")] == [
        None, "terse", "detailed", "question"]


def test_grid_crosses_rates_with_alphas() -> None:
    pairs = {(each["learning_rate"], each["lora_alpha"]) for each in changes("grid")}
    assert pairs == {(2.5e-4 * factor, alpha) for factor in FACTORS for alpha in (16, 64, 256)}
    assert len(changes("grid")) == 9


def test_a_name_is_a_kind_of_run_and_a_kind_has_one_name() -> None:
    kinds: dict[str, dict] = {}
    for question, variants in QUESTIONS.items():
        for variant in variants:
            kind = dict(variant.changes) | {"zero_shot": question == "zero_shot"}
            assert kinds.setdefault(variant.name, kind) == kind
    assert len({json.dumps(kind, sort_keys=True) for kind in kinds.values()}) == len(kinds)


def test_own_prompt_is_the_first_of_the_prompts() -> None:
    config = replace(CONFIG, prompt="Good or bad? {text}")
    questions = plan(config)
    assert [variant.label for variant in questions["prompts"]] == [
        f"prompt: {name}" for name in (
            "Good or bad? {text}", "default", "terse", "detailed", "question")]
    assert len(questions["zero_shot"]) == 5
    every = [job for row in plan_jobs(config, questions).values() for job in row]
    assert len({job.folder for job in every}) == len(every)


def test_long_answers_have_a_plan_of_their_own() -> None:
    for name in ("mini", "t4"):
        config = configure(ExperimentsConfig, [str(ROOT / f"config/experiments_codes_{name}.py")])
        check(config)
        questions = plan(config)
        assert list(questions) == ["shares", "answers", "targets"]
        assert [row.trains for row in questions["answers"]] == [False, True, True, True]
        ranks = [row.changes.get("lora_rank") for row in questions["answers"]]
        assert ranks == [None, 8, 64, 0]
        targets = [row.changes.get("lora_targets") for row in questions["targets"]]
        assert targets == [None, "c_attn,attn.c_proj", ALL_LINEAR]
        jobs = plan_jobs(config, questions)
        (base,) = jobs["zero_shot_default"]
        assert base.settings["task"] == "python_codes"
        assert len({job.folder for row in jobs.values() for job in row}) == 1 + 5 * config.seeds
