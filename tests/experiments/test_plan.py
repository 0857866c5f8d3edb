"""The plan holds the homework's questions; equal names mean equal runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_tokenizers import CONFIG as TOKENIZER_CONFIG
from made_tokenizers import byte_level, make_llama

from checkpoints.files import write_json
from configurator import configure
from experiments.__main__ import check, plan_jobs
from experiments.plan import FACTORS, PEAKS, SHOTS, ExperimentsConfig, plan
from tasks.base import ClassificationTask, Task
from tasks.registry import TASKS

ROOT = Path(__file__).parents[2]
CONFIG = ExperimentsConfig()
QUESTIONS = plan(CONFIG)
LORA = "r16_alpha64"
RATES = [f"{LORA}_rate0.25", LORA, f"{LORA}_rate4", "full_rate0.25", "full", "full_rate4"]


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


def test_names_of_runs_never_change_because_folders_bear_them() -> None:
    names = {question: [variant.name for variant in rows] for question, rows in QUESTIONS.items()}
    assert names == {
        "shares": [],
        "zero_shot": [f"zero_shot_{name}" for name in ("default", "terse", "detailed", "question")],
        "curves": [LORA, "r128_alpha512", "r196_alpha784", "full"],
        "alpha": [LORA, "r16_alpha256", "full"],
        "prompts": [LORA, *(f"{LORA}_{name}" for name in ("terse", "detailed", "question"))],
        "grid": [f"r16_alpha{alpha}{rate}" for alpha in (16, 64, 256)
                 for rate in ("_rate0.25", "", "_rate4")],
        "rates": RATES,
        "methods": [*RATES, *(f"{method}{rate}" for method in ("bitfit", "bottleneck", "prefix")
                              for rate in ("_rate0.25", "", "_rate4"))],
        "layers": [LORA, f"{LORA}_shared", f"{LORA}_attention", f"{LORA}_all"],
        "shots": ["shots0", *(f"shots{number}" for number in SHOTS),
                  *(f"{LORA}_on{number}_rate4" for number in SHOTS), LORA,
                  "zero_shot_chain_of_thought", "zero_shot_step_by_step"],
    }
    texts = plan(replace(CONFIG, task="python_codes"))
    assert {question: [variant.name for variant in rows] for question, rows in texts.items()} == {
        "shares": [],
        "answers": ["zero_shot_default", "r8_alpha32", "r64_alpha256", "full"],
        "targets": ["r64_alpha256", "r64_alpha256_attention", "r64_alpha256_all"],
    }


def test_bitfit_is_asked_of_models_with_biases_only(tmp_path: Path) -> None:
    make_llama(eos_token_id=2).save_pretrained(tmp_path)
    write_json(tmp_path / "tokenizer.json", byte_level())
    write_json(tmp_path / "tokenizer_config.json", TOKENIZER_CONFIG)
    asked = plan(replace(CONFIG, init_from=str(tmp_path)))["methods"]
    assert {variant.changes.get("method") for variant in asked} == {None, "bottleneck", "prefix"}
    assert {variant.changes["method"]: variant.changes["learning_rate"] for variant in asked
            if variant.name in PEAKS} == {"bottleneck": 2e-3, "prefix": 0.16}


def test_examples_that_do_not_fit_are_not_asked() -> None:
    config = replace(CONFIG, init_from="gpt2-mini", dataset="movie_reviews", draws=2)
    for prompt, shots in (("default", ["shots0", "shots1"]),
                          ("{text} =", ["shots0", "shots1", "shots2", "shots4"])):
        names = [variant.name for variant in plan(replace(config, prompt=prompt))["shots"]]
        assert [name for name in names if name.startswith("shots")] == shots
        assert "zero_shot_step_by_step" in names
        assert "zero_shot_chain_of_thought" not in names  # its examples fill the sequence


def test_draw_of_a_prompt_is_the_training_set_of_its_lora() -> None:
    config = replace(CONFIG, draws=3)
    jobs = plan_jobs(config, plan(config))
    for number in SHOTS:
        shown, taught = jobs[f"shots{number}"], jobs[f"{LORA}_on{number}_rate4"]
        assert [job.settings["shots_seed"] for job in shown] == [
            config.seed + draw for draw in range(3)]
        assert [job.settings.get("seed", config.seed) for job in taught] == [
            job.settings["shots_seed"] for job in shown]
        assert {(job.settings["train_size"], job.settings["train_balanced"])
                for job in taught} == {(number, True)}
        assert len({job.folder for job in (*shown, *taught)}) == 6


def test_few_examples_train_in_one_process() -> None:
    config = replace(CONFIG, processes=2)
    jobs = plan_jobs(config, plan(config))
    assert {job.processes for job in jobs[f"{LORA}_on4_rate4"]} == {1}
    assert {job.processes for job in jobs[LORA]} == {2}


def test_equal_names_mean_equal_settings_and_the_reverse() -> None:
    kinds: dict[str, dict] = {}
    for question, variants in QUESTIONS.items():
        for variant in variants:
            kind = dict(variant.changes) | {"zero_shot": question == "zero_shot"}
            assert kinds.setdefault(variant.name, kind) == kind
    assert len({json.dumps(kind, sort_keys=True) for kind in kinds.values()}) == len(kinds)


def test_prompt_of_the_command_line_comes_first() -> None:
    config = replace(CONFIG, prompt="Good or bad? {text}")
    questions = plan(config)
    assert [variant.label for variant in questions["prompts"]] == [
        f"prompt: {name}" for name in (
            "Good or bad? {text}", "default", "terse", "detailed", "question")]
    assert len(questions["zero_shot"]) == 5
    every = [job for row in plan_jobs(config, questions).values() for job in row]
    assert len({job.folder for job in every}) == len(every)


@pytest.mark.parametrize("name", ["mini", "t4"])
def test_presets_of_long_answers_get_their_questions(name: str) -> None:
    config = configure(ExperimentsConfig, [str(ROOT / f"config/experiments_codes_{name}.py")])
    check(config)
    questions = plan(config)
    assert [row.trains for row in questions["answers"]] == [False, True, True, True]
    ranks = [row.changes.get("lora_rank") for row in questions["answers"]]
    assert ranks == [None, 8, 64, 0]
    targets = [row.changes.get("lora_targets") for row in questions["targets"]]
    assert targets == [None, "attention", "all"]
    jobs = plan_jobs(config, questions)
    (base,) = jobs["zero_shot_default"]
    assert base.settings["task"] == "python_codes"
    assert len({job.folder for row in jobs.values() for job in row}) == 1 + 5 * config.seeds


@pytest.mark.parametrize(("parent", "like"), [
    (ClassificationTask, "sentiment"), (Task, "python_codes")])
def test_kind_of_answers_chooses_the_questions(
    parent: type[Task], like: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = type("NewTask", (parent,), {"prompts": {"default": "{text}"}, "labels": ("a", "b")})
    monkeypatch.setitem(TASKS, "new", task)
    assert plan(replace(CONFIG, task="new")).keys() == plan(replace(CONFIG, task=like)).keys()
