"""A run's folder: its settings and metrics, its plot, its lock, and when it is finished."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from runtime import run_folder

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings(run_folder.NewFolderConfig):
    lora_rank: int = 4
    seed: int = 1
    log_interval: int = 1


def test_changed_settings_names_both_values_and_skips_what_only_reports() -> None:
    saved = {"lora_rank": 4, "seed": 1, "log_interval": 1}
    changed = Settings(lora_rank=8, log_interval=5)
    assert run_folder.changed_settings(saved, changed) == "lora_rank=4, now 8"
    assert run_folder.changed_settings(saved, Settings()) == ""
    assert run_folder.changed_settings(saved, changed, ignore=["lora_rank"]) == ""


def test_setting_missing_from_a_saved_run_had_its_default() -> None:
    assert run_folder.changed_settings({}, Settings()) == ""
    assert run_folder.changed_settings({}, Settings(seed=2)) == "seed=1, now 2"


def test_run_is_finished_with_a_record_or_an_older_runs_last_score(tmp_path: Path) -> None:
    assert not run_folder.is_finished(tmp_path)
    run_folder.mark_finished(tmp_path, 9)
    assert not run_folder.is_finished(tmp_path)  # a record alone is no run
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 0}) + "\n")
    assert run_folder.is_finished(tmp_path)
    run_folder.reopen(tmp_path, 9, evaluated=True)
    assert not run_folder.is_finished(tmp_path)
    line = {"iteration": 9, "validation_loss_last": 1.0, "test_accuracy_best": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert not run_folder.is_finished(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"test_accuracy_last": 0.5}) + "\n")
    assert run_folder.is_finished(tmp_path)


def test_metrics_that_are_no_json_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n{x}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        run_folder.read_metrics(tmp_path)


@pytest.mark.parametrize(("name", "value"), [
    ("lora_rank", "16"), ("lora_rank", True), ("seed", 1.5), ("out_dir", 7), ("overwrite", [])])
def test_saved_setting_of_another_type_is_refused(name: str, value: object) -> None:
    saved = run_folder.SavedRun({name: value}, "cpu", "float32")
    with pytest.raises(ValueError, match=rf"config\.json: {name}=.* must be of type"):
        saved.config(Settings)


@pytest.mark.parametrize(("run", "message"), [
    ({"settings": {}, "device": "cpu", "dtype": "float32"}, "it lacks init_from, lora_rank"),
    ({"settings": {"init_from": "gpt2", "lora_rank": 1}}, "it lacks device, dtype"),
    ({"settings": [], "device": "cpu", "dtype": "float32"}, "settings must be an object, not"),
    ({"settings": 3}, "settings must be an object, not 3"),
])
def test_file_of_something_else_is_no_run(tmp_path: Path, run: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=message):
        run_folder.read_run(str(tmp_path))


def test_metrics_cut_short_by_a_crash_are_left_out(tmp_path: Path) -> None:
    lines = '{"iteration": 0, "train_loss": 1.0}\n{"iteration": 1, "tra'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert run_folder.read_metrics(tmp_path) == [{"iteration": 0, "train_loss": 1.0}]
    run_folder.reopen(tmp_path, 9, evaluated=False)
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
        run_folder.reopen(tmp_path, 1, evaluated)
        assert run_folder.read_metrics(tmp_path) == lines[:kept]


def test_start_folder_removes_only_what_a_run_makes(tmp_path: Path) -> None:
    for name in ("best/x", "last/x", "metrics.jsonl", "trainer_state.pt", "finished.json",
                 "loss.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    run_folder.start_folder(Settings(out_dir=str(tmp_path)), device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt"}
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["device"] == "cpu"
    assert described.keys() == {"settings", "device", "commit"}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that `run_folder` draws."""
    drawn: list[Figure] = []

    def keep(**settings: object) -> Figure:
        drawn.append(Figure(**settings))
        return drawn[-1]

    monkeypatch.setattr(run_folder, "Figure", keep)
    return drawn


@pytest.mark.parametrize("lines", [
    [],
    [{"iteration": 0, "validation_loss": 3.0}, {"iteration": 0, "train_loss": 2.5},
     {"iteration": 5, "train_loss": 1.5}, {"iteration": 6, "validation_loss": 1.0}],
])
def test_loss_plot_shows_the_logged_losses(
    tmp_path: Path, figures: list[Figure], lines: list[dict[str, float]]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_folder.plot_losses(tmp_path)
    (axes,) = figures[0].axes
    found = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert found == {key.replace("_", " "): [(line["iteration"], line[key]) for line in lines
                                             if key in line]
                     for key in ("train_loss", "validation_loss")}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == (
        "optimizer steps", "loss (nats a token)", "log")
    assert imread(tmp_path / "loss.png").shape == (600, 1050, 4)


def test_folder_in_use_is_refused_until_the_run_ends(tmp_path: Path) -> None:
    lock = run_folder.lock_folder(tmp_path)
    with pytest.raises(ValueError, match=r"out_dir='.*' is in use by another run"):
        run_folder.lock_folder(tmp_path)
    lock.release()
    run_folder.lock_folder(tmp_path).release()


def test_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    code = ("import os, pathlib, sys; from runtime.run_folder import lock_folder; "
            "lock_folder(pathlib.Path(sys.argv[1])); os._exit(9)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == 9
    run_folder.lock_folder(tmp_path).release()


def test_leftover_temporary_files_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    leftovers = [tmp_path / ".trainer_state.12.pt", tmp_path / "best" / ".model.345.safetensors"]
    others = [tmp_path / ".lock", tmp_path / ".hidden.txt", tmp_path / "best" / "model.safetensors"]
    for path in leftovers + others:
        path.touch()
    run_folder.lock_folder(tmp_path).release()
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)


def test_folder_that_cannot_be_locked_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(run_folder.FileLock, "acquire", unsupported)
    run_folder.lock_folder(tmp_path)
    assert capsys.readouterr().err == (
        f"{tmp_path} cannot be locked here: let no other run write to it\n")
