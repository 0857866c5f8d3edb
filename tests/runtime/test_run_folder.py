"""What a run writes about itself, and how tracking stays optional."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import run_folder, tracking

ROOT = Path(__file__).parents[2]


def test_changed_settings_names_both_values_and_skips_what_only_reports() -> None:
    old = {"lora_rank": 4, "seed": 1, "log_interval": 1}
    new = {"lora_rank": 8, "seed": 1, "log_interval": 5}
    assert run_folder.changed_settings(old, new) == "lora_rank=4, now 8"
    assert run_folder.changed_settings(old, old) == ""


def test_metrics_cut_short_by_a_crash_are_left_out(tmp_path: Path) -> None:
    lines = '{"iteration": 0, "train_loss": 1.0}\n{"iteration": 1, "tra'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert run_folder.read_metrics(tmp_path) == [{"iteration": 0, "train_loss": 1.0}]
    run_folder.forget_metrics(tmp_path, 9, evaluated=False)
    assert (tmp_path / "metrics.jsonl").read_text() == lines.splitlines()[0] + "\n"


def test_metrics_after_a_saved_state_are_forgotten(tmp_path: Path) -> None:
    lines = [
        {"iteration": 0, "validation_loss": 2.0}, {"iteration": 0, "train_loss": 2.0},
        {"iteration": 1, "validation_loss": 1.0}, {"iteration": 1, "train_loss": 1.0},
        {"iteration": 1, "test_accuracy_last": 0.5}, {"iteration": 2, "train_loss": 0.5},
    ]
    for evaluated, kept in ((True, 3), (False, 2)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text)
        run_folder.forget_metrics(tmp_path, 1, evaluated)
        assert run_folder.read_metrics(tmp_path) == lines[:kept]


def test_tracking_that_breaks_ends_quietly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, values: dict, step: int) -> None:
            raise ConnectionError("gone")

        finish = log

    metrics = run_folder.MetricsLog({"out_dir": str(tmp_path), "wandb_mode": "disabled"})
    for call in (lambda: metrics.log(0, train_loss=1.0), metrics.close):
        metrics.wandb = Broken()
        call()
        assert metrics.wandb is None
        assert capsys.readouterr().out.startswith("wandb stopped: ")
    assert len(run_folder.read_metrics(tmp_path)) == 1


def test_start_folder_removes_only_what_a_run_makes(tmp_path: Path) -> None:
    for name in ("best/x", "last/x", "metrics.jsonl", "trainer_state.pt", "loss.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    run_folder.start_folder({"out_dir": str(tmp_path)}, device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt"}
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["device"] == "cpu"
    assert described.keys() == {"settings", "device", "commit"}


def test_loss_plot_needs_no_metrics(tmp_path: Path) -> None:
    run_folder.plot_losses(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wanted", "environment", "key", "expected"),
    [
        ("auto", {}, None, "offline"),
        ("auto", {}, "netrc", "online"),
        ("auto", {"WANDB_MODE": "disabled"}, "netrc", "disabled"),
        ("offline", {"WANDB_MODE": "online"}, "netrc", "offline"),
        ("online", {}, None, "online"),
    ],
)
def test_wandb_is_online_only_where_a_key_is(
    wanted: str, environment: dict[str, str], key: str | None, expected: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracking.wandb_mode(wanted, lambda: key) == expected


def test_key_file_is_read_but_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("WANDB_API_KEY")
    Path("wandb_api.json").write_text('{"key": "planted-key"}')
    mode = tracking.wandb_mode("auto", lambda: tracking.os.environ["WANDB_API_KEY"])
    assert (mode, tracking.os.environ["WANDB_API_KEY"]) == ("online", "planted-key")
    assert "planted-key" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("content", ["not json", "{}"])
def test_unusable_key_file_turns_tracking_off_with_a_line(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    Path("wandb_api.json").write_text(content)
    settings = {"wandb_mode": "auto", "wandb_project": "p", "out_dir": str(tmp_path)}
    assert tracking.start_wandb(settings) is None
    assert capsys.readouterr().out.startswith("wandb: off, ")


def test_folder_in_use_is_refused_until_the_run_ends(tmp_path: Path) -> None:
    lock = run_folder.lock_folder(tmp_path)
    with pytest.raises(ValueError, match=r"out_dir='.*' is in use by another run"):
        run_folder.lock_folder(tmp_path)
    lock.release()
    run_folder.lock_folder(tmp_path).release()


def test_lock_of_a_killed_run_holds_nobody_up(tmp_path: Path) -> None:
    code = ("import os, pathlib, sys; from runtime.run_folder import lock_folder; "
            "lock_folder(pathlib.Path(sys.argv[1])); os._exit(9)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == 9
    run_folder.lock_folder(tmp_path).release()


def test_halves_of_files_are_removed_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    halves = [tmp_path / ".trainer_state.12.pt", tmp_path / "best" / ".model.345.safetensors"]
    others = [tmp_path / ".lock", tmp_path / ".hidden.txt", tmp_path / "best" / "model.safetensors"]
    for path in halves + others:
        path.touch()
    run_folder.lock_folder(tmp_path).release()
    assert not any(path.exists() for path in halves)
    assert all(path.exists() for path in others)


def test_folder_that_cannot_be_locked_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(run_folder.FileLock, "acquire", unsupported)
    run_folder.lock_folder(tmp_path)
    assert "cannot be locked here" in capsys.readouterr().err
