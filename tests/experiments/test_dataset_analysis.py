"""The analysis counts what the loader really does with a data set."""

from pathlib import Path

import pytest
from made_models import loader_of

from experiments import dataset_analysis
from experiments.dataset_analysis import AnalysisConfig


def test_analysis_tells_rows_lengths_cuts_and_imports(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = AnalysisConfig("python_codes", "python_codes_mini", block_size=256,
                              out_dir=str(tmp_path))
    dataset_analysis.main(settings)
    told = capsys.readouterr().out
    assert "python_codes_mini: rows 252, without instruction or answer 0, duplicates 0" in told
    loader = loader_of("python_codes_mini", 256)
    assert loader.answers_cut > 0
    row = next(line for line in told.splitlines() if line.split()[:1] == ["train"])
    assert row.split()[1] == "202"
    assert row.split()[-1] == str(loader.answers_cut)
    assert "train: fenced 100.0%; parse 100.0%; imports " in told
    assert (tmp_path / "lengths.png").stat().st_size > 10_000


def test_analysis_of_reviews_counts_labels(
    reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dataset_analysis.main(AnalysisConfig(dataset=reviews, out_dir=str(tmp_path)))
    assert "train: negative 24; positive 24" in capsys.readouterr().out
