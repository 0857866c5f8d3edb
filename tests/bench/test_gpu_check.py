"""The check of a GPU stops clearly without one; what it computes runs on a CPU, too."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench.gpu_check import (
    BOUNDS,
    CheckConfig,
    Outcome,
    check_memory,
    check_precisions,
    check_speed,
    compare_outcomes,
    main,
    run_checks,
)
from bench.worker import SHAPES
from configurator import run_script
from model import GPTConfig

CPU = torch.device("cpu")


@pytest.fixture
def small(checkpoint: str, reviews: str, monkeypatch: pytest.MonkeyPatch) -> CheckConfig:
    monkeypatch.setitem(SHAPES, "tiny", GPTConfig(n_layer=1, n_head=2, n_embd=16))
    return CheckConfig(
        model=checkpoint, speed_model="tiny", memory_models="tiny", batch_size=4, window=8,
        steps=2, new_tokens=3, dataset=reviews)


def test_machine_without_cuda_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check", "out=nowhere/check.json"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run_script(main, CheckConfig)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: bench.gpu_check needs a CUDA device, and torch finds none\n")


@pytest.mark.parametrize("changed", [{"memory_models": "gpt2,gpt3"}, {"speed_model": "gpt3"}])
def test_size_that_no_gpt2_has_is_refused(changed: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="unknown size gpt3; allowed are gpt2-mini, gpt2,"):
        main(CheckConfig(**changed))


def test_precisions_are_compared_with_float32(small: CheckConfig) -> None:
    rows = check_precisions(small, CPU)
    assert list(rows) == ["float16", "bfloat16"]
    for dtype, row in rows.items():
        assert row["losses"] != row["expected_losses"]
        assert len(row["losses"]) == 2
        assert 0 < row["loss_difference"] < BOUNDS[dtype].loss
        assert row["seconds_a_step"] > 0
    assert rows["float16"]["gradient_scale"] == 2.0**12


def test_memory_and_speed_are_measured(small: CheckConfig) -> None:
    report = run_checks(small, CPU, [check_memory, check_speed])
    assert list(report["checks"]) == [
        "memory tiny", "speed float32", "speed float16", "speed bfloat16"]
    memory = report["checks"]["memory tiny"]
    assert 1e8 < memory["peak_bytes"] == memory["reserved_bytes"] < memory["limit_bytes"] == 16e9
    assert all(value > 0 for value in report["checks"]["speed float16"].values())
    assert report["ok"]
    assert report["seconds"].keys() == {"check_memory", "check_speed"}


def test_row_is_in_bounds_or_not() -> None:
    compare: Callable = partial(compare_outcomes, bounds=BOUNDS["float16"])
    expected = Outcome([2.0, 1.0], [" good"] * 100, 1.0)
    assert compare(expected, expected)["ok"]
    assert compare(expected._replace(losses=[2.003, 1.0]), expected)["ok"]
    far = compare(expected._replace(losses=[2.0, 1.003]), expected)
    assert (far["loss_difference"], far["ok"]) == (pytest.approx(0.003), False)
    other = compare(expected._replace(answers=[" good"] * 96 + [" bad"] * 4), expected)
    assert (other["equal_answers"], other["ok"]) == (0.96, False)


def test_full_memory_is_a_row_and_the_other_checks_run(small: CheckConfig) -> None:
    def check_full(config: CheckConfig, device: torch.device) -> dict:
        raise torch.OutOfMemoryError("tried to allocate")

    report = run_checks(small, CPU, [check_full, lambda *_: {"next": {"ok": True}}])
    assert report["checks"]["check_full"] == {"error": "tried to allocate", "ok": False}
    assert report["checks"]["next"]["ok"]
    assert not report["ok"]
