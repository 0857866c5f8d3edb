"""Pretraining lowers the loss, resumes exactly, and saves a checkpoint that transformers loads."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from checkpoints.files import read_json, read_tensors
from checkpoints.trainer_state import read_state, write_state
from configurator import configure
from model import GPT
from pretraining.__main__ import PretrainConfig, Run, main
from pretraining.sampled_softmax import evaluate
from runtime.metrics import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(imdb: str, tmp_path: Path) -> PretrainConfig:
    """Sixty steps of a model 16 wide: sampled softmax, then the full one; dropout."""
    return PretrainConfig(
        data=imdb, out_dir=str(tmp_path / "run"), device="cpu", dtype="float32", n_layer=1,
        n_head=2, n_embd=16, block_size=32, dropout=0.1, batch_size=8, negatives=50,
        full_softmax_iters=5, verdict_weight=4.0, max_iters=60, learning_rate=1e-2,
        eval_interval=20, eval_iters=2, log_interval=1,
    )


def metrics(config: PretrainConfig) -> list[dict]:
    """Return the metrics of a run without the times."""
    lines = read_metrics(Path(config.out_dir))
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def stop_at(iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT (Ctrl-C) during the given step."""
    step = Run.step

    def stopped(run: Run) -> float:
        if run.iteration == iteration:
            signal.raise_signal(signal.SIGINT)
        return step(run)

    monkeypatch.setattr(Run, "step", stopped)


def test_loss_falls_and_verdicts_are_learned(config: PretrainConfig) -> None:
    scores = main(replace(config, max_iters=150, dropout=0.0))
    first = next(line for line in metrics(config) if "validation_loss" in line)
    assert first["validation_loss"] < math.log(50257)
    assert scores["validation_loss"] < first["validation_loss"] - 1
    assert scores["perplexity"] == pytest.approx(math.exp(scores["validation_loss"]))
    assert scores["verdict_accuracy"] > 0.2
    saved = read_json(Path(config.out_dir, "results.json"))
    assert saved["perplexity"] == scores["perplexity"]
    assert saved["tokens_seen"] == 150 * 8 * 32
    assert imread(Path(config.out_dir, "loss.png")).shape == (600, 1050, 4)


def test_sampled_training_loss_estimates_the_full_one(config: PretrainConfig) -> None:
    run = Run(replace(config, negatives=30_000, dropout=0.0, full_softmax_iters=0,
                      learning_rate=0.0))
    sampled = sum(run.step() for _ in range(40)) / 40
    exact = evaluate(run.model, run.rows, run.vocabulary, run.dtype, size=8, batches=40)
    assert sampled == pytest.approx(exact["validation_loss"], abs=0.05)


def test_stopped_run_resumes_exactly(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(config, out_dir=str(tmp_path / "whole"))
    main(whole)
    with monkeypatch.context() as patched:
        stop_at(29, patched)
        with pytest.raises(KeyboardInterrupt):
            main(config)
    assert read_state(Path(config.out_dir, "trainer_state.pt"))["iteration"] == 30
    main(replace(config, init_from="resume"))
    assert metrics(config) == metrics(whole)
    ours, theirs = (read_tensors(Path(folder, "model", "model.safetensors"))
                    for folder in (config.out_dir, whole.out_dir))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_resume_drops_metrics_after_the_saved_state(config: PretrainConfig) -> None:
    run = Run(replace(config, max_iters=50))
    for _ in range(2):
        run.step()
    run.save_state()
    for iteration in (1, 2, 3):
        run.metrics.log(iteration, train_loss=1.0)
    with pytest.raises(ValueError, match="is in use by another run"):
        Run(replace(config, max_iters=50, init_from="resume"))
    # The refused run removed nothing.
    assert [line["iteration"] for line in metrics(config)] == [1, 2, 3]
    run.lock.release()
    Run(replace(config, max_iters=50, init_from="resume")).lock.release()
    assert [line["iteration"] for line in metrics(config)] == [1, 2]


def test_result_loads_in_transformers_with_equal_logits(config: PretrainConfig) -> None:
    from transformers import GPT2LMHeadModel

    main(replace(config, max_iters=3, full_softmax_iters=3))
    folder = Path(config.out_dir, "model")
    assert {t.dtype for t in read_tensors(folder / "model.safetensors").values()} == {torch.float16}
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    ours = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=0, atol=1e-5)


def test_verdict_weight_scales_the_gradient_of_the_answers(config: PretrainConfig) -> None:
    """With a weight of zero no position has the answer as its target."""
    gradients = {}
    for weight in (0.0, 1.0):
        run = Run(replace(config, verdict_weight=weight, negatives=0, dropout=0.0, grad_clip=0.0,
                          overwrite=True))
        run.optimizer.step = lambda: None
        run.optimizer.zero_grad = lambda **_: None
        run.step()
        gradients[weight] = run.model.transformer.wte.weight.grad
        run.lock.release()
    answer = run.rows.tokens[run.rows.verdicts][0]
    # Softmax lowers each logit at all positions and raises it only if the word is the target.
    assert gradients[1.0][answer].norm() > 2 * gradients[0.0][answer].norm()


def test_run_is_replaced_only_with_overwrite(config: PretrainConfig) -> None:
    short = replace(config, max_iters=1)
    main(short)
    with pytest.raises(ValueError, match="holds a run; resume it with init_from=resume"):
        main(short)
    main(replace(short, max_iters=2, overwrite=True))
    assert read_json(Path(config.out_dir, "results.json"))["tokens_seen"] == 2 * 8 * 32
    assert [line["iteration"] for line in metrics(config)] == [1, 2, 2]


def test_resume_refuses_other_settings_and_an_empty_folder(config: PretrainConfig) -> None:
    resumed = replace(config, max_iters=1, init_from="resume")
    with pytest.raises(FileNotFoundError, match="holds no run: there is no"):
        main(resumed)
    main(replace(config, max_iters=1))
    with pytest.raises(ValueError, match="keeps its settings, but n_layer=1, now 2"):
        main(replace(resumed, n_layer=2))


def test_state_of_another_script_is_refused(config: PretrainConfig) -> None:
    write_state(Path(config.out_dir, "trainer_state.pt"), {"iteration": 3, "weights": {}})
    with pytest.raises(ValueError, match=r"another program's: it lacks optimizer, scaler, seconds"):
        main(replace(config, init_from="resume"))


def test_width_must_fit_the_heads(config: PretrainConfig) -> None:
    with pytest.raises(ValueError, match="n_embd=15 is not a multiple of n_head=2"):
        main(replace(config, n_embd=15))
    assert not Path(config.out_dir).exists()


def test_diverging_loss_stops_the_run(config: PretrainConfig) -> None:
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is"):
        main(replace(config, learning_rate=1e30, grad_clip=0.0))


def test_shipped_model_has_the_shape_of_its_recipe() -> None:
    recipe = configure(PretrainConfig, [str(ROOT / "config" / "pretrain_mini.py")])
    config = GPT.from_pretrained("gpt2-mini").config
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        assert getattr(config, name) == getattr(recipe, name)
    assert (ROOT / "assets" / "gpt2-mini" / "model.safetensors").stat().st_size <= 35e6


def test_data_that_changed_is_refused_and_the_run_kept(
    config: PretrainConfig, imdb: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(imdb, data)
    config = replace(config, data=str(data), max_iters=2)
    main(config)
    before = metrics(config)
    with open(data / "unsupervised.jsonl", "a") as file:
        file.write("\n" + json.dumps({"text": "one more", "label": -1}))
    Path(config.out_dir, "trainer_state.pt").rename(tmp_path / "state")
    with pytest.raises(ValueError, match="holds a run; resume it"):  # its model is the result
        main(config)
    (tmp_path / "state").rename(Path(config.out_dir, "trainer_state.pt"))
    with pytest.raises(ValueError, match=r"data='.*' changed since the run began"):
        main(replace(config, init_from="resume"))
    assert metrics(config) == before
