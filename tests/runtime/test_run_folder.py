"""A run's folder: its settings and metrics, its plot, its lock, and when it is finished."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import pytest

from checkpoints.files import write_json
from runtime import run_folder
from runtime.metrics import MetricsLog

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings(run_folder.NewFolderConfig):
    lora_rank: Annotated[int, "a rank"] = 4
    seed: Annotated[int, "a seed"] = 1
    log_interval: Annotated[int, "steps"] = 1


@dataclass(frozen=True)
class Longer(Settings):
    init_from: Annotated[str, "a model"] = "gpt2"
    max_iters: Annotated[int, "steps"] = 9


@dataclass(frozen=True)
class Pretraining(run_folder.NewFolderConfig):
    seed: int = 1


def test_changed_settings_names_both_values_and_skips_what_only_reports() -> None:
    saved = {"lora_rank": 4, "seed": 1, "log_interval": 1}
    changed = Settings(lora_rank=8, log_interval=5)
    assert run_folder.changed_settings(saved, changed) == "lora_rank=4, now 8"
    assert run_folder.changed_settings(saved, Settings()) == ""
    assert run_folder.changed_settings(saved, changed, ignore=["lora_rank"]) == ""


def test_setting_missing_from_a_saved_run_had_its_default() -> None:
    assert run_folder.changed_settings({}, Settings()) == ""
    assert run_folder.changed_settings({}, Settings(seed=2)) == "seed=1, now 2"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run of nine steps, with a file that somebody put there."""
    folder = tmp_path / "run"
    settings = asdict(Settings(out_dir=str(folder))) | {"init_from": "gpt2", "max_iters": 9}
    write_json(folder / "config.json", {"settings": settings, "device": "cpu", "dtype": "float32"})
    for name in ("best", "last"):
        write_json(folder / name / "results.json", {"accuracy": 0.5})
        (folder / name / "adapter_model.safetensors").write_text("weights")
    (folder / "best" / "notes.txt").write_text("mine")
    (folder / "metrics.jsonl").write_text(json.dumps({"iteration": 9, "loss": 1.0}) + "\n")
    (folder / "trainer_state.pt").write_text("state")
    run_folder.mark_finished(MetricsLog(folder), 9)
    return folder


def test_run_is_finished_with_a_record_or_an_older_runs_last_score(finished: Path) -> None:
    assert run_folder.is_finished(finished)
    (finished / "finished.json").unlink()
    assert not run_folder.is_finished(finished)
    lines = [({"iteration": 9, "validation_loss_last": 1.0, "test_accuracy_best": 0.5}, False),
             ({"iteration": 9, "test_accuracy_last": 0.5}, True),
             ({"iteration": 8, "test_accuracy_last": 0.5}, False)]
    for line, expected in lines:
        (finished / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        assert run_folder.is_finished(finished) == expected


@pytest.mark.parametrize("name", [
    "config.json", "metrics.jsonl", "finished.json", "best/results.json", "last/results.json"])
def test_run_without_one_of_its_files_is_not_finished(finished: Path, name: str) -> None:
    (finished / name).unlink()
    assert not run_folder.is_finished(finished)


@pytest.mark.parametrize("steps", [10, "9", None])
def test_record_of_fewer_steps_than_the_settings_is_not_that_of_a_finished_run(
    finished: Path, steps: object
) -> None:
    run_folder.mark_finished(MetricsLog(finished), 8)
    run = json.loads((finished / "config.json").read_text())
    run["settings"]["max_iters"] = steps
    write_json(finished / "config.json", run)
    assert run_folder.is_finished(finished) == (not isinstance(steps, int))


def test_continued_run_is_one_of_the_new_settings(finished: Path) -> None:
    saved = run_folder.read_run(str(finished))
    config = Longer(out_dir=str(finished), max_iters=20)
    run_folder.continue_folder(
        config, saved, 9, True, device="cuda", dtype="float32", threads="4")
    now = run_folder.read_run(str(finished))
    assert now.settings == asdict(config)
    assert (now.device, now.dtype, now.facts["threads"]) == ("cuda", "float32", "4")
    assert not run_folder.is_finished(finished)


def test_a_killed_continuation_leaves_an_unfinished_run(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "reopen", kill)
    config, saved = Longer(out_dir=str(finished), max_iters=20), run_folder.read_run(str(finished))
    with pytest.raises(KeyboardInterrupt):
        run_folder.continue_folder(config, saved, 9, True, device="cpu", dtype="float32")
    assert not run_folder.is_finished(finished)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["config.json", "base/thesis.txt", "best/x", "notes.txt", "a/b/c"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_other_files_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('{"settings": {}}')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"holds files that no run wrote \({name.split('/')[0]}"):
        run_folder.refuse_loss(Settings(out_dir=str(tmp_path), overwrite=overwrite))
    assert contents(tmp_path) == before


def test_folder_of_runs_may_hold_a_run_itself(tmp_path: Path, finished: Path) -> None:
    for name in ("zero_shot-gpt2/results.json", "log.txt", ".gitkeep", "report/report.md",
                 "merged/tokenizer_config.json", "bench/bench.json", "analysis/lengths.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    finished.rename(tmp_path / "run")
    run_folder.refuse_loss(Settings(out_dir=str(tmp_path)))
    (tmp_path / "experiments").mkdir()
    (tmp_path / "run").rename(tmp_path / "experiments" / "run")
    run_folder.refuse_loss(Settings(out_dir=str(tmp_path)))


def test_run_in_the_place_of_a_checkpoint_is_refused(tmp_path: Path, finished: Path) -> None:
    finished.rename(tmp_path / "best")
    with pytest.raises(ValueError, match=r"best is a run of its own; choose another out_dir"):
        run_folder.refuse_loss(Settings(out_dir=str(tmp_path), overwrite=True))


def test_link_in_the_place_of_a_checkpoint_is_refused(tmp_path: Path, finished: Path) -> None:
    shutil.rmtree(finished / "best")
    (finished / "best").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"best is a link; choose another out_dir"):
        run_folder.refuse_loss(Settings(out_dir=str(finished), overwrite=True))


def test_run_of_another_script_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match="holds a run of another script"):
        run_folder.refuse_loss(Pretraining(out_dir=str(finished), overwrite=True))


@pytest.mark.parametrize("name", ["", "best", "best/deeper"])
def test_base_model_in_the_runs_folder_is_refused(finished: Path, name: str) -> None:
    (finished / name).mkdir(exist_ok=True)
    config = Longer(out_dir=str(finished), overwrite=True, init_from=str(finished / name))
    with pytest.raises(ValueError, match=r"init_from='.*' is in out_dir='.*'; choose another"):
        run_folder.refuse_loss(config)


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out_dir='.*file' is a file"):
        run_folder.refuse_loss(Settings(out_dir=str(tmp_path / "file")))


def test_changed_inputs_of_a_run_are_refused() -> None:
    saved = run_folder.SavedRun({}, "cpu", "float32", facts={"data_sha256": "a" * 64})
    saved.refuse_changed_inputs(base_sha256="b" * 64, data_sha256="a" * 64)
    with pytest.raises(ValueError, match=r"the data set changed since .*: its SHA-256 was aaaa"):
        saved.refuse_changed_inputs(data_sha256="b" * 64)


def test_relative_path_of_an_older_run_is_the_absolute_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Longer(init_from=str(tmp_path / "base"))
    assert run_folder.changed_settings({"init_from": "base"}, config) == ""
    assert run_folder.changed_settings({"init_from": "other"}, config)


def test_run_without_a_state_starts_again_unless_it_has_checkpoints(finished: Path) -> None:
    config = Settings(out_dir=str(finished))
    assert run_folder.has_state(config)
    (finished / "trainer_state.pt").unlink()
    with pytest.raises(ValueError, match=r"it has best and last, but no trainer_state\.pt; its"):
        run_folder.has_state(config)
    for name in ("best", "last"):  # as if killed before the state was whole
        (finished / name / "results.json").unlink()
    assert not run_folder.has_state(config)


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
    ({"settings": {"init_from": "gpt2", "lora_rank": 1}, "device": "cpu", "dtype": "float32",
      "processes": "one"}, "processes='one' must be a number"),
])
def test_file_of_something_else_is_no_run(tmp_path: Path, run: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=message):
        run_folder.read_run(str(tmp_path))


def test_start_folder_removes_only_what_a_run_writes(finished: Path) -> None:
    (finished / "base").mkdir()
    for name in ("notes.txt", "loss.png", "last/results-train.json", "last/predictions-train.jsonl",
                 "last/results-mine.json", "base/results.json", "base/model.safetensors"):
        (finished / name).write_text("old")
    run_folder.start_folder(Settings(out_dir=str(finished)), device="cpu")
    assert contents(finished).keys() == {
        "config.json", "notes.txt", "best/notes.txt", "last/results-mine.json",
        "base/model.safetensors"}
    described = json.loads((finished / "config.json").read_text())
    assert described["device"] == "cpu"
    assert described.keys() == {"settings", "device", "commit"}


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
    leftovers = [tmp_path / ".trainer_state.12.partial.pt",
                 tmp_path / "best" / ".model.345.partial.safetensors"]
    others = [tmp_path / ".lock", tmp_path / ".hidden.txt", tmp_path / ".results.7.json",
              tmp_path / "best" / "model.safetensors",
              tmp_path / "run" / ".model.7.partial.safetensors"]
    (tmp_path / "run").mkdir()  # another run's, which may be alive
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


def test_next_steps_name_the_folder_unless_the_page_finds_it() -> None:
    assert run_folder.next_steps("out/my run") == [
        "score it again:  python generate.py init_from=resume 'out_dir=out/my run'",
        "ask it yourself: python generate.py init_from=resume 'out_dir=out/my run' ask=True",
        "open the page:   python -m demo"]
    assert run_folder.next_steps("elsewhere/out")[2] == (
        "open the page:   python -m demo out_dir=elsewhere/out")
