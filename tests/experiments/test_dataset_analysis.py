"""The analysis counts the examples, labels and cuts of a loader."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_models import loader_of
from matplotlib.image import imread

from experiments import dataset_analysis
from experiments.dataset_analysis import AnalysisConfig


def test_analysis_shows_rows_lengths_cuts_and_imports(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = dataset_analysis.length_histograms
    monkeypatch.setattr(dataset_analysis, "length_histograms",
                        lambda *lengths: drawn.append(draw(*lengths)) or drawn[-1])
    settings = AnalysisConfig("python_codes", "python_codes_mini", block_size=256,
                              out_dir=str(tmp_path))
    dataset_analysis.main(settings)
    shown = capsys.readouterr().out
    assert "python_codes_mini: rows 252, without instruction or answer 0, duplicates 0" in shown
    loader = loader_of("python_codes_mini", 256)
    assert loader.answers_cut > 0
    row = next(line for line in shown.splitlines() if line.split()[:1] == ["train"])
    assert row.split()[1] == "202"
    assert row.split()[-1] == str(loader.answers_cut)
    assert "train: fenced 100.0%; parse 100.0%; imports " in shown
    (figure,) = drawn
    for axes in figure.axes:
        assert sum(bar.get_height() for bar in axes.patches) == 252
    assert list(figure.axes[1].lines[0].get_xdata()) == [256, 256]
    assert imread(tmp_path / "lengths.png").shape == (540, 1500, 4)


def test_analysis_of_reviews_counts_labels(
    reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dataset_analysis.main(AnalysisConfig(dataset=reviews, out_dir=str(tmp_path)))
    assert "train: negative 24; positive 24" in capsys.readouterr().out


def test_analysis_replaces_its_own_picture_alone(reviews: str, tmp_path: Path) -> None:
    config = AnalysisConfig(dataset=reviews, out_dir=str(tmp_path))
    (tmp_path / "lengths.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"lengths\.png is no picture of this command"):
        dataset_analysis.main(config)
    assert (tmp_path / "lengths.png").read_bytes() == b"mine"
    (tmp_path / "lengths.png").unlink()
    for _ in range(2):
        dataset_analysis.main(config)
    with pytest.raises(OSError, match="is not a writable folder"):
        dataset_analysis.main(replace(config, out_dir=str(tmp_path / "lengths.png")))
