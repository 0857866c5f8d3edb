"""The report shows the scores in the runs' folders, and the errors of the runs that failed."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_runs import cells, make_run, missing, row

from checkpoints.files import write_json
from experiments.finished_runs import load_run
from experiments.jobs import Job
from experiments.plan import ExperimentsConfig
from experiments.report import sections, write_report
from experiments.results import Row
from experiments.sections import accuracy_table, difference, interval, shares
from runtime.run_folder import FINISHED_FILE
from tasks.scores import wilson_interval

QUESTIONS = ("shares", "zero_shot", "curves", "alpha", "prompts", "grid", "rates", "methods",
             "layers")
DRAWN = {"curves", "alpha", "prompts", "grid", "rates", "methods", "layers"}


@pytest.fixture
def config(tmp_path: Path) -> ExperimentsConfig:
    return ExperimentsConfig(init_from="gpt2-mini", report_dir=str(tmp_path / "report"))


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, list[Row]]:
    """Two variants of two seeds as the rows of each question, and a zero-shot score."""
    lora = row("LoRA", *(make_run(tmp_path / f"lora{seed}", f"1110{seed}", seed=seed)
                         for seed in (0, 1)))
    full = row("full", *(make_run(tmp_path / f"full{seed}", "11100", loss=0.25, lora_rank=0)
                         for seed in (0, 1)), lora_rank=0)
    folder = tmp_path / "zero" / "zero_shot-gpt2-mini"
    write_json(folder / "results-x.json", {
        "accuracy": 0.0, "constrained_accuracy": 0.5, "garbage": 1, "n": 1})
    prediction = {"text": "a | `b` <b>", "generated": " ```\n| </pre><script>x</script>",
                  "truth": 1, "label": -1}
    (folder / "predictions-x.jsonl").write_text(json.dumps(prediction))
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
    assert difference(theirs, mine) == f"-0.375 ± {half:.3f}"


def test_rows_show_failed_and_missing_runs(tmp_path: Path) -> None:
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


def test_every_question_gets_a_section_and_one_on_cost_follows(
    questions: dict[str, list[Row]], config: ExperimentsConfig
) -> None:
    found = sections(questions, config, QUESTIONS)
    assert tuple(found) == (*QUESTIONS, "cost")
    drawn = {name for name, section in found.items() if section.figure}
    assert drawn == DRAWN
    priced = cells(found["cost"].lines)
    assert priced[1] == ["LoRA", "5", "0.50%", "160.0 ± 0.0", "64.0", "2,048", "2.5"]
    assert len(priced) == 3  # each run once, though several questions share it
    for name in QUESTIONS[2:]:
        assert found[name].basis.startswith("n = 5 test and 7 validation reviews; seeds ")
        assert any(line.startswith("python train.py ") for line in found[name].lines)


def test_other_questions_get_a_section_only_if_all_their_runs_are_finished(
    questions: dict[str, list[Row]], config: ExperimentsConfig, tmp_path: Path
) -> None:
    questions |= {"alpha": [row("later", missing(tmp_path / "later"))],
                  "grid": [row("bad", missing(tmp_path / "bad"), errors={"bad": "x"})]}
    found = sections(questions, config, asked=["grid"])
    assert tuple(found) == (*(name for name in QUESTIONS if name != "alpha"), "cost")
    assert found["grid"].figure is None
    assert "failed: x" in "\n".join(found["grid"].lines)


def test_shares_are_counted_on_the_models(config: ExperimentsConfig) -> None:
    lines = shares([], config).lines
    rows = {line[0]: line[1:] for line in cells(lines)}
    assert rows["gpt2-medium"] == ["354,823,168", "2,359,296 (0.66%)", "18,874,368 (5.05%)",
                                   "28,901,376 (7.53%)"]
    assert list(rows) == ["model", "gpt2-mini", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


def test_report_names_the_best_rate_and_warns_at_the_edge_of_the_grid(
    questions: dict[str, list[Row]], config: ExperimentsConfig, tmp_path: Path
) -> None:
    tried = [row(f"rate {rate}", make_run(tmp_path / f"rate{rate}", "10101", loss=loss),
                 learning_rate=rate) for rate, loss in ((1e-3, 0.5), (2e-3, 0.3), (4e-3, 0.4))]
    questions["rates"] = [*tried, questions["rates"][1]]
    lines = sections(questions, config, QUESTIONS)["rates"].lines
    text = "\n".join(lines)
    assert "LoRA r=16, α=64: lowest validation loss at a rate of 0.002.\n" in text
    edge = "lowest validation loss at a rate of 0.001, at the edge of the grid."
    assert f"full fine-tuning: {edge}" in text
    assert cells(lines)[0][-1].startswith("best, minus full ")


def test_methods_are_compared_at_their_own_best_rates(
    questions: dict[str, list[Row]], config: ExperimentsConfig, tmp_path: Path
) -> None:
    tried = [row(f"prefix {rate}", make_run(tmp_path / f"prefix{rate}", right, loss=loss),
                 method="prefix", lora_rank=0, learning_rate=rate)
             for rate, right, loss in ((0.01, "00001", 0.4), (0.04, "11111", 0.5))]
    questions["methods"] += tried
    section = sections(questions, config, QUESTIONS)["methods"]
    table = cells(section.lines)
    labels = ["LoRA r=16, α=64, rate 0.001", "prefix tuning, rate 0.01",
              "full fine-tuning, rate 0.001"]
    assert [line[0] for line in table] == ["", *labels, "", *labels]  # accuracies, then costs
    assert table[2][3] == "0.200"  # chosen by the validation loss, not by the test accuracy
    assert table[0][-1].startswith("best, minus LoRA r=16, α=64, rate 0.001")
    axes, curves = section.figure.axes
    assert axes.get_xscale() == "log"
    assert [list(line.get_xdata()) for line in curves.lines] == [[40, 80]] * 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "LoRA r=16, α=64", "prefix tuning", "full fine-tuning"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attributes if name in ("src", "href")]


def test_page_contains_its_pictures_and_no_script(
    questions: dict[str, list[Row]], config: ExperimentsConfig
) -> None:
    path = write_report(questions, config, "python -m experiments prompt='<b>\n```'", QUESTIONS)
    pictures = {picture.stem for picture in path.parent.glob("*.png")}
    assert pictures == DRAWN
    assert all(f"]({name}.png)" in path.read_text() for name in pictures)
    page = Page((path.parent / "report.html").read_text())
    assert page.tags.count("img") == len(pictures)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert page.tags.count("table") == 11
    assert page.tags.count("details") == 8
    assert "script" not in page.tags
    assert "b" not in page.tags


def test_report_names_model_machine_commit_and_command(
    questions: dict[str, list[Row]], config: ExperimentsConfig
) -> None:
    text = write_report(questions, config, "python -m experiments x=1", QUESTIONS).read_text()
    for fact in ("`gpt2-mini`", "processor a chip", "commit abc", "python -m experiments x=1"):
        assert fact in text
    assert "None" not in text  # these runs' folders name no version of torch


def test_template_of_many_lines_breaks_no_table(
    questions: dict[str, list[Row]], config: ExperimentsConfig
) -> None:
    text = "Review: {text}\n```\n| *Label*: $_$"
    questions["prompts"] = [row._replace(label=text) for row in questions["prompts"]]
    path = write_report(questions, config, "python -m experiments", QUESTIONS)
    page = Page((path.parent / "report.html").read_text())
    assert page.tags.count("table") == 11
    assert page.tags.count("em") == 1  # the one of the head


def test_rows_show_interrupted_runs_and_the_last_error_of_a_log(tmp_path: Path) -> None:
    half = make_run(tmp_path / "half", "1")
    (half.folder / FINISHED_FILE).unlink()
    (half.folder / "metrics.jsonl").write_text('{"iteration": 3, "train_loss": 1.0}\n')
    (half.folder / "trainer_state.pt").touch()
    failed = missing(tmp_path / "failed")
    failed.folder.mkdir()
    failed.log.write_text("error: out of luck\n")
    rows = [row("half", half), row("failed", failed)]
    _, *lines = cells(accuracy_table(rows, rows[0]))
    states = [line[1] for line in lines]
    assert states == ["0 of 1: interrupted", "0 of 1: failed: out of luck"]


def test_damaged_run_is_trouble_of_its_row_alone(
    questions: dict[str, list[Row]], config: ExperimentsConfig, tmp_path: Path
) -> None:
    lora = questions["curves"][0]
    shutil.rmtree(lora.jobs[0].folder / "best")
    (lora.jobs[1].folder / "last" / "results.json").write_text('{"n": 5}')
    (tmp_path / "zero" / "zero_shot-gpt2-mini" / "results-x.json").write_text("{")
    path = write_report(questions, config, "python -m experiments", QUESTIONS)
    _, damaged, full = cells(path.read_text().split("## LoRA of three ranks")[1].splitlines())[:3]
    assert re.fullmatch(r"0 of 2: to do again: .*/lora0/best/results.json is missing",
                        damaged[1].replace("\\", ""))
    assert full[1:4] == ["2", "0.250 ± 0.000", "0.600 ± 0.000"]
    assert "results-x.json is not JSON" in path.read_text()
    found = sections(questions, config, asked=["shares"])
    assert tuple(found) == ("shares",)  # no other question has all its runs


def test_run_scored_on_other_examples_is_not_compared(tmp_path: Path) -> None:
    mine, theirs = (load_run(make_run(tmp_path / name, right).folder)
                    for name, right in (("a", "11"), ("b", "110")))
    assert difference([mine], [theirs]) == "other test examples"
    one, other = (load_run(make_run(tmp_path / name, right).folder)
                  for name, right in (("c", "1"), ("d", "0")))
    assert difference([one], [other]) == "+1.000"  # one example has no interval


def test_run_is_read_again_when_its_files_are_replaced(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "11").folder
    assert load_run(folder) is load_run(folder)
    assert load_run(folder).results["best"]["accuracy"] == 1.0
    make_run(folder, "10")
    assert load_run(folder).results["best"]["accuracy"] == 0.5


def test_cost_of_a_run_without_logged_speed_or_weights_is_open(
    questions: dict[str, list[Row]], config: ExperimentsConfig
) -> None:
    for job in questions["curves"][0].jobs:
        (job.folder / "metrics.jsonl").write_text('{"iteration": 80, "validation_loss": 1.0}\n')
        (job.folder / "best" / "adapter_model.safetensors").unlink()
    line = cells(sections(questions, config, ["curves"])["cost"].lines)[1]
    assert (line[4], line[6]) == ("–", "–")
