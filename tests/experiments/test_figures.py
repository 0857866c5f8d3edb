"""Figures show their data with units, and distinguish lines without colours."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from experiments.figures import (
    STYLES,
    accuracy_dots,
    heat_map,
    length_histograms,
    rate_lines,
    validation_curves,
)
from tasks.scores import wilson_interval

RUNS = [[{"iteration": 0, "validation_loss": 9.0, "validation_accuracy": 0.0},
         {"iteration": 1, "train_loss": 5.0},
         {"iteration": 2, "validation_loss": 1.0 + seed, "validation_accuracy": 0.5},
         {"iteration": 4, "validation_loss": 0.5 + seed, "validation_accuracy": 0.75}]
        for seed in (0, 1, 2)]


def test_styles_differ_in_colour_and_in_marker() -> None:
    colours, markers, _ = zip(*STYLES, strict=True)
    assert len(set(map(to_rgba, colours))) == len(set(markers)) == len(STYLES)


def test_curve_is_the_mean_and_its_band_the_range_of_the_seeds() -> None:
    figure = validation_curves([("three seeds", RUNS)])
    loss, accuracy = figure.axes
    (line,) = loss.lines
    assert line.get_xydata().tolist() == [[2, 2.0], [4, 1.5]]
    low, high = loss.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (0.5, 3.0)
    assert accuracy.lines[0].get_xdata().tolist() == [0, 2, 4]
    assert "nats a token" in loss.get_ylabel()
    assert accuracy.get_ylabel() == "validation accuracy (generated answers)"
    assert {axes.get_xlabel() for axes in figure.axes} == {"optimizer steps"}
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["three seeds"]


def test_dots_have_wilsons_interval_and_every_seed() -> None:
    figure = accuracy_dots([("one", [0.7, 0.9], 100), ("two", [0.5], 100)])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    bars = [container.lines[2][0].get_segments()[0][:, 0] for container in axes.containers]
    np.testing.assert_allclose(bars, [wilson_interval(80, 100), wilson_interval(50, 100)])
    shown = [line.get_xdata() for line in axes.lines if line.get_marker() == "|"
             and line.get_markersize() == 12]
    assert [list(xs) for xs in shown] == [[0.7, 0.9], [0.5]]
    assert axes.get_xlabel() == "test accuracy, best checkpoint"


@pytest.mark.parametrize("n", [4, 853])
def test_dots_at_zero_and_one_have_an_interval_on_one_side(n: int) -> None:
    (axes,) = accuracy_dots([("never", [0.0], n), ("always", [1.0], n)]).axes
    never, always = (container.lines[2][0].get_segments()[0][:, 0] for container in axes.containers)
    assert never.tolist() == pytest.approx(wilson_interval(0, n))
    assert always.tolist() == pytest.approx(wilson_interval(n, n))
    assert (never[0], always[1]) == (0, 1)


def test_more_series_than_styles_are_all_drawn() -> None:
    loss, _ = validation_curves([(str(i), RUNS[:1]) for i in range(len(STYLES) + 1)]).axes
    assert [line.get_label() for line in loss.lines] == ["0", "1", "2", "3", "4", "5", "6"]


def test_heat_map_writes_each_loss_and_leaves_a_gap_for_a_failed_run() -> None:
    figure = heat_map([16, 64], [1e-3, 4e-3], np.array([[0.25, np.nan], [0.5, 1.0]]))
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.250", "–", "0.500", "1.000"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.004"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["16", "64"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning rate", "α (r = 16)")
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan),
                                  [[0.25, np.nan], [0.5, 1.0]])


def test_rates_are_sorted_on_a_logarithmic_axis() -> None:
    figure = rate_lines({"LoRA": {4e-3: [0.5, 0.7], 1e-3: [0.4, 0.4]}, "full": {}})
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1e-3, 0.4], [4e-3, 0.6]])
    figure.canvas.draw()
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["0.001", "0.004"]


def test_histograms_count_lengths_and_mark_the_limit_near_the_data() -> None:
    questions, answers = length_histograms([5, 5, 7], [90, 300, 300, 300], 256).axes
    assert sum(bar.get_height() for bar in questions.patches) == 3
    assert max(bar.get_height() for bar in answers.patches) == 3
    assert not questions.lines
    assert list(answers.lines[0].get_xdata()) == [256, 256]
    assert [answers.get_xlabel(), answers.get_ylabel()] == ["tokens of an answer", "examples"]
    assert questions.get_xlabel() == "tokens of a question"
