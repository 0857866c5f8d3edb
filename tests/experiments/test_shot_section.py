"""The section on examples in the prompt shows each draw's scores, and LoRA's on the same ones."""

import json
from pathlib import Path

import pytest
from made_runs import cells, make_run, missing, row

from checkpoints.files import write_json
from experiments.jobs import Job
from experiments.results import Row
from experiments.shot_section import shots
from train import TrainConfig


def scored(folder: Path, accuracy: float, text: str = "a | <b> film", **fields: object) -> Job:
    write_json(folder / "zero_shot-x" / "results.json", {
        "accuracy": accuracy, "constrained_accuracy": accuracy + 0.1,
        "calibrated_accuracy": accuracy + 0.2, "garbage": 1, "n": 2})
    rows = [{"text": text, "generated": " positive", "truth": 1, "label": 1, **fields}] * 2
    (folder / "zero_shot-x" / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Job(folder.name, "generate.py", {}, folder, "zero_shot-*/results*.json")


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    return [
        Row("0 shots", {"shots": 0}, [scored(tmp_path / "none", 0.25)], {}),
        Row("2 shots", {"shots": 2}, [scored(tmp_path / f"two{accuracy}", accuracy)
                                      for accuracy in (0.25, 0.5, 0.75)], {}),
        row("LoRA on 2", make_run(tmp_path / "lora2", "1100"),
            make_run(tmp_path / "lora2b", "1110"), train_size=2),
        row("LoRA on 4", make_run(tmp_path / "lora4", "1110"), train_size=4),
        row("LoRA on all", make_run(tmp_path / "all", "1111")),
        Row("step by step", {"prompt": "step_by_step"},
            [scored(tmp_path / "step", 0.5, reasoning="<i>so | it</i>")], {}),
    ]


def test_each_number_of_examples_has_a_line_and_each_way_a_curve(rows: list[Row]) -> None:
    section = shots(rows, TrainConfig(train_size=0))
    table = cells(section.lines)
    assert table[0] == ["examples", "draws", "generated", "constrained", "calibrated",
                        "LoRA on the same examples"]
    assert table[1] == ["0", "1", "0.250", "0.350", "0.450", ""]
    assert table[2] == ["2", "3", "0.500 ± 0.250 (0.250–0.750)", "0.600 ± 0.250 (0.350–0.850)",
                        "0.700 ± 0.250 (0.450–0.950)", "0.625 ± 0.177 (0.500–0.750)"]
    assert table[3] == ["4", "", "do not fit", "", "", "0.750"]
    assert table[4] == ["all", "", "", "", "", "1.000"]
    assert table[6] == ["step by step", "2", "0.500", "50.0%", "0.600"]
    (axes,) = section.figure.axes
    assert {line.get_label(): list(line.get_xdata()) for line in axes.lines[:4]} == {
        "generated": [0, 2], "constrained": [0, 2], "calibrated": [0, 2],
        "LoRA on the same examples": [2, 4]}
    assert list(axes.lines[4].get_ydata()) == [1, 1]


def test_thoughts_are_shown_as_text(rows: list[Row]) -> None:
    text = "\n".join(shots(rows, TrainConfig()).lines)
    assert "&lt;i&gt;so \\| it&lt;/i&gt;" in text
    assert "<i>" not in text


def test_missing_runs_are_open(rows: list[Row], tmp_path: Path) -> None:
    later = Job("later", "generate.py", {}, tmp_path / "later", "zero_shot-*/results*.json")
    rows[1] = rows[1]._replace(jobs=[later])
    rows[4] = row("LoRA on all", missing(tmp_path / "not yet"))
    rows[5] = rows[5]._replace(jobs=[later])
    table = cells(shots(rows, TrainConfig()).lines)
    assert table[2][1:3] == ["", "to do"]
    assert table[4][-1] == "to do"
    assert table[6][2] == "to do"
    none = [each._replace(jobs=[later] if not each.trains else [missing(tmp_path / "no")])
            for each in rows]
    assert shots(none, TrainConfig()).figure is None
