"""The sections on long answers: means, intervals, and examples that no answer can break."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from made_runs import cells, missing

from checkpoints.files import write_json
from experiments.jobs import Job
from experiments.plan import ExperimentsConfig
from experiments.report import write_report
from experiments.results import Row
from experiments.text_sections import EXAMPLES, examples, metrics_table, preformatted, results_of
from runtime.run_folder import FINISHED_FILE
from tasks.code_scores import METRICS, summarize
from tasks.python_code import PythonCodesTask
from tasks.registry import resolve_dataset
from tasks.scores import Metric, TextPrediction
from train import TrainConfig

OUTPUTS = [f"```python\nx = {i}\n\nprint('<b>', x)\n```" for i in range(30)]
TASK, TASK_SETTING = PythonCodesTask(), {"task": "python_codes"}


@pytest.fixture
def config(tmp_path: Path) -> ExperimentsConfig:
    return ExperimentsConfig(task="python_codes", init_from="gpt2-mini", dataset="mine",
                             report_dir=str(tmp_path / "report"))


def write_scores(folder: Path, generated: list[str], nats: float, suffix: str = "") -> None:
    predictions = [TextPrediction(text, 5, True, nats, 2) for text in generated]
    write_json(folder / f"results{suffix}.json", summarize(OUTPUTS, predictions, str.split))
    rows = [{"question": f"<i>{i}</i> | `x`\n\n\ud83d a *b*", "reference": output,
             **prediction._asdict()}
            for i, (output, prediction) in enumerate(zip(OUTPUTS, predictions, strict=True))]
    (folder / f"predictions{suffix}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def trained(folder: Path, generated: list[str], nats: float) -> Job:
    for name in ("best", "last"):
        (folder / name).mkdir(parents=True)
        write_scores(folder / name, generated, nats)
    write_json(folder / "config.json", {
        "settings": asdict(resolve_dataset(TrainConfig(**TASK_SETTING))),
        "device": "cpu", "dtype": "float32",
        "parameters": {"trained": 5, "total": 100}, "validation_reviews": 7})
    lines = [{"iteration": 0, "validation_loss": 9.0, "memory_mib": 64},
             {"iteration": 0, "train_loss": 9.0, "reviews_per_second": 64.0},
             {"iteration": 40, "validation_loss": nats / 2, "memory_mib": 64}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / FINISHED_FILE, {"iteration": 80})
    return Job(folder.name, "train.py", TASK_SETTING, folder)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """The base model, a variant of two seeds, and one that has not run."""
    (tmp_path / "zero" / "zero_shot-x").mkdir(parents=True)
    write_scores(tmp_path / "zero" / "zero_shot-x", ["</pre><script>"] * 30, 8.0, "-mine")
    zero = Job("zero", "generate.py", TASK_SETTING, tmp_path / "zero", "zero_shot-*/results*.json")
    seeds = [trained(tmp_path / "a", OUTPUTS, 2.0), trained(tmp_path / "b", ["no code"] * 30, 4.0)]
    rank = {"lora_rank": 8}
    return [Row("base", {"prompt": "default"}, [zero], {}), Row("LoRA", rank, seeds, {}),
            Row("later", rank, [missing(tmp_path / "later")], {})]


def test_table_has_means_of_the_seeds_and_of_their_intervals(rows: list[Row]) -> None:
    titles, base, lora, later = cells(metrics_table(rows, METRICS))
    assert titles[3:] == ["perplexity", "BLEU", "chrF", "ROUGE-L", "exact match, %", "parse, %",
                          "ended by itself, %", "tokens"]
    assert base[1:4] == ["1", "", "54.60 (54.60 to 54.60)"]  # e^4: 8 nats for two tokens
    assert lora[1:3] == ["2", "1.500 ± 0.707"]
    assert lora[3].startswith("5.05 ± 3.30 (5.05 to 5.05)")  # of e^1 and e^2
    assert lora[7] == "50.0 ± 70.7 (50.0 to 50.0)"  # one seed is always right, the other never
    assert later[1:] == ["0 of 1: to do", *[""] * 9]
    low, high = results_of(rows[0])[0]["interval_95"]["chrf"]
    assert f"({low:.1f} to {high:.1f})" in base[5]


def test_score_without_an_interval_has_no_brackets(rows: list[Row]) -> None:
    _, base, lora, _ = cells(metrics_table(rows, {"loss": Metric("loss, cents", 100, 0)}))
    assert (base[3], lora[3]) == ("400", "150 ± 71")


def test_examples_are_drawn_by_seed_and_each_stands_in_one_line(rows: list[Row]) -> None:
    first, again, other = (examples(rows[:2], TASK, seed) for seed in (1, 1, 2))
    assert first == again != other
    lines = [line for line in first if line.startswith("<tr><td>")]
    assert len(lines) == EXAMPLES == 10
    for line in lines:
        number = re.search(r"&lt;i&gt;(\d+)", line)[1]
        right = preformatted(f"x = {number}\n\nprint('<b>', x)")
        assert line.count(right) == 2  # the right answer, and the first seed's
        assert "<pre>&lt;/pre&gt;&lt;script&gt;</pre>" in line
    assert all(line for line in first[first.index("<table>"):])  # a blank line would end it


def test_report_shows_scores_examples_and_cost(
    rows: list[Row], config: ExperimentsConfig
) -> None:
    questions = {"shares": [], "answers": rows, "targets": rows[1:]}
    path = write_report(questions, config, "python -m experiments", ["answers", "targets"])
    text, page = path.read_text(), path.with_suffix(".html").read_text()
    assert f"# LoRA on {Path(config.init_from).name}: python codes" in text
    assert "generated code is never executed" in text
    assert "Of the 30 right answers 100.0% parse" in text
    assert text.count("<table>") == 1
    assert {"answers.png", "targets.png"} <= {file.name for file in path.parent.iterdir()}
    assert "<script" not in page
    assert page.count("<td><pre>") == EXAMPLES * 3
    assert "What does it cost?" in text


def test_report_without_finished_runs_is_written(
    rows: list[Row], config: ExperimentsConfig
) -> None:
    path = write_report({"answers": rows[2:]}, config, "python -m experiments", ["answers"])
    assert "0 of 1: to do" in path.read_text()
