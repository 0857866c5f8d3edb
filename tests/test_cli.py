"""The scripts as a user starts them: one story that ends well, and many that end in one line."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import generate
import train
from configurator import run_script

ROOT = Path(__file__).parent.parent


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *arguments]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(script, *arguments), cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | environment)


MAINS = {"train.py": (train.main, train.TrainConfig),
         "generate.py": (generate.main, generate.GenerateConfig)}
Call = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a script in this process, where starting one is not what is tested."""

    def start(script: str, *arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        code = 0
        try:
            run_script(*MAINS[script])
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return start


@pytest.fixture(scope="module")
def settings(checkpoint: str, reviews: str) -> list[str]:
    return [f"init_from={checkpoint}", f"dataset={reviews}", "device=cpu", "dtype=float32",
            "--lora-rank=4", "alpha=8", "lr=1e-2", "batch_size=4", "max_iters=3",
            "eval_interval=2"]


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = run("train.py", *settings, f"out_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_training_tells_its_share_its_validations_and_both_test_scores(
    finished: tuple[Path, str]
) -> None:
    folder, printed = finished
    assert re.search(r"training 768 of 81\d,\d{3} parameters \(0\.09%\) on 48 reviews", printed)
    assert re.findall(r"step (\d): validation loss \d+\.\d+, accuracy", printed) == ["0", "2", "3"]
    for name in ("best", "last"):
        accuracy = json.loads((folder / name / "results.json").read_text())["accuracy"]
        assert re.search(rf"^ *{name} .* {accuracy:.4f} ", printed, re.MULTILINE)


def test_training_ends_with_what_to_do_next(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    resume = f"python generate.py init_from=resume out_dir={folder}"
    assert printed.splitlines()[-3:] == [
        f"score it again:  {resume}", f"ask it yourself: {resume} ask=True",
        f"open the page:   python -m demo out_dir={folder}"]


@pytest.mark.parametrize("checkpoint_name", ["best", "last"])
def test_generate_reproduces_the_very_same_accuracy(
    finished: tuple[Path, str], checkpoint_name: str, call: Call
) -> None:
    results = finished[0] / checkpoint_name / "results.json"
    trained = json.loads(results.read_text())
    results.unlink()
    done = call("generate.py", "init_from=resume", f"out_dir={finished[0]}",
                f"checkpoint={checkpoint_name}")
    assert done.returncode == 0, done.stderr
    assert json.loads(results.read_text()) == trained
    assert f"accuracy {trained['accuracy']:.4f}" in done.stdout


def test_zero_shot_score_has_a_folder_of_its_own(
    checkpoint: str, reviews: str, tmp_path: Path, call: Call
) -> None:
    done = call("generate.py", f"init_from={checkpoint}", f"dataset={reviews}", "split=validation",
                f"out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("zero_shot-*/results-validation*.json")
    assert json.loads(results.read_text())["n"] == 12


def test_export_is_written_once_and_is_a_model_to_start_from(
    finished: tuple[Path, str], tmp_path: Path, call: Call
) -> None:
    export = [f"out_dir={finished[0]}", f"export={tmp_path / 'merged'}"]
    assert f"written: {tmp_path / 'merged'}" in call("generate.py", *export).stdout
    assert "is there already" in call("generate.py", *export).stderr
    settings = json.loads((finished[0] / "config.json").read_text())["settings"]
    scored = call("generate.py", f"init_from={tmp_path / 'merged'}", f"out_dir={tmp_path}",
                  f"dataset={settings['dataset']}")
    (results,) = tmp_path.glob("zero_shot-*/results*.json")
    expected = json.loads((finished[0] / "best" / "results.json").read_text())
    assert json.loads(results.read_text())["confusion"] == expected["confusion"], scored.stderr
    refused = call("generate.py", *export, "text=fine")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "choose one of them" in refused.stderr


def test_one_text_gets_a_continuation_a_label_and_two_probabilities(
    finished: tuple[Path, str]
) -> None:
    done = run("generate.py", "init_from=resume", f"out_dir={finished[0]}", "text=a gorgeous film")
    assert done.returncode == 0, done.stderr
    pattern = (r"continuation: '.*'\nlabel: (positive|negative|garbage)\n"
               r"P\(negative\) = 0\.\d{4}\nP\(positive\) = 0\.\d{4}\n")
    assert re.fullmatch(pattern, done.stdout)


BAD_TRAINING = [
    (["lora_rnak=4"], "unknown setting 'lora_rnak'; did you mean 'lora_rank'?"),
    (["max_iters=many"], "max_iters='many' must be an integer"),
    (["dtype=float8"], "must be one of auto, float32, bfloat16, float16"),
    (["config/nothing.py"], "config file 'config/nothing.py' not found"),
    (["device=cuda:99"], "device='cuda:99' is not usable here"),
    (["dataset=nowhere"], "dataset='nowhere' must be rotten_tomatoes"),
    (["prompt=nice"], "prompt='nice' must be one of default, terse, detailed, question"),
    (["lora_targets=c_atn"], "unknown c_atn; allowed are qkv, attention, all, c_attn, attn.c_proj"),
    (["block_size=9999"], "block_size=9999, but the model has 256"),
    (["block_size=20"], "block_size=20 is too small for an instruction"),
    (["lr=1e30", "grad_clip=0"], "step 1: the loss of batch 1 of 2 is nan"),
    (["init_from=resume", "out_dir=nowhere"], "out_dir='nowhere' holds no run"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_TRAINING, ids=lambda value: str(value)[:40])
def test_bad_training_input_ends_in_one_line_and_exit_code_2(
    settings: list[str], tmp_path: Path, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [
        "train.py", *settings, f"out_dir={tmp_path / 'run'}", "wandb_mode=disabled", *arguments])
    with pytest.raises(SystemExit, match=r"^2$"):
        run_script(train.main, train.TrainConfig)
    line = capsys.readouterr().err.rsplit("\r", 1)[-1].strip().rsplit("\n", 1)[-1]  # after the bar
    assert line.startswith("error: ")
    assert message in line


BAD_SCORING = [
    (["init_from=resume", "out_dir=nowhere"], "out_dir='nowhere' holds no run"),
    (["init_from=gpt2", "dataset=movie_reviews"], "'gpt2' is no folder here and the hub did not"),
    (["checkpoint=first"], "checkpoint='first' must be one of best, last"),
    (["top_k=-1"], "top_k='-1' must be at least 0"),
    (["text"], "config file 'text' not found"),
    (["--text"], "--text needs a value"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_SCORING, ids=lambda value: str(value)[:40])
def test_bad_scoring_input_ends_in_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", f"out_dir={tmp_path}", *arguments])
    with pytest.raises(SystemExit, match=r"^2$"):
        run_script(generate.main, generate.GenerateConfig)
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_script_ends_with_exit_code_2_and_no_traceback(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        command(script, "no_such=1"), cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command line: unknown setting 'no_such'\n"


def test_damaged_checkpoint_is_refused(
    finished: tuple[Path, str], tmp_path: Path, call: Call
) -> None:
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    (tmp_path / "best").mkdir()
    for path in (finished[0] / "best").glob("adapter*"):
        (tmp_path / "best" / path.name).write_bytes(path.read_bytes()[:200])
    done = call("generate.py", "init_from=resume", f"out_dir={tmp_path}")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*adapter_config.json is not JSON.*\n", done.stderr)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written_is_told(settings: list[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    done = run("train.py", *settings, f"out_dir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_out_dir_that_is_a_file_is_told(settings: list[str], tmp_path: Path, call: Call) -> None:
    (tmp_path / "run").write_text("not a folder")
    done = call("train.py", *settings, f"out_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*run.*\n", done.stderr)
    assert (tmp_path / "run").read_text() == "not a folder"


def test_interrupt_saves_and_the_resumed_run_ends_like_any_other(
    settings: list[str], tmp_path: Path, call: Call
) -> None:
    out_dir = f"out_dir={tmp_path / 'run'}"
    process = subprocess.Popen(
        command("train.py", *settings, out_dir, "max_iters=100000", "lr_decay_iters=3"), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step 2:"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    stopped = re.search(r"stopped at step (\d+); resume with init_from=resume", errors)
    assert stopped
    assert "Traceback" not in errors
    steps = int(stopped[1]) + 1
    done = call("train.py", "init_from=resume", out_dir, f"max_iters={steps}")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    trained = [row["iteration"] for row in map(json.loads, lines) if "train_loss" in row]
    assert trained == list(range(steps))


def test_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    settings: list[str], finished: tuple[Path, str], tmp_path: Path, call: Call
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    state = (folder / "trainer_state.pt").read_bytes()
    resume = ("init_from=resume", f"out_dir={folder}", "max_iters=6")
    limit = len(state) - 1  # bytes that a file may have: enough for all but the state
    full = subprocess.run(
        command("train.py", *resume), cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 2
    (line,) = (line for line in full.stderr.splitlines() if line.startswith("error:"))
    assert re.match(r"error: cannot write .*trainer_state\.pt: .", line)
    assert "Traceback" not in full.stderr
    assert (folder / "trainer_state.pt").read_bytes() == state
    whole = call("train.py", *settings, f"out_dir={tmp_path / 'whole'}", "max_iters=6")
    again = call("train.py", *resume)
    assert (whole.returncode, again.returncode) == (0, 0), again.stderr
    one, other = (path / "last" / "adapter_model.safetensors"
                  for path in (folder, tmp_path / "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_wandb_offline_leaves_a_run_folder(settings: list[str], tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        command("train.py", *settings, f"out_dir={out_dir}", "max_iters=1"), cwd=tmp_path,
        capture_output=True, text=True, env=environment | {"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert re.search(r"^wandb: offline, in .*run/wandb", done.stdout, re.MULTILINE)
    (offline,) = (out_dir / "wandb").glob("offline-run-*")
    assert b"train_loss" in next(offline.glob("*.wandb")).read_bytes()


@pytest.mark.parametrize("given", ["variable", "file"])
def test_key_is_in_no_file_and_no_line(settings: list[str], tmp_path: Path, given: str) -> None:
    key = "0123456789abcdef" * 2 + "deadbeef"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_MODE": "offline", "HF_TOKEN": "hf_" + key[:34]}
    if given == "variable":
        environment["WANDB_API_KEY"] = key
    else:
        (tmp_path / "wandb_api.json").write_text(json.dumps({"key": key}))
    done = subprocess.run(
        command("train.py", *settings, f"out_dir={tmp_path / 'run'}", "max_iters=1"), cwd=tmp_path,
        capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    for secret in (key, environment["HF_TOKEN"]):
        assert secret not in done.stdout + done.stderr
        assert not [path for path in written if secret.encode() in path.read_bytes()]


@pytest.mark.faults  # wandb asks for half a minute
def test_tracking_server_that_refuses_does_not_stop_the_run(
    settings: list[str], tmp_path: Path
) -> None:
    with socket.socket() as closed:  # bound but not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = run("train.py", *settings, f"out_dir={tmp_path / 'run'}", "max_iters=1",
                   WANDB_MODE="online", WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^wandb: off, ", done.stdout, re.MULTILINE)
    assert (tmp_path / "run" / "last" / "results.json").is_file()


def test_second_interrupt_stops_at_once(settings: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("train.py", *settings, f"out_dir={tmp_path / 'run'}", "max_iters=100000",
                "batch_size=48", "gradient_accumulation_steps=1500"), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step 0:"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # in the midst of the first step, which takes much longer
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "stopped at step" not in errors


def test_termination_saves_first(settings: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("train.py", *settings, f"out_dir={tmp_path / 'run'}", "max_iters=100000"), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step 2:"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at step" in errors
    assert (tmp_path / "run" / "trainer_state.pt").is_file()


def test_wandb_that_fails_does_not_stop_the_run(settings: list[str], tmp_path: Path) -> None:
    done = run("train.py", *settings, f"out_dir={tmp_path / 'run'}", "max_iters=1",
               "wandb_project=" + "x" * 300, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^wandb: off, ", done.stdout, re.MULTILINE)
    assert (tmp_path / "run" / "last" / "results.json").is_file()
