"""A run's metrics survive a crash, end where its state does, and are drawn."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from runtime import metrics


def test_metrics_that_are_no_json_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n{x}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        metrics.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n{"train_loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: a line must name its iteration"):
        metrics.read_metrics(tmp_path)


def test_metrics_cut_short_by_a_crash_are_left_out(tmp_path: Path) -> None:
    lines = '{"iteration": 0, "train_loss": 1.0}\n{"iteration": 1, "tra'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert metrics.read_metrics(tmp_path) == [{"iteration": 0, "train_loss": 1.0}]
    metrics.forget_later_metrics(tmp_path, 9, evaluated=False)
    assert (tmp_path / "metrics.jsonl").read_text() == lines.splitlines()[0] + "\n"


def test_log_does_not_continue_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"iteration": 0}\n{"iteration": 1, "na\xc3')
    metrics.MetricsLog(tmp_path).log(2, loss=1.0)
    assert metrics.read_metrics(tmp_path) == [{"iteration": 0}, {"iteration": 2, "loss": 1.0}]


def test_metrics_after_a_saved_state_are_forgotten(tmp_path: Path) -> None:
    lines = [
        {"iteration": 0, "validation_loss": 2.0}, {"iteration": 0, "train_loss": 2.0},
        {"iteration": 1, "validation_loss": 1.0}, {"iteration": 1, "train_loss": 1.0},
        {"iteration": 1, "test_accuracy_last": 0.5}, {"iteration": 2, "train_loss": 0.5},
        {"iteration": 0, "final_validation_loss": 1.0},
    ]
    for evaluated, kept in ((True, 3), (False, 2)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text)
        metrics.forget_later_metrics(tmp_path, 1, evaluated)
        assert metrics.read_metrics(tmp_path) == lines[:kept]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that `metrics` draws."""
    drawn: list[Figure] = []

    def keep(**settings: object) -> Figure:
        drawn.append(Figure(**settings))
        return drawn[-1]

    monkeypatch.setattr("matplotlib.figure.Figure", keep)
    return drawn


@pytest.mark.parametrize("lines", [
    [],
    [{"iteration": 0, "validation_loss": 3.0}, {"iteration": 0, "train_loss": 2.5},
     {"iteration": 5, "train_loss": 1.5}, {"iteration": 6, "validation_loss": 1.0}],
])
def test_loss_plot_shows_the_logged_losses(
    tmp_path: Path, figures: list[Figure], lines: list[dict[str, float]]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics.plot_losses(tmp_path)
    (axes,) = figures[0].axes
    found = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert found == {key.replace("_", " "): [(line["iteration"], line[key]) for line in lines
                                             if key in line]
                     for key in ("train_loss", "validation_loss")}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == (
        "optimizer steps", "loss (nats a token)", "log")
    assert imread(tmp_path / "loss.png").shape == (600, 1050, 4)


def test_folder_with_an_emoji_and_a_dollar_in_its_name_is_plotted(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = tmp_path / r"run $\frac 🦥"
    folder.mkdir()
    metrics.plot_losses(folder)
    assert (folder / "loss.png").stat().st_size > 1000
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
