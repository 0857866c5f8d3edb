"""Jobs run in parallel, none twice; failures are reported, and a stopped run saves its state."""

import json
import os
import shutil
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from made_runs import make_run

from checkpoints.trainer_state import STATE_FILE
from experiments.jobs import Job, run_jobs, share_of_machine
from runtime.run_folder import FINISHED_FILE

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
    assert share_of_machine(2, 3) == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = [share_of_machine(slot, 4)["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert given == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert share_of_machine(1, 2) == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "active",
                                      "CUDA_VISIBLE_DEVICES": "7"}
