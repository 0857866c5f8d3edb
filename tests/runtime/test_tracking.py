"""Tracking is optional: its failures never end a run."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from runtime import tracking
from runtime.metrics import MetricsLog, read_metrics


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


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a home of its own, and an environment that says nothing to W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone, too
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


class FakeWandb(ModuleType):
    """A stand-in for W&B that notes the mode it is started in, or refuses."""

    def __init__(self, refusal: str = "") -> None:
        super().__init__("wandb")
        self.modes: list[str] = []
        self.refusal = refusal

    def Settings(self, **settings: object) -> dict:
        return settings

    def init(self, mode: str, **_: object) -> object:
        if self.refusal:
            raise ValueError(self.refusal)
        self.modes.append(mode)
        return self


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def start(wanted: str, folder: Path) -> tracking.Tracker:
    return tracking.start_tracking(tracking.TrackingConfig(wandb_mode=wanted), folder)


@pytest.mark.parametrize(
    ("wanted", "environment", "expected"),
    [
        ("auto", {}, ["offline"]),
        ("auto", {"WANDB_API_KEY": "k"}, ["online"]),
        ("auto", {"WANDB_API_KEY": ""}, ["offline"]),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, []),
        ("auto", {"WANDB_MODE": "dryrun", "WANDB_API_KEY": "k"}, ["offline"]),
        ("auto", {"WANDB_MODE": "online"}, ["online"]),
        *(("auto", {"WANDB_DISABLED": yes, "WANDB_MODE": "online"}, [])
          for yes in ("true", "TRUE", "1", "yes", "on")),
        ("auto", {"WANDB_DISABLED": "false", "WANDB_API_KEY": "k"}, ["online"]),
        ("online", {"WANDB_DISABLED": "true", "WANDB_MODE": "offline"}, ["online"]),
        ("offline", {"WANDB_MODE": "online", "WANDB_API_KEY": "k"}, ["offline"]),
        ("offline", {"WANDB_MODE": "nonsense"}, ["offline"]),
        ("disabled", {"WANDB_MODE": "online"}, []),
    ],
)
def test_mode_is_the_settings_else_the_environments_else_online_with_a_key(
    wanted: str, environment: dict[str, str], expected: list[str], nowhere: Path,
    wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start(wanted, nowhere)
    assert wandb.modes == expected


def test_login_of_wandb_itself_puts_no_run_online(nowhere: Path, wandb: FakeWandb) -> None:
    (nowhere / ".netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}")
    start("auto", nowhere)
    assert wandb.modes == ["offline"]
    assert tracking.os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert not hasattr(wandb, "api")  # W&B is to remove it


def test_unknown_mode_is_named_in_a_line(
    nowhere: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    assert start("auto", nowhere).run is None
    assert capsys.readouterr().out == (
        "wandb: off, WANDB_MODE='nonsense' must be one of online, offline, disabled, shared, "
        "dryrun, run\n")


@pytest.mark.parametrize("wanted", ["auto", "online"])
def test_key_file_is_read_but_never_shown(
    wanted: str, nowhere: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wandb_api.json").write_text('{"key": " planted-key\\n"}')
    assert start(wanted, nowhere).run is wandb
    assert (wandb.modes, tracking.os.environ["WANDB_API_KEY"]) == (["online"], "planted-key")
    wandb.refusal = "api_key:\n  input_value='planted-key' is bad"
    assert start(wanted, nowhere).run is None
    assert capsys.readouterr().out == "wandb: off, api_key: input_value='(key)' is bad\n"


@pytest.mark.parametrize("content", ["not json", "{}", '{"key": ""}', '{"key": 7}'])
def test_unusable_key_file_turns_tracking_off_with_a_line(
    content: str, nowhere: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wandb_api.json").write_text(content)
    assert start("auto", nowhere).run is None
    assert capsys.readouterr().out.startswith("wandb: off, wandb_api.json ")
    assert wandb.modes == []
