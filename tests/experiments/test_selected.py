"""Sections on selected runs show what their folders and their models hold."""

from pathlib import Path

import pytest
from made_models import read_lines
from made_runs import cells

from experiments.answerers import load_finished
from experiments.finished_runs import load_run
from experiments.page import section_html
from experiments.results import Section
from experiments.selected import (
    STRENGTHS,
    accuracy_section,
    chances_section,
    comparison,
    spectrum_section,
)


def test_runs_are_compared_step_by_step_and_by_their_scores(trained: Path) -> None:
    folders = [trained / "lora", trained / "bitfit"]
    section = comparison({folder: load_run(folder) for folder in folders})
    rows = cells(section.lines)
    assert rows[0] == ["", "step 2", "step 4"]
    for place, folder in enumerate(folders):
        lines = [line for line in read_lines(folder / "metrics.jsonl")
                 if "validation_loss" in line and line["iteration"]]
        assert rows[1 + 2 * place][1:] == [f"{line['validation_loss']:.4f}" for line in lines]
        assert rows[2 + 2 * place][1:] == [f"{line['validation_accuracy']:.4f}" for line in lines]
        accuracy = load_run(folder).results["best"]["accuracy"]
        assert rows[6 + place][3] == f"{accuracy:.3f}"
    loss, other = section.figure.axes
    assert [line.get_label() for line in loss.get_lines()] == list(map(str, folders))
    assert other.get_ylabel() == "validation accuracy"


def test_chances_and_accuracies_stand_in_table_and_picture(trained: Path) -> None:
    run = load_finished(str(trained / "lora"))
    section = chances_section(run, "a witty film", 0.5)
    factors, chances = cells(section.lines)
    assert (factors[0], chances[0], section.title) == ("s", "P(positive)", "P(positive) over s")
    assert chances[1:] == [f"{run.chance_at(factor, 'a witty film'):.4f}" for factor in STRENGTHS]
    curve, here = section.figure.axes[0].get_lines()
    assert list(here.get_xdata()) == [0.5, 0.5]
    assert [f"{value:.4f}" for value in curve.get_ydata()] == chances[1:]

    tracked = []
    section = accuracy_section(run, lambda steps: tracked.extend(steps) or steps)
    factors, accuracies = cells(section.lines)
    assert factors[1:] == [f"{factor:g}" for factor in tracked]
    assert float(accuracies[5]) == pytest.approx(run.accuracy_at(1.0, 200), abs=1e-4)
    assert section.title == "Accuracy over s, 12 validation reviews"


def test_every_layer_has_its_singular_values_but_only_the_first_sixteen(trained: Path) -> None:
    values = load_finished(str(trained / "lora")).singular_values()
    rows = cells(spectrum_section(values).lines)
    assert rows[0] == ["", "σ1", "σ2"]
    assert rows[2] == ["q, layer 1", *(f"{value:.3f}" for value in values["q"][1])]
    section = spectrum_section({"q": [[1.0] * 20]})
    assert section.basis == "The table has the first 16 of 20."
    assert len(cells(section.lines)[1]) == 17


def test_a_section_in_html_has_its_picture_before_its_numbers(trained: Path) -> None:
    section = spectrum_section(load_finished(str(trained / "lora")).singular_values())
    page = section_html(section)
    assert page.index("<h3>The singular values") < page.index('src="data:image/png;base64,iVBOR')
    assert page.index("<img") < page.index("<td>q, layer 0</td>")
    assert section_html(Section("a <b>", "", ["x"])).count("<img") == 0
