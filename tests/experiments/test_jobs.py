"""Jobs run in parallel, none twice; failures are reported, and a stopped run saves its state."""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from made_runs import make_run, missing, zero_shot

from checkpoints.files import read_json, write_json
from checkpoints.trainer_state import STATE_FILE
from experiments import finished_runs, jobs
from experiments.jobs import Job, run_jobs, share_of_machine
from experiments.shared_job import SharedJob
from runtime.run_folder import FINISHED_FILE
from tasks.sources import data_digest
from train import TrainConfig

# A stand-in for train.py: it notes its arguments and when it ran, and does as it is told.
SCRIPT = """
import json, os, pathlib, signal, sys, time
settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(settings["out_dir"])
def save(*_):
    (folder / "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
started = time.time()
(folder / "started").write_text(json.dumps([sys.argv[1:], os.environ.get("OMP_NUM_THREADS")]))
if (folder / "reason").exists():
    reason = (folder / "reason").read_text()
    sys.exit("error: " + reason if reason else 1)
if settings.get("die"):
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(float(settings.get("seconds", 0)))
if not settings.get("silent"):
    (folder / "result.json").write_text(json.dumps([started, time.time()]))
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def job(script: str, name: str, **settings: object) -> Job:
    return Job(name, script, settings, Path(script).parent / name, "result.json")


def failing(script: str, name: str, reason: str) -> Job:
    failing = job(script, name)
    failing.folder.mkdir()
    (failing.folder / "reason").write_text(reason)
    return failing


def stop(folder: Path, script: str = "train.py", **settings: object) -> Job:
    """Write a training run that was interrupted."""
    job = make_run(folder, "10", **settings)._replace(script=script)
    for name in ("best", "last"):
        shutil.rmtree(folder / name)
    (folder / FINISHED_FILE).unlink()
    (folder / "metrics.jsonl").write_text('{"iteration": 3, "train_loss": 1.0}\n')
    (folder / STATE_FILE).touch()
    return job


def outcomes(jobs: list[Job], at_once: int = 1) -> dict[str, str]:
    return {done.name: error for done, error in run_jobs(jobs, at_once)}


def test_every_job_is_run_and_each_failure_reported(script: str) -> None:
    jobs = [job(script, "good"), failing(script, "bad", "no such file"),
            job(script, "killed", die="yes"), job(script, "silent", silent="yes")]
    assert outcomes(jobs, 2) == {
        "good": "", "bad": "no such file", "killed": "killed by SIGKILL",
        "silent": "it ended without its result",
    }
    assert [job.finished for job in jobs] == [True, False, False, False]


def test_two_at_once_are_two_and_never_three(script: str) -> None:
    jobs = [job(script, f"job{i}", seconds=0.5) for i in range(5)]
    outcomes(jobs, 2)
    spans = [json.loads((job.folder / "result.json").read_text()) for job in jobs]
    overlaps = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(overlaps) == 2


def test_state_is_deleted_when_a_job_is_finished_and_kept_when_it_failed(script: str) -> None:
    jobs = [job(script, "good"), failing(script, "bad", "reason")]
    for each in jobs:
        each.folder.mkdir(exist_ok=True)
        (each.folder / STATE_FILE).touch()
    outcomes(jobs)
    assert [(each.folder / STATE_FILE).exists() for each in jobs] == [False, True]


def test_state_of_a_job_that_was_stopped_after_its_last_result_is_deleted(script: str) -> None:
    done, half = job(script, "done"), job(script, "half")
    outcomes([done])
    for each in (done, half):
        each.folder.mkdir(exist_ok=True)
        (each.folder / STATE_FILE).touch()
        each.tidy()
    assert [(each.folder / STATE_FILE).exists() for each in (done, half)] == [False, True]


def test_interrupted_job_resumes_and_a_fresh_one_gets_its_settings(script: str) -> None:
    fresh = job(script, "fresh", learning_rate=0.1)
    stopped = stop(Path(script).parent / "stopped", script, learning_rate=0.1)
    assert (fresh.interrupted, stopped.interrupted) == (False, True)
    outcomes([fresh, stopped])
    heard = {each.name: json.loads((each.folder / "started").read_text())[0]
             for each in (fresh, stopped)}
    assert heard["fresh"] == ["learning_rate=0.1", f"out_dir={fresh.folder}"]
    assert heard["stopped"] == ["init_from=resume", f"out_dir={stopped.folder}"]


def test_closing_early_stops_the_running_jobs_after_they_saved(script: str) -> None:
    jobs = [job(script, "short"), job(script, "long", seconds=60),
            job(script, "never")]
    started = time.monotonic()
    with closing(run_jobs(jobs, 2)) as ended:
        assert next(ended)[0].name == "short"
        deadline = time.monotonic() + 30
        while not (jobs[1].folder / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert time.monotonic() - started < 30
    assert (jobs[1].folder / "saved").exists()
    assert not (jobs[1].folder / "result.json").exists()
    assert not jobs[2].folder.exists()


def test_jobs_do_not_hear_the_terminals_ctrl_c(script: str) -> None:
    each = job(script, "own_session", seconds=0.5)
    each.folder.mkdir()
    process = each.start({})
    assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
    assert process.wait() == 0


def test_log_keeps_what_a_job_said_last_time(script: str) -> None:
    each = failing(script, "bad", "reason")
    outcomes([each])
    outcomes([each])
    assert each.log.read_text().count("error: reason") == 2


def test_training_run_is_finished_when_its_folder_says_so(tmp_path: Path) -> None:
    each = make_run(tmp_path / "done", "10")
    assert each.state == "finished"
    stopped = stop(tmp_path / "stopped")
    assert stopped.state == "interrupted"


def test_error_of_an_earlier_attempt_is_not_reported_again(script: str) -> None:
    each = failing(script, "bad", "reason")
    assert outcomes([each]) == {"bad": "reason"}
    assert each.state == "failed: reason"
    (each.folder / "reason").write_text("")  # now it ends without a word
    assert outcomes([each])["bad"] == f"exit code 1, see {each.log}"
    assert each.state == "to do"


def test_command_is_one_that_a_shell_takes(script: str) -> None:
    each = Job("name", "train.py", {"prompt": "Is {text} good?"}, Path("out/a b"), "x")
    assert each.command == "python train.py 'prompt=Is {text} good?' 'out_dir=out/a b'"


def test_job_of_two_processes_is_torchruns(script: str) -> None:
    each = job(script, "pair")._replace(processes=2)
    assert each.command.startswith("torchrun --standalone --nproc_per_node=2 /")
    each.folder.mkdir()
    assert each.start({}).wait() == 0
    assert each.finished


def test_threads_and_gpus_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert share_of_machine(0, 1) == {}
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "4,7,")
        assert [share_of_machine(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == [
            "4", "7", "4"]
    assert share_of_machine(2, 3) == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = [share_of_machine(slot, 4)["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert given == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert share_of_machine(1, 2) == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "active",
                                      "CUDA_VISIBLE_DEVICES": "7"}


def damage(path: Path, content: str | None) -> None:
    path.unlink()
    if content is not None:
        path.write_text(content)


DAMAGES = [
    ("best/results.json", None, "best/results.json is missing"),
    ("last/predictions.jsonl", None, "last/predictions.jsonl is missing"),
    ("config.json", "{", "config.json is not JSON"),
    ("config.json", "[" * 100_000, ""),
    ("config.json", '{"settings": {}}', "is not a fine-tuning run's"),
    ("best/results.json", "\0", "results.json is not JSON"),
    ("best/results.json", '{"n": 2, "accuracy": 0.5, "constrained_accuracy": 0.5}', "garbage must"),
    ("best/results.json", '{"n": 2, "accuracy": NaN, "constrained_accuracy": 0.5, "garbage": 0}',
     "accuracy must be a finite number, not nan"),
    ("best/results.json", '{"n": 2, "accuracy": 2.0, "constrained_accuracy": 0.5, "garbage": 0}',
     "an accuracy must be between 0 and 1"),
    ("best/predictions.jsonl", '{"text": "t"}', "predictions.jsonl:1: it lacks generated"),
    ("best/predictions.jsonl", '{"text": "t", "generated": "", "truth": 1, "label": 1}',
     "predictions.jsonl holds 1 predictions, not 2"),
    ("metrics.jsonl", '{"iteration": 3, "validation_loss": NaN}', "validation_loss must be a"),
    ("metrics.jsonl", '{"validation_loss": 1.0}', "a line must name its iteration"),
    ("metrics.jsonl", '{"iteration": 0, "reviews_per_second": 0}', "must be positive"),
    ("metrics.jsonl", '{"iteration": 0, "train_loss": 1.0}', "no validation loss after step 0"),
]


@pytest.mark.parametrize(("file", "content", "reason"), DAMAGES)
def test_run_that_cannot_be_read_is_to_do_again_from_scratch(
    file: str, content: str | None, reason: str, tmp_path: Path
) -> None:
    each = make_run(tmp_path / "run", "10")
    assert each.finished
    (each.folder / STATE_FILE).touch()
    damage(each.folder / file, content)
    assert each.state.startswith("to do again: ")
    assert reason in each.state
    assert len(each.state.splitlines()) == 1
    each.tidy()  # keeps what a person may want to look at
    assert (each.folder / STATE_FILE).exists()
    assert started(each)[:1] != ["init_from=resume"]


def started(job: Job) -> list[str]:
    """Return the arguments that a job's process gets, noted by a stand-in for its script."""
    script = job.folder.parent / "note.py"
    script.write_text(SCRIPT)
    job._replace(script=str(script)).start({}).wait()
    return json.loads((job.folder / "started").read_text())[0]


def test_damaged_scores_of_the_base_model_are_to_do_again(tmp_path: Path) -> None:
    zero = zero_shot(tmp_path, ["a", "b"])
    assert zero.finished
    for file, content in (("predictions.jsonl", "{"), ("results.json", '{"n": 2}')):
        (tmp_path / "zero" / "zero_shot-x" / file).write_text(content)
        assert zero.state.startswith(f"to do again: {tmp_path}/zero/zero_shot-x/{file}")
    assert zero._replace(settings={"task": "python_codes"}).state.startswith("to do again: ")


def test_interrupted_run_resumes_with_the_processes_it_was_started_with(tmp_path: Path) -> None:
    each = stop(tmp_path / "run")._replace(processes=1)
    about = read_json(each.folder / "config.json")
    write_json(each.folder / "config.json", about | {"processes": 2})
    assert each.launched.processes == 2
    assert each.command.startswith("torchrun --standalone --nproc_per_node=2 train.py ")
    assert started(each._replace(processes=3)) == ["init_from=resume", f"out_dir={each.folder}"]
    write_json(each.folder / "config.json", about | {"processes": "two"})
    assert each.state.startswith("to do again: ")
    assert each.launched.processes == 1  # a new run has those of the setting
    assert missing(tmp_path / "new")._replace(processes=2).launched.processes == 2


def test_resumed_run_is_started_by_torchrun_with_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each, heard = stop(tmp_path / "run"), []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    about = read_json(each.folder / "config.json")
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda command, env, **_: heard.append(
        [*command, env.get("CUDA_VISIBLE_DEVICES")]))
    for recorded, setting in ((2, 1), (1, 2)):
        write_json(each.folder / "config.json", about | {"processes": recorded})
        each._replace(processes=setting).start({"CUDA_VISIBLE_DEVICES": "1"})
    assert [command.pop() for command in heard] == [None, "1"]  # two processes need two GPUs
    assert "--nproc_per_node=2" in heard[0]
    assert not [word for word in heard[1] if "torch.distributed" in word]
    assert all("init_from=resume" in command for command in heard)


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("source", ["data", "base model"])
def test_run_whose_data_or_base_model_changed_is_to_do_again_from_scratch(
    source: str, interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    make = stop if interrupted else make_run
    arguments = () if interrupted else ("10",)
    each = make(tmp_path / "run", *arguments, dataset=str(tmp_path / "data"),
                init_from=str(tmp_path / "base"))
    fact, function = {"data": ("data_sha256", "data_digest"),
                      "base model": ("base_sha256", "checkpoint_digest")}[source]
    about = read_json(each.folder / "config.json")
    for then, now, same in (("1", "1", True), ("1", "2", False), ("", "2", True), (None, "2", True),
                            ("1", "", True), ("1", OSError("unreachable"), True)):
        monkeypatch.setattr(finished_runs, function, digest_that_is(now))
        write_json(each.folder / "config.json", about | ({} if then is None else {fact: then}))
        expected = "interrupted" if interrupted else "finished"
        assert each.state == (expected if same else f"to do again: its {source} changed")
        if not same:
            (each.folder / STATE_FILE).touch()
            assert started(each)[:1] != ["init_from=resume"]


def digest_that_is(now: str | Exception) -> Callable[[str], str]:
    def digest(source: str) -> str:
        if isinstance(now, Exception):
            raise now
        return now
    return digest


def test_hub_is_not_asked_for_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = make_run(tmp_path / "run", "10")  # of gpt2-medium
    about = read_json(each.folder / "config.json")
    write_json(each.folder / "config.json", about | {"base_sha256": "1"})
    monkeypatch.setattr(finished_runs, "checkpoint_digest", lambda name: pytest.fail(name))
    assert each.finished


def test_scores_of_the_base_model_on_other_data_are_to_do_again(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    zero = zero_shot(tmp_path, ["a"])._replace(settings={"dataset": str(tmp_path / "data")})
    results = tmp_path / "zero" / "zero_shot-x" / "results.json"
    for name in ("train", "validation", "test"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("{}")
    before = read_json(results)
    write_json(results, before | {"data_sha256": data_digest(str(tmp_path / "data"))})
    assert zero.finished
    write_json(results, before | {"data_sha256": "of other data"})
    assert zero.state == "to do again: its data changed"


@pytest.mark.parametrize("make", [stop, lambda folder: make_run(folder, "10")])
def test_run_that_was_extended_by_hand_is_neither_reported_nor_replaced(
    make: Callable[[Path], Job], tmp_path: Path
) -> None:
    each = make(tmp_path / "run")
    with open(each.folder / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 90, "train_loss": 1.0}\n')
    assert each.state == "holds another run: 90 steps, now 80"
    about = read_json(each.folder / "config.json")
    about["settings"] |= {"max_iters": 100, "lr_decay_iters": 80}
    write_json(each.folder / "config.json", about)
    assert each.state == "holds another run: max_iters=100, now 80"
    before = sorted(tmp_path.rglob("*"))
    (each_again, error), = run_jobs([each], 1)
    assert each_again is each
    assert error == (f"{each.folder} holds another run: max_iters=100, now 80; "
                     "move it away or delete it")
    assert sorted(tmp_path.rglob("*")) == before


def spoil_log(folder: Path) -> None:
    folder.mkdir()
    (folder / "log.txt").mkdir()


def spoil_folder(folder: Path) -> None:
    folder.write_text("mine")


@pytest.mark.parametrize("spoil", [spoil_log, spoil_folder])
def test_job_whose_folder_cannot_be_used_fails_in_a_line_and_stops_no_other(
    spoil: Callable[[Path], None], script: str
) -> None:
    bad = [job(script, f"bad{i}") for i in range(3)]
    for each in bad:
        spoil(each.folder)
        assert each.state == "to do"
    found = outcomes([*bad[:2], job(script, "good"), bad[2]], 2)
    assert found.pop("good") == ""
    assert len(found) == 3
    for each in bad:
        assert found[each.name].startswith(str(each.folder))
        assert "Errno" not in found[each.name]


def test_log_of_any_bytes_is_read(script: str) -> None:
    each = job(script, "odd")
    each.folder.mkdir()
    each.log.write_bytes(b"\xff\0$ python\nerror: a\x1b[31m \xff\0 b\r\n")
    assert each.state == "failed: a\\x1b[31m \ufffd\\x00 b"


def test_signal_without_a_name_is_a_number(script: str) -> None:
    assert job(script, "x").failure(-40) == "killed by signal 40"


def test_run_that_cannot_resume_says_how_to_start_afresh(script: str, tmp_path: Path) -> None:
    each = stop(tmp_path / "stopped", script)
    (each.folder / "reason").write_text("damaged state")
    assert outcomes([each]) == {
        "stopped": f"damaged state (to start afresh, delete {each.folder})"}


def test_folder_whose_settings_cannot_be_read_is_kept(config: TrainConfig, tmp_path: Path) -> None:
    """For once with train.py itself: it replaces nothing that it cannot tell to be a run."""
    settings = {name: getattr(config, name) for name in ("init_from", "dataset", "device", "dtype")}
    each = Job("run", "train.py", settings | {"max_iters": 1, "overwrite": True}, tmp_path / "run")
    each.folder.mkdir()
    (each.folder / "config.json").write_text("{")
    (each.folder / STATE_FILE).write_bytes(b"damaged")
    assert each.state.startswith("to do again: ")
    error = outcomes([each])["run"]
    assert "holds files that no run wrote (config.json, trainer_state.pt)" in error
    assert (each.folder / STATE_FILE).read_bytes() == b"damaged"


def test_shared_job_is_started_once_and_followed_to_its_end(script: str) -> None:
    shared = SharedJob(job(script, "shared", seconds=0.2))
    one, other = shared.follow(), shared.follow()
    next(one)
    process = shared.process
    next(other)
    assert shared.process is process  # the second reader has joined
    assert [list(one)[-1], list(other)[-1]] == [f"{shared.printed()}\nThe run is finished."] * 2
    assert "seconds=0.2" in shared.printed()


def test_shared_job_leaves_a_finished_run_alone(script: str) -> None:
    shared = SharedJob(job(script, "done"))
    list(shared.follow())
    process, started = shared.process, (shared.job.folder / "started").stat().st_mtime_ns
    assert list(shared.follow()) == list(SharedJob(shared.job).follow()) == ["The run is finished."]
    assert shared.process is process
    assert (shared.job.folder / "started").stat().st_mtime_ns == started


def test_shared_job_says_why_it_failed(script: str) -> None:
    assert list(SharedJob(failing(script, "bad", "no such file")).follow())[-1].endswith(
        "error: no such file")
    held = job(script, "held")
    held.folder.write_text("a file")
    (error,) = SharedJob(held).follow()
    assert error.startswith("error: ")
    assert "held" in error


def test_progress_bar_is_printed_in_its_last_state(tmp_path: Path) -> None:
    shared = SharedJob(Job("bar", "train.py", {}, tmp_path))
    lines = "".join(f"line {i}\n" for i in range(20))
    shared.job.log.write_text(f"{jobs.ATTEMPT} train.py\n{lines}\r 10%\r 20% \nend\n")
    assert shared.printed().splitlines() == [*(f"line {i}" for i in range(10, 20)), " 20%", "end"]
