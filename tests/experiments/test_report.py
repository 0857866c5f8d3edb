"""The report tells what the runs' folders hold, and what became of those that failed."""

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_runs import cells, make_run, missing, row

from checkpoints.files import write_json
from experiments.jobs import Job
from experiments.report import sections, write_report
from experiments.results import Row, load_run
from experiments.sections import accuracy_table, difference, interval, shares
from tasks.scores import wilson_interval
from train import TrainConfig

QUESTIONS = ("shares", "zero_shot", "curves", "alpha", "prompts", "grid", "rates", "layers")


@dataclass(frozen=True)
class ReportConfig(TrainConfig):
    report_dir: str = "report"


@pytest.fixture
def config(tmp_path: Path) -> ReportConfig:
    return ReportConfig(init_from="gpt2-mini", report_dir=str(tmp_path / "report"))


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, list[Row]]:
    """Two variants of two seeds, as every question's rows, and a zero-shot score."""
    lora = row("LoRA", *(make_run(tmp_path / f"lora{seed}", f"1110{seed}", seed=seed)
                         for seed in (0, 1)))
    full = row("full", *(make_run(tmp_path / f"full{seed}", "11100", loss=0.25, lora_rank=0)
                         for seed in (0, 1)), lora_rank=0)
    folder = tmp_path / "zero" / "zero_shot-gpt2-mini"
    write_json(folder / "results-x.json", {
        "accuracy": 0.25, "constrained_accuracy": 0.5, "garbage": 3, "n": 4})
    said = {"text": "a | `b` <b>", "generated": " ```\n| </pre><script>x</script>"}
    (folder / "predictions-x.jsonl").write_text(json.dumps(said))
    zero = Job("zero", "generate.py", {}, tmp_path / "zero", "zero_shot-*/results*.json")
    return {"shares": [], "zero_shot": [Row("default", {"prompt": "default"}, [zero], {})],
            **{name: [lora] if name == "grid" else [lora, full] for name in QUESTIONS[2:]}}


def test_accuracy_is_mean_deviation_and_interval_of_best_and_last(
    questions: dict[str, list[Row]]
) -> None:
    titles, lora, full = cells(accuracy_table(questions["curves"], questions["curves"][1]))
    assert titles[-1] == "best, minus full (± half its 95 % interval)"
    assert lora[:6] == ["LoRA", "2", "0.500 ± 0.000", "0.700 ± 0.141",
                        "{:.3f} to {:.3f}".format(*wilson_interval(3.5, 5)), "30.0%"]
    assert lora[6:9] == ["0.000 ± 0.000", interval(0.0, 5), "100.0%"]
    assert full[3] == "0.600 ± 0.000"
    assert full[-1] == ""


def test_difference_is_paired_by_review(tmp_path: Path) -> None:
    mine = [load_run(make_run(tmp_path / f"a{i}", right).folder)
            for i, right in enumerate(("1111", "1101"))]
    theirs = [load_run(make_run(tmp_path / "b", "1100").folder)]
    gaps = np.array([0, 0, 0.5, 1.0])
    half = 1.96 * gaps.std(ddof=1) / 2
    assert difference(mine, theirs) == f"+0.375 ± {half:.3f}"
    assert difference(theirs, theirs) == "+0.000 ± 0.000"


def test_failed_and_missing_runs_stand_in_their_rows(tmp_path: Path) -> None:
    rows = [row("half", make_run(tmp_path / "good", "11"), missing(tmp_path / "bad"),
                errors={"bad": "a | b <c>\nd"}),
            row("none", missing(tmp_path / "bad"), errors={"bad": "a | b <c>\nd"}),
            row("later", missing(tmp_path / "later"))]
    _, half, none, later = cells(accuracy_table(rows, rows[0]))
    assert half[1] == "1 of 2: failed: a \\| b &lt;c&gt; d"
    assert half[3] == "1.000"
    assert none[1:3] == ["0 of 1: failed: a \\| b &lt;c&gt; d", ""]
    assert later[1] == "0 of 1: to do"
    assert len(half) == len(none) == len(later)


def test_every_question_has_its_section_and_costs_are_added(
    questions: dict[str, list[Row]], config: ReportConfig
) -> None:
    found = sections(questions, config, QUESTIONS)
    assert tuple(found) == (*QUESTIONS, "cost")
    drawn = {name for name, section in found.items() if section.figure}
    assert drawn == {"curves", "alpha", "prompts", "grid", "rates", "layers"}
    priced = cells(found["cost"].lines)
    assert priced[1] == ["LoRA", "5", "0.50%", "160.0 ± 0.0", "64.0", "2,048", "2.5"]
    assert len(priced) == 3  # each run once, though two questions ask for it
    for name in QUESTIONS[2:]:
        assert found[name].basis.startswith("n = 5 test and 7 validation reviews; seeds ")
        assert any(line.startswith("python train.py ") for line in found[name].lines)


def test_questions_that_nobody_asked_are_told_when_their_runs_are_there(
    questions: dict[str, list[Row]], config: ReportConfig, tmp_path: Path
) -> None:
    questions |= {"alpha": [row("later", missing(tmp_path / "later"))],
                  "grid": [row("bad", missing(tmp_path / "bad"), errors={"bad": "x"})]}
    found = sections(questions, config, asked=["grid"])
    assert tuple(found) == (*(name for name in QUESTIONS if name != "alpha"), "cost")
    assert found["grid"].figure is None
    assert "failed: x" in "\n".join(found["grid"].lines)


def test_shares_are_counted_on_the_models(config: ReportConfig) -> None:
    lines = shares([], config).lines
    rows = {line[0]: line[1:] for line in cells(lines)}
    assert rows["gpt2-medium"] == ["354,823,168", "2,359,296 (0.66%)", "18,874,368 (5.05%)",
                                   "28,901,376 (7.53%)"]
    assert list(rows) == ["model", "gpt2-mini", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


def test_best_rate_is_named_and_so_is_the_edge(
    questions: dict[str, list[Row]], config: ReportConfig, tmp_path: Path
) -> None:
    tried = [row(f"rate {rate}", make_run(tmp_path / f"rate{rate}", "10101", loss=loss),
                 learning_rate=rate) for rate, loss in ((1e-3, 0.5), (2e-3, 0.3), (4e-3, 0.4))]
    questions["rates"] = [*tried, questions["rates"][1]]
    lines = sections(questions, config, QUESTIONS)["rates"].lines
    text = "\n".join(lines)
    assert "LoRA r=16, α=64: lowest validation loss at a rate of 0.002.\n" in text
    assert "full fine-tuning: lowest validation loss at a rate of 0.001, at the edge" in text
    assert cells(lines)[0][-1].startswith("best, minus full ")


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attributes if name in ("src", "href")]


def test_page_holds_its_pictures_and_runs_nothing(
    questions: dict[str, list[Row]], config: ReportConfig
) -> None:
    path = write_report(questions, config, "python -m experiments prompt='<b>\n```'", QUESTIONS)
    pictures = {picture.stem for picture in path.parent.glob("*.png")}
    assert pictures == {"curves", "alpha", "prompts", "grid", "rates", "layers"}
    assert all(f"]({name}.png)" in path.read_text() for name in pictures)
    page = Page((path.parent / "report.html").read_text())
    assert page.tags.count("img") == len(pictures)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert page.tags.count("table") == 9
    assert page.tags.count("details") == 7
    assert "script" not in page.tags
    assert "b" not in page.tags


def test_report_says_what_it_was_made_with(
    questions: dict[str, list[Row]], config: ReportConfig
) -> None:
    text = write_report(questions, config, "python -m experiments x=1", QUESTIONS).read_text()
    for fact in ("`gpt2-mini`", "processor a chip", "commit abc", "python -m experiments x=1"):
        assert fact in text


def test_template_of_many_lines_breaks_no_table(
    questions: dict[str, list[Row]], config: ReportConfig
) -> None:
    text = "Review: {text}\n```\n| *Label*: $_$"
    questions["prompts"] = [row._replace(label=text) for row in questions["prompts"]]
    path = write_report(questions, config, "python -m experiments", QUESTIONS)
    page = Page((path.parent / "report.html").read_text())
    assert page.tags.count("table") == 9
    assert page.tags.count("em") == 1  # our own, in the head


def test_accuracies_of_zero_and_one_are_drawn() -> None:
    for n in (4, 10, 500, 853, 1000):
        for accuracy in (0.0, 1.0):
            low, high = wilson_interval(accuracy * n, n)
            assert low <= accuracy <= high


def test_interrupted_run_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "trainer_state.pt").touch()
    said = missing(tmp_path / "said")
    said.folder.mkdir()
    said.log.write_text("error: out of luck\n")
    rows = [row("half", missing(tmp_path / "half")), row("said", said)]
    _, half, told = cells(accuracy_table(rows, rows[0]))
    assert (half[1], told[1]) == ("0 of 1: interrupted", "0 of 1: failed: out of luck")


