"""The plan holds the homework's questions, and one command answers them, however often stopped."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from configurator import configure
from experiments.__main__ import check, jobs_by_question, main, plan_jobs, select
from experiments.plan import ExperimentsConfig, plan
from experiments.report import check_folder
from generate import GenerateConfig
from runtime.metrics import read_metrics
from train import TrainConfig

ROOT = Path(__file__).parents[2]
CONFIG = ExperimentsConfig()
QUESTIONS = plan(CONFIG)
JOBS = plan_jobs(CONFIG, QUESTIONS)
BY_QUESTION = jobs_by_question(QUESTIONS, JOBS)
VARIANTS = {variant.name: variant for row in QUESTIONS.values() for variant in row}


def test_each_run_has_a_folder_and_a_seed_of_its_own() -> None:
    every = [job for row in JOBS.values() for job in row]
    assert len({job.folder for job in every}) == len({job.name for job in every}) == len(every)
    seeds = [configure(TrainConfig, job.arguments[1:]).seed for job in JOBS["r16_alpha64"]]
    assert seeds == [1337, 1338, 1339]  # though the grid asks for one seed alone


@pytest.mark.parametrize("name", VARIANTS)
def test_command_gives_the_settings_of_the_plan(name: str) -> None:
    _, script, *arguments = shlex.split(JOBS[name][0].command)
    cls = {"train.py": TrainConfig, "generate.py": GenerateConfig}[script]
    settings, wanted = configure(cls, arguments), VARIANTS[name].changes
    assert {key: getattr(settings, key) for key in wanted} == wanted


def folder(**settings: object) -> Path:
    config = replace(CONFIG, **settings)
    return plan_jobs(config, plan(config))["r16_alpha64"][0].folder


def test_other_settings_are_another_run_but_logging_is_not() -> None:
    assert folder() == folder(wandb_mode="offline", log_interval=5, report_dir="x", jobs=3)
    for change in ({"max_iters": 81}, {"dataset": "movie_reviews"}, {"init_from": "gpt2"},
                   {"learning_rate": 1e-3}, {"prompt": "terse"}, {"seed": 1}):
        assert folder(**change) != folder()


def test_only_takes_questions_and_runs_once_each() -> None:
    names = [job.name for job in select(BY_QUESTION, "alpha, r128_alpha512-seed1338 alpha")]
    assert names == [*(f"{name}-seed{seed}" for name in ("r16_alpha64", "r16_alpha256", "full")
                       for seed in (1337, 1338, 1339)), "r128_alpha512-seed1338"]
    assert len(select(BY_QUESTION, "")) == sum(map(len, JOBS.values()))
    assert len(select(BY_QUESTION, "grid")) == 9
    with pytest.raises(ValueError, match=r"only='curve': there is no 'curve'.*shares, zero"):
        select(BY_QUESTION, "curve")


@pytest.mark.parametrize("setting", [
    {"lora_rank": 8}, {"lora_alpha": 1.0}, {"lora_qkv": "shared"}, {"eval_only": True},
    {"lora_targets": "mlp.c_fc"}, {"overwrite": True}, {"init_from": "resume"}, {"prompt": "x"},
    {"max_iters": 0}, {"learning_rate": 0.0}, {"full_learning_rate": 0.0},
    {"device": "cuda:1", "jobs": 2}, {"processes": 2, "jobs": 2},
    {"gradient_accumulation_steps": 3, "processes": 2}, {"out_dir": ""}, {"report_dir": ""},
])
def test_settings_that_would_do_nothing_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        check(replace(CONFIG, **setting))


def test_presets_make_the_same_runs() -> None:
    for name, number in (("mini", 113), ("t4", 134)):  # more examples fit gpt2-medium's prompts
        config = configure(ExperimentsConfig, [str(ROOT / f"config/experiments_{name}.py")])
        check(config)
        assert plan(config).keys() == QUESTIONS.keys()
        questions = plan(config)
        assert len(select(jobs_by_question(questions, plan_jobs(config, questions)), "")) == number


def test_sweep_has_every_training_run_of_the_t4() -> None:
    """The keys are of those, and of the kinds, that W&B's schema has for a grid."""
    sweep = yaml.safe_load((ROOT / "config/sweep.yaml").read_text())
    assert sweep.keys() == {"program", "name", "method", "metric", "command", "parameters"}
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["method"] == "grid"
    assert sweep["metric"] == {"name": "validation_loss", "goal": "minimize"}
    assert sweep["command"][:4] == ["${env}", "${interpreter}", "-m", "experiments"]
    assert sweep["command"][-1] == "${args_no_hyphens}"
    ((parameter, grid),) = sweep["parameters"].items()
    assert grid.keys() == {"values"}
    config = configure(ExperimentsConfig, [
        str(ROOT / sweep["command"][4]), *sweep["command"][5:-1],
        f"{parameter}={','.join(grid['values'])}"])
    jobs = plan_jobs(config, plan(config))
    chosen = select(jobs_by_question(plan(config), jobs), config.only)
    assert [job.name for job in chosen] == grid["values"]
    assert {job.name for job in chosen} == {
        job.name for row in jobs.values() for job in row if job.script == "train.py"}


@pytest.fixture(scope="module")
def settings(checkpoint: str, reviews: str) -> list[str]:
    return [f"init_from={checkpoint}", f"dataset={reviews}", "device=cpu", "dtype=float32",
            "train_size=0", "batch_size=4", "gradient_accumulation_steps=2", "max_iters=20",
            "eval_interval=5", "seeds=1", "jobs=2", "lr=1e-2", "full_learning_rate=1e-3"]


def start(settings: list[str], out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments", *settings, f"out_dir={out}/runs",
               f"report_dir={out}/report", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    printed, said = process.communicate(timeout=300)
    return process.returncode, printed, said


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    code, printed, said = finish(start(settings, out, "only=shares,zero_shot,alpha"))
    assert code == 0, said
    assert f"written: {out}/report/report.md" in printed
    return out


def scores(out: Path) -> str:
    """The report without the folder's name and the questions asked for."""
    text = (out / "report" / "report.md").read_text()
    return re.sub(r" only=\S+", "", text.replace(str(out), "OUT"))


def test_report_has_the_questions_asked_and_no_other(undisturbed: Path) -> None:
    text = (undisturbed / "report" / "report.md").read_text()
    titles = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert titles == ["How many weights does LoRA train?",
                      "What does the model know before fine-tuning?", "What does α do at r = 16?"]
    assert (undisturbed / "report" / "alpha.png").stat().st_size > 10_000
    assert (undisturbed / "report" / "report.html").stat().st_size > 10_000
    results = list((undisturbed / "runs").glob("*/last/results.json"))
    assert len(results) == 3
    for path in results:
        accuracy = json.loads(path.read_text())["accuracy"]
        assert f"| {accuracy:.3f} | " in text
    assert not list((undisturbed / "runs").glob("*/trainer_state.pt"))


def test_finished_runs_are_not_made_again(
    settings: list[str], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "runs").rglob("*")}
    text = scores(undisturbed)
    words = [*settings, f"out_dir={undisturbed}/runs", f"report_dir={undisturbed}/report",
             "only=alpha"]
    monkeypatch.setattr(sys, "argv", ["experiments", *words])  # the report quotes its command
    main(configure(ExperimentsConfig, words))
    assert before == {path: path.stat().st_mtime_ns for path in (undisturbed / "runs").rglob("*")}
    assert scores(undisturbed) == text


def wait_for_steps(out: Path, already: int, process: subprocess.Popen) -> int:
    """Wait until the runs have logged more lines than `already`; return how many."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = sum(len(path.read_text().splitlines())
                    for path in (out / "runs").glob("*/metrics.jsonl"))
        if lines > already:
            return lines
        time.sleep(0.05)
    raise AssertionError("no run got on")


@pytest.mark.faults  # it starts many processes
def test_interruptions_and_restarts_give_the_same_report(
    settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    resumed = lines = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(settings, tmp_path, "only=shares,zero_shot,alpha")
        lines = wait_for_steps(tmp_path, lines + 4, process)
        process.send_signal(number)
        code, _, said = finish(process)
        assert code == 130
        assert "stopped; repeat the command to resume" in said
        resumed += len(list((tmp_path / "runs").glob("*/trainer_state.pt")))
    assert resumed > 0
    code, _, said = finish(start(settings, tmp_path, "only=shares,zero_shot,alpha"))
    assert code == 0, said
    assert scores(tmp_path) == scores(undisturbed)


@pytest.mark.faults  # it starts many processes
def test_failed_run_stands_in_the_report_and_stops_no_other(
    settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    folder = next((undisturbed / "runs").glob("full-*")).name
    (tmp_path / "runs" / folder).mkdir(parents=True)
    shutil.copy(undisturbed / "runs" / folder / "config.json", tmp_path / "runs" / folder)
    (tmp_path / "runs" / folder / "trainer_state.pt").write_bytes(b"damaged")
    code, _, said = finish(start(settings, tmp_path, "only=alpha"))
    assert code == 2
    assert said.splitlines()[-1].startswith("error: 1 of 3 runs failed, as full-seed1337: ")
    assert f"to start afresh, delete {tmp_path}/runs/{folder}" in said
    text = (tmp_path / "report" / "report.md").read_text()
    assert re.search(r"\| full fine-tuning \| 0 of 1: failed: .*trainer\\_state", text)
    assert re.search(r"\| LoRA r=16, α=256 \| 1 \| \d", text)


@pytest.mark.faults  # it starts many processes
def test_runs_of_two_processes_are_torchruns(
    settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """The same run, by the same name: its losses are those of one process, up to rounding."""
    name = "r16_alpha256-seed1337"
    # Validated at each step, the run is still going when its first state appears.
    alone_settings = "jobs=1", "lora_dropout=0", "eval_interval=1"
    done = start(settings, tmp_path, f"only={name}", *alone_settings, "processes=2")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("*/trainer_state.pt")):
        assert done.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done.send_signal(signal.SIGINT)
    assert finish(done)[0] == 130
    done = start(settings, tmp_path, f"only={name}", *alone_settings)  # it keeps its processes
    assert finish(done)[0] == 0
    alone = start(settings, tmp_path / "alone", f"only={name}", *alone_settings)
    assert finish(alone)[0] == 0
    (mine,) = (tmp_path / "runs").glob(f"{name}-*")
    (theirs,) = (tmp_path / "alone" / "runs").glob(f"{name}-*")
    assert mine.name == theirs.name
    assert json.loads((mine / "config.json").read_text())["processes"] == 2
    losses = [[line["validation_loss"] for line in read_metrics(run) if "validation_loss" in line]
              for run in (mine, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)  # Adam makes much of rounding


def test_dry_run_lists_the_runs_and_makes_none(
    checkpoint: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main(replace(CONFIG, init_from=checkpoint, dataset=reviews, device="cpu", dtype="float32",
                 out_dir=str(tmp_path / "out"), only="alpha,zero_shot", dry_run=True))
    printed = capsys.readouterr().out
    for job in select(BY_QUESTION, "alpha,zero_shot"):
        assert re.search(rf"^ *{job.name} +\d+\.\d +to do ", printed, re.MULTILINE)
    assert re.search(r"^13 runs, about \d+ minutes to go$", printed, re.MULTILINE)
    assert not (tmp_path / "out").exists()


@pytest.mark.faults  # it starts many processes
def test_damaged_run_keeps_no_report_from_being_written_and_is_run_again(
    settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / "runs", tmp_path / "runs")
    (run,) = (tmp_path / "runs").glob("r16_alpha256-*")
    shutil.rmtree(run / "best")
    (scored,) = (tmp_path / "runs").glob("zero_shot_default-*/zero_shot-*/results*.json")
    scored.write_text("{")
    for only in ("only=shares", "only=alpha dry_run=True"):
        code, printed, said = finish(start(settings, tmp_path, *only.split()))
        assert code == 0, said
    text = (tmp_path / "report" / "report.md").read_text()
    assert "What does \u03b1 do" not in text  # a question that was not asked is not finished
    assert re.search(r"to do again: .*best/results\.json is missing ", printed)
    code, _, said = finish(start(settings, tmp_path, "only=alpha,zero_shot"))
    assert code == 0, said
    mine, theirs = (re.findall(r"^\| LoRA r=16.*", scores(out), re.MULTILINE)
                    for out in (tmp_path, undisturbed))
    assert mine == theirs


def test_data_edited_in_place_is_another_run(
    settings: list[str], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The digest is one that a run records whose data folder held something else."""
    shutil.copytree(undisturbed / "runs", tmp_path / "runs")
    (run,) = (tmp_path / "runs").glob("full-*")
    about = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(about | {"data_sha256": "0" * 64}))
    main(configure(ExperimentsConfig, [
        *settings, f"out_dir={tmp_path}/runs", "only=alpha", "dry_run=True"]))
    assert re.search(r"full-seed1337 +\S+ +to do again: its data changed", capsys.readouterr().out)


@pytest.mark.parametrize(("name", "text"), [
    ("report.md", "# My thesis"), ("report.html", "<html>mine"), ("alpha.png", "mine")])
def test_file_of_others_is_not_overwritten_and_no_run_is_started(
    name: str, text: str, checkpoint: str, reviews: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"holds a {name} that this program did not write"):
        main(replace(CONFIG, init_from=checkpoint, dataset=reviews, device="cpu", dtype="float32",
                     out_dir=str(tmp_path / "out"), report_dir=str(tmp_path), only="shares"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


def test_report_replaces_its_own_and_those_of_earlier_versions(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "report-mini", tmp_path / "report")
    (tmp_path / "report" / "report.html").write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><title>LoRA on GPT-2</title>')
    check_folder(tmp_path / "report")
    check_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "report"):
        with pytest.raises(ValueError, match="file is no folder that can be written to"):
            check_folder(folder)


def test_folder_that_cannot_be_written_to_is_named_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"{tmp_path} is no folder that can be written to"):
        check_folder(tmp_path / "report")
