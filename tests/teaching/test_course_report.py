"""The skeleton of a report, filled from real runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints.files import read_json
from teaching.course_report import PROSE, SECTIONS, write_course_report
from train import TrainConfig, train


def test_report_holds_the_runs_tables_curves_and_commands_and_no_prose(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, out_dir=str(tmp_path / "out" / "mine"), max_iters=2, baseline=True)
    train(config)
    path = write_course_report(tmp_path / "out", tmp_path / "report")
    text = path.read_text("utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        section.title for section in SECTIONS.values()]
    assert sum(section.weight for section in SECTIONS.values()) == 100
    assert text.count(PROSE) == len(SECTIONS)
    for name in ("base", "best"):
        accuracy = read_json(tmp_path / "out" / "mine" / name / "results.json")["accuracy"]
        assert f"| mine | {name} | {accuracy:.4f} |" in text
    assert "lora_rank=4" in text
    assert (tmp_path / "report" / "loss-1.png").read_bytes() == (
        tmp_path / "out" / "mine" / "loss.png").read_bytes()
    with pytest.raises(ValueError, match="is there already and may hold your text"):
        write_course_report(tmp_path / "out", tmp_path / "report")
    assert path.read_text("utf-8") == text


def test_no_finished_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        write_course_report(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()
