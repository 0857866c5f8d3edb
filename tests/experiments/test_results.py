"""A row holds what its runs left in their folders."""

from pathlib import Path

from made_runs import make_run

from experiments.results import load_run, mean_and_deviation, plain


def test_mean_of_one_seed_has_no_deviation() -> None:
    assert mean_and_deviation([0.81234]) == "0.812"
    assert mean_and_deviation([1.0, 3.0], digits=1) == "2.0 ± 1.4"


def test_best_loss_is_the_lowest_after_the_start(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", "10", loss=9.5).folder)
    assert run.validation_loss == 9.5  # step 0, at 9.0, is no candidate


def test_any_text_fits_into_a_cell() -> None:
    assert plain("a|b\n <i> *c* [d](e)") == "a\\|b &lt;i&gt; \\*c\\* \\[d](e)"
