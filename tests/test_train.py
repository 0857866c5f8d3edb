"""A run's folder is all it takes to go on, and nothing in it is lost or mixed up."""

import contextlib
import json
import os
import pickle
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train as training
from checkpoints.trainer_state import read_state
from dataloader import make_loader
from methods.build import load_checkpoint
from model import GPT
from runtime import run_folder
from runtime.metrics import read_metrics
from runtime.run_folder import resumed_settings
from tasks.sentiment import SentimentTask
from train import MAY_CHANGE, Run, TrainConfig, train, validate

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def metrics(config: TrainConfig) -> list[dict]:
    """The metrics of a run without what depends on the clock and on the process."""
    lines = read_metrics(Path(config.out_dir))
    return [{k: v for k, v in line.items()
             if k != "reviews_per_second" and not k.endswith("memory_mib")} for line in lines]


def test_run_leaves_the_folder_that_the_readme_promises(config: TrainConfig) -> None:
    scores = train(config)
    folder = Path(config.out_dir)
    described = json.loads((folder / "config.json").read_text())
    assert described["settings"] == asdict(replace(config, lr_decay_iters=8))
    assert described["dtype"] == "float32"
    assert described["parameters"]["trained"] == 2 * 2 * 3 * 4 * 16
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = read_metrics(folder)
    assert [line["iteration"] for line in lines if "validation_loss" in line] == [0, 3, 6, 8]
    assert [line["iteration"] for line in lines if "train_loss" in line] == list(range(8))
    for name in ("best", "last"):
        assert {path.name for path in (folder / name).iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", "results.json",
            "predictions.jsonl",
        }
        results = json.loads((folder / name / "results.json").read_text())
        assert results["accuracy"] == scores[name]["accuracy"]
        assert results["n"] == 12


def test_best_is_the_checkpoint_of_the_lowest_validation_loss(config: TrainConfig) -> None:
    config = replace(config, learning_rate=0.3, lora_dropout=0.0)  # too fast to only improve
    train(config)
    validated = {line["iteration"]: line["validation_loss"] for line in metrics(config)
                 if "validation_loss" in line and line["iteration"] > 0}
    folder = Path(config.out_dir)
    for name, expected in (("best", min(validated.values())), ("last", validated[8])):
        model = load_checkpoint(folder / name, config, CPU, torch.float32)
        loader = make_loader(config, model.config)
        found = validate(model, loader.batches(loader.records("validation"), 64), torch.float32)
        assert found["loss"] == pytest.approx(expected, abs=1e-6)


def test_best_and_last_of_one_validation_are_scored_once(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, score_checkpoint = [], training.score_checkpoint

    def scoring(run: training.Run, name: str) -> dict:
        scored.append(name)
        return score_checkpoint(run, name)

    monkeypatch.setattr(training, "score_checkpoint", scoring)
    best, last = (Path(config.out_dir, name) for name in ("best", "last"))
    scores = train(replace(config, eval_interval=8, baseline=True))
    assert scored == ["base", "best"]
    assert scores["last"] == scores["best"]
    for name in ("results.json", "predictions.jsonl", "adapter_model.safetensors"):
        assert (best / name).read_bytes() == (last / name).read_bytes()


def test_full_fine_tuning_saves_a_whole_model(config: TrainConfig) -> None:
    train(replace(config, lora_rank=0, max_iters=2, always_save_checkpoint=False))
    last = Path(config.out_dir, "last")
    assert {path.name for path in last.glob("*.safetensors")} == {"model.safetensors"}
    base, tuned = GPT.from_pretrained(config.init_from), GPT.from_pretrained(str(last))
    moved = [name for name, p in tuned.named_parameters()
             if not torch.equal(p, base.get_parameter(name))]
    assert len(moved) == len(list(base.parameters()))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("stop_at", [3, 5])
def test_resumed_run_equals_an_uninterrupted_one(
    config: TrainConfig, tmp_path: Path, stop_at: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, dropout included, though the decay was made for all eight steps."""
    config = replace(config, lora_rank=rank, dropout=0.1, decay_lr=True, lr_decay_iters=8)
    train(config)
    parts = replace(config, out_dir=str(tmp_path / "parts"), max_iters=stop_at)
    train(parts)
    argv = ["train.py", "init_from=resume", f"out_dir={parts.out_dir}", "max_iters=8"]
    monkeypatch.setattr(sys, "argv", argv)
    train(resumed_settings(replace(parts, init_from="resume"), MAY_CHANGE), resume=True)
    weights = "model.safetensors" if rank == 0 else "adapter_model.safetensors"
    whole, resumed_weights = (
        Path(run.out_dir, "last", weights).read_bytes() for run in (config, parts))
    assert whole == resumed_weights
    if stop_at % config.eval_interval == 0:  # else the first part validated once more, at its end
        assert metrics(parts) == metrics(config)


def test_resume_refuses_changes_that_would_make_it_another_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(config, max_iters=1))
    monkeypatch.setattr(sys, "argv", ["train.py", "init_from=resume", "lr=1", "log_interval=5"])
    with pytest.raises(ValueError, match=r"keeps its settings, but learning_rate=0.01, now 1.0$"):
        resumed_settings(replace(config, init_from="resume"), MAY_CHANGE)


def test_damaged_trainer_state_is_refused(config: TrainConfig) -> None:
    train(replace(config, max_iters=1))
    state = Path(config.out_dir, "trainer_state.pt")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"trainer_state.pt is damaged"):
        Run(config, resume=True)


def test_state_of_another_run_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    other = replace(config, seed=7, max_iters=1, out_dir=str(tmp_path / "other"))
    for run in (replace(config, max_iters=1), other):
        train(run)
    shutil.copy(tmp_path / "other" / "trainer_state.pt", config.out_dir)
    with pytest.raises(ValueError, match=r"trainer_state.pt is another run's: seed=7, now 1337"):
        Run(config, resume=True)


class Payload:
    """What unpickling would turn into a new folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_code_in_a_state_is_refused_and_not_run(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, max_iters=1))
    state, proof = Path(config.out_dir, "trainer_state.pt"), tmp_path / "executed"
    good = torch.load(state, weights_only=True)
    for evil in (Payload(proof), good | {"rng": Payload(proof)}):
        torch.save(evil, state)
        with pytest.raises(ValueError, match=r"trainer_state.pt is damaged or not a trainer's"):
            Run(config, resume=True)
    state.write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(ValueError, match=r"trainer_state.pt is damaged or not a trainer's"):
        Run(config, resume=True)
    assert not proof.exists()


def test_state_that_lacks_a_part_is_refused_by_name(config: TrainConfig) -> None:
    train(replace(config, max_iters=1))
    state = Path(config.out_dir, "trainer_state.pt")
    torch.save({"iteration": 1, "weights": {}}, state)
    with pytest.raises(ValueError, match=r"it lacks checkpoints, evaluated, optimizer, scaler"):
        Run(config, resume=True)


@pytest.mark.parametrize("part", ["optimizer", "rng", "checkpoints", "weights", "scaler"])
def test_state_of_the_wrong_kind_is_refused(config: TrainConfig, part: str) -> None:
    train(replace(config, max_iters=1))
    state = Path(config.out_dir, "trainer_state.pt")
    good = torch.load(state, weights_only=True)
    torch.save(good | {part: {} if part in ("optimizer", "weights") else "x"}, state)
    if part == "scaler":  # not used on a CPU
        Run(config, resume=True).close()
        return
    with pytest.raises(ValueError, match=r"trainer_state.pt (is damaged|does not fit)"):
        Run(config, resume=True)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=64), st.integers(0, 4000)))
def test_any_bytes_are_a_state_or_refused(content: bytes | int) -> None:
    """Random ones, and a real state that was cut, in both of torch's formats."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trainer_state.pt")
        if isinstance(content, int):
            torch.save({"a": torch.ones(9)}, path, _use_new_zipfile_serialization=content % 2 == 0)
            content = path.read_bytes()[:content]
        path.write_bytes(content)
        with contextlib.suppress(ValueError):
            assert isinstance(read_state(path), dict)


def test_plot_that_fails_hides_no_other_error(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("runtime.metrics.plot_losses", full)
    with pytest.raises(FloatingPointError, match="step 1: the loss of batch 1 of 2 is nan"):
        train(replace(config, learning_rate=1e30, grad_clip=0.0))
    train(replace(config, max_iters=1))  # and the folder is not in use any more


def test_two_runs_do_not_write_to_one_folder(config: TrainConfig) -> None:
    first = Run(config)
    with pytest.raises(ValueError, match="is in use by another run"):
        train(replace(config, overwrite=True))
    first.close()
    train(replace(config, max_iters=1))


def test_run_killed_before_its_first_state_was_whole_starts_again(config: TrainConfig) -> None:
    train(replace(config, max_iters=1))
    expected = metrics(config)
    Path(config.out_dir, "trainer_state.pt").unlink()  # the last of the files to be written
    Path(config.out_dir, "last", "results.json").unlink()
    train(replace(config, max_iters=1))
    assert metrics(config) == expected


def test_folder_of_another_run_is_refused_unless_overwritten(config: TrainConfig) -> None:
    train(replace(config, max_iters=1))
    other = replace(config, max_iters=1, lora_rank=2)
    with pytest.raises(ValueError, match=r"lora_rank=4, now 2.*overwrite=True"):
        train(other)
    train(replace(other, overwrite=True))
    assert run_folder.read_run(config.out_dir).settings["lora_rank"] == 2


def test_unfinished_run_is_not_started_over_by_accident(config: TrainConfig) -> None:
    train(config)
    path = Path(config.out_dir, "metrics.jsonl")  # as if it had stopped before its end
    lines = [line for line in path.read_text().splitlines() if "test_accuracy" not in line]
    path.write_text("\n".join(lines) + "\n")
    Path(config.out_dir, "finished.json").unlink()
    with pytest.raises(ValueError, match="an unfinished run; resume it with init_from=resume"):
        train(config)


def test_run_that_saved_nothing_blocks_nobody(config: TrainConfig) -> None:
    with pytest.raises(FloatingPointError, match="step 1: the loss of batch 1 of 2 is nan"):
        train(replace(config, learning_rate=1e30, grad_clip=0.0))
    train(replace(config, max_iters=1))
    assert run_folder.read_run(config.out_dir).settings["learning_rate"] == config.learning_rate


def test_model_that_diverged_in_its_last_step_is_not_a_result(config: TrainConfig) -> None:
    with pytest.raises(FloatingPointError, match="step 1: the validation loss is nan"):
        train(replace(config, learning_rate=1e30, grad_clip=0.0, max_iters=1))
    assert not Path(config.out_dir, "last").exists()


def test_new_weights_do_not_keep_the_old_scores(config: TrainConfig) -> None:
    train(replace(config, max_iters=1))
    run = Run(replace(config, max_iters=2), resume=True)
    run.save_checkpoint("last", 1.0)
    names = {path.name for path in Path(config.out_dir, "last").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


def test_run_of_another_precision_and_device_can_be_resumed(config: TrainConfig) -> None:
    train(replace(config, max_iters=1))
    run = Run(replace(config, dtype="float16"), resume=True)
    assert run.scaler.is_enabled()
    assert run.iteration == 1


def test_run_of_another_version_is_refused_by_name(config: TrainConfig) -> None:
    train(replace(config, max_iters=1))
    path = Path(config.out_dir, "config.json")
    described = json.loads(path.read_text())
    described["settings"]["forgotten"] = 1
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="saved by another version: unknown forgotten"):
        resumed_settings(replace(config, init_from="resume"), MAY_CHANGE)


def test_same_settings_run_again_with_the_same_result(config: TrainConfig) -> None:
    train(config)
    first = metrics(config)
    train(config)
    assert metrics(config) == first


def test_eval_only_validates_and_saves_no_weights(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(replace(config, eval_only=True)) == {}
    assert "step 0: validation loss" in capsys.readouterr().out
    assert [line["iteration"] for line in metrics(config)] == [0]
    assert not list(Path(config.out_dir).rglob("*.safetensors"))


def test_eval_only_leaves_a_finished_run_finished(config: TrainConfig) -> None:
    train(replace(config, max_iters=1))
    before = metrics(config)
    assert train(replace(config, max_iters=1, eval_only=True), resume=True) == {}
    assert metrics(config) == before
    assert run_folder.is_finished(Path(config.out_dir))


def test_other_checkpoints_are_kept_only_when_asked(config: TrainConfig) -> None:
    config = replace(config, learning_rate=0.0, lora_dropout=0.0, always_save_checkpoint=False)
    run = Run(config)
    run.iteration = 3
    run.evaluate()
    assert run.checkpoints["last"]["iteration"] == 3  # the first is always an improvement
    run.iteration = 6
    run.evaluate()
    assert run.checkpoints["last"]["iteration"] == 3
    run.config = replace(config, always_save_checkpoint=True)
    run.evaluate()
    assert run.checkpoints["last"]["iteration"] == 6
    assert run.checkpoints["best"]["iteration"] == 3


def test_validation_takes_eval_iters_batches_and_leaves_the_dice_alone(
    config: TrainConfig,
) -> None:
    run = Run(replace(config, eval_iters=2, eval_batch_size=3))
    assert len(run.validation) == 6
    before = torch.get_rng_state()
    run.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_prompt_of_training_is_the_prompt_of_scoring(config: TrainConfig) -> None:
    train(replace(config, prompt="terse", max_iters=1))
    settings = run_folder.read_run(config.out_dir).settings
    assert SentimentTask(settings["prompt"]).template == SentimentTask("terse").template


def test_compiling_on_a_cpu_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="compile=True makes training on a CPU slower"):
        train(replace(config, compile=True))

