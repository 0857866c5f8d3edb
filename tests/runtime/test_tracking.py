"""Tracking is optional: its failures never end a run."""

from pathlib import Path

import pytest

from runtime import tracking
from runtime.run_folder import MetricsLog, read_metrics


def test_failing_tracker_is_dropped_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, values: dict, step: int) -> None:
            raise ConnectionError("gone")

        finish = log

    tracker = tracking.Tracker()
    metrics = MetricsLog(tmp_path, tracker)
    for call in (lambda: metrics.log(0, train_loss=1.0), metrics.close):
        tracker.run = Broken()
        call()
        assert tracker.run is None
        assert capsys.readouterr().out.startswith("wandb stopped: ")
    assert len(read_metrics(tmp_path)) == 1


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
def test_wandb_mode_is_online_if_a_key_is_found(
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
    assert tracking.start_tracking(tracking.TrackingConfig(), tmp_path).run is None
    assert capsys.readouterr().out.startswith("wandb: off, ")
