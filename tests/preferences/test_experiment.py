"""The experiment makes pairs, trains, judges and reports; it resumes, and refuses other folders."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from made_models import noisy, read_lines

import train
from checkpoints.files import read_json
from configurator import configure
from experiments.jobs import Job
from preferences import __main__ as script
from preferences.__main__ import main
from preferences.plan import PreferencesConfig, check, plan
from preferences.report import mean_point
from preferences.rewards import RewardModel
from train import TrainConfig


@pytest.fixture(scope="module")
def reward_model(checkpoint: str, reviews: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward") / "run"
    train.train(TrainConfig(
        init_from=checkpoint, dataset=reviews, out_dir=str(folder), device="cpu", dtype="float32",
        lora_rank=4, lora_alpha=8, learning_rate=1e-2, batch_size=8, max_iters=4,
        wandb_mode="disabled"))
    return str(folder)


@pytest.fixture
def experiment(
    checkpoint: str, reward_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PreferencesConfig:
    """A tiny experiment whose runs take place in this process."""
    (tmp_path / "train.jsonl").write_text("\n".join(
        json.dumps({"text": f"{i} <b>film</b>s of a *long* series were {'not ' * (i % 2)}good"})
        for i in range(60)))

    def run_here(jobs: Sequence[Job], _: int) -> Iterator[tuple[Job, str]]:
        for job in jobs:
            train.main(configure(TrainConfig, job.arguments[1:]))
            yield job, ""

    monkeypatch.setattr(script, "run_jobs", run_here)
    return PreferencesConfig(
        init_from=checkpoint, data=str(tmp_path), out_dir=str(tmp_path / "out"),
        report_dir=str(tmp_path / "report"), reward_model=reward_model,
        held_out_reward_model=reward_model, device="cpu", dtype="float32", train_prompts=10,
        validation_prompts=3, test_prompts=4, samples=3, best_of=4, response_tokens=5,
        betas="0.1,2", lora_rank=4, learning_rate=1e-2, batch_size=4, max_iters=3, eval_interval=2,
        block_size=40, wandb_mode="disabled")


def test_experiment_goes_from_texts_to_a_report_and_keeps_what_is_finished(
    experiment: PreferencesConfig
) -> None:
    main(experiment)
    out, report = Path(experiment.out_dir), Path(experiment.report_dir)
    pairs = read_lines(out / "pairs" / "train.jsonl")
    assert 10 < len(pairs) <= 30
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    used = [{row["prompt"] for row in read_lines(out / "pairs" / f"{split}.jsonl")}
            for split in ("train", "validation", "test")]
    assert sum(map(len, used)) == len(set.union(*used))
    text = (report / "report.md").read_text("utf-8")
    for policy in ("base", "DPO, β = 0.1", "DPO, β = 2", "supervised on the chosen", "best of 4"):
        assert f"| {policy} |" in text
    assert "&lt;b" in text
    assert "<b" not in text
    assert (report / "frontier.png").is_file()
    assert (report / "training.png").is_file()
    rows = {path.stem: read_lines(path) for path in (out / "evaluations").iterdir()}
    assert len(rows) == 5
    assert [row["held_out"] for row in rows["draws"]] == pytest.approx(
        [row["reward"] for row in rows["draws"]], abs=1e-6)
    assert {row["kl"] for row in rows["base"]} == {0.0}
    assert [row["reward"] for row in rows["base"]] == pytest.approx(
        [row["held_out"] for row in rows["base"]], abs=1e-6)
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    main(experiment)
    assert files == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert (report / "report.md").read_text("utf-8") == text
    for changes, said in (
            ({"response_tokens": 6}, "response_tokens"), ({"dtype": "bfloat16"}, "dtype")):
        with pytest.raises(ValueError, match=f"holds an experiment of another {said}; choose"):
            main(replace(experiment, **changes))
    texts = Path(experiment.data, "train.jsonl")
    texts.write_text(texts.read_text().replace("film", "movie"))
    with pytest.raises(ValueError, match="holds an experiment of another beginnings; choose"):
        main(experiment)


@pytest.mark.parametrize(("changes", "said"), [
    ({"response_tokens": 32}, "beginning of 8 tokens and an end-of-text at most 31 fit"),
    ({"data": "nowhere"}, "data='nowhere' must be"), ({"reward_model": "nowhere"}, "holds no run"),
    ({"train_prompts": 99}, "60 texts have"),
])
def test_nothing_is_written_before_all_is_found(
    experiment: PreferencesConfig, changes: dict[str, object], said: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        main(replace(experiment, **changes))
    assert not Path(experiment.out_dir).exists()


def test_folder_of_other_files_is_refused(experiment: PreferencesConfig) -> None:
    path = Path(experiment.out_dir, "thesis.txt")
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ValueError, match="holds other files; choose a new folder"):
        main(experiment)
    assert [each.name for each in path.parent.iterdir()] == ["thesis.txt"]


def test_error_of_a_run_is_the_experiments(
    experiment: PreferencesConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        script, "run_jobs", lambda jobs, _: ((job, "out of memory") for job in jobs))
    monkeypatch.setattr(script, "make_pairs", lambda *_: [])
    with pytest.raises(ValueError, match=r"beta0.1-seed1337 failed: out of memory"):
        main(experiment)


@pytest.mark.parametrize(("changes", "said"), [
    ({"betas": "0.1,x"}, "betas='0.1,x' must be numbers"), ({"betas": ""}, "must be numbers"),
    ({"betas": "0"}, "must be numbers of 0.0001 or more"), ({"beta": 0.5}, "the plan sets it"),
    ({"task": "sentiment2"}, "the plan sets it"), ({"init_from": "resume"}, "repeat the same"),
    ({"best_of": 3}, "must be 1, or a power of two from samples=4"), ({"betas": "1,1.0"}, "twice"),
    ({"best_of": 6}, "a power of two"), ({"prompt": "Say {text}"}, "the plan sets it"),
    ({"report_dir": ""}, "must name a folder"),
])
def test_settings_that_make_no_experiment_are_refused(
    changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check(replace(PreferencesConfig(), **changes))


def test_plan_trains_each_beta_and_the_supervised_baseline() -> None:
    policies = plan(PreferencesConfig(betas="0.05 5", seeds=2, out_dir="x"))
    assert [policy.label for policy in policies] == [
        "DPO, β = 0.05", "DPO, β = 5", "supervised on the chosen"]
    settings = [job.settings for job in policies[1].jobs]
    assert [(each["beta"], each["task"], each["dataset"]) for each in settings] == [
        (5.0, "preferences", str(Path("x/pairs").absolute()))] * 2
    assert settings[1]["seed"] == TrainConfig.seed + 1
    assert policies[2].jobs[0].settings["preference_loss"] == "supervised"


def test_reward_is_the_probability_of_the_last_label(reward_model: str) -> None:
    judge = RewardModel(reward_model, "cpu", "float32", 8)
    noisy(judge.sampler.model)  # four steps taught it no difference
    texts = ["film 1 is witty", "film 2 is dull", "film 1 is witty\nVerdict: bad"]
    rewards = judge(texts)
    assert all(0 < reward < 1 for reward in rewards)
    assert rewards[2] == rewards[0]
    assert abs(rewards[0] - rewards[1]) > 1e-4  # far above rounding
    with pytest.raises(ValueError, match="1 texts do not fit into the 256 tokens of the reward"):
        judge(["film and so on" * 200])
    prediction = judge.sampler.predict([{"text": texts[0]}])[0]
    odds = [2.718281828**each for each in prediction.label_logprobs]
    assert rewards[0] == pytest.approx(odds[1] / sum(odds), rel=1e-4)


def test_run_without_labels_is_no_reward_model(config: TrainConfig, pairs: str) -> None:
    train.train(replace(config, task="preferences", dataset=pairs, max_iters=1))
    with pytest.raises(ValueError, match="task=preferences: its answers are no labels"):
        RewardModel(config.out_dir, "cpu", "float32", 8)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        RewardModel("nowhere", "cpu", "float32", 8)
    assert read_json(Path(config.out_dir, "config.json"))


def test_interval_of_several_runs_is_over_the_beginnings_they_share() -> None:
    def run(shift: float) -> list[dict]:
        return [{"kl": 1.0 + shift, "reward": value + shift, "reference_nats": 1.0, "tokens": 2,
                 "ended": True} for value in (0.1, 0.3, 0.5, 0.3)]

    alone, both = mean_point([run(0.0)]), mean_point([run(0.0), run(0.2)])
    assert (alone.reward, both.reward) == pytest.approx((0.3, 0.4))
    assert both.reward_error == pytest.approx(alone.reward_error)
    assert both.kl == pytest.approx(1.1)
    assert both.kl_error == pytest.approx(0)
