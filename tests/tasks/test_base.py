"""A task is one class: new ones train, score and report like those of the package."""

import inspect
import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from made_models import loader_of, read_lines

import generate
from checkpoints.files import read_json
from configurator import configure
from dataloader import CustomDataLoader
from experiments.__main__ import check
from experiments.jobs import Job
from experiments.plan import ExperimentsConfig, plan
from experiments.report import write_report
from experiments.results import Row
from experiments.text_sections import EXAMPLES
from generate import GenerateConfig, ModelSampler
from model import GPT, IGNORE, GPTConfig
from runtime.metrics import read_metrics
from runtime.run_folder import is_finished
from tasks.base import ClassificationTask, Task
from tasks.python_code import PythonCodesTask
from tasks.registry import TASKS, make_task, resolve_dataset
from tasks.scores import Completion, Metric
from tasks.sources import Record, read_records
from train import Run, TrainConfig, train

ROOT = Path(__file__).parents[2]
END, NEWLINE = 50256, 198


# --- a task of one word ----------------------------------------------------------------------


class TopicTask(ClassificationTask):
    """What is a headline about?"""

    name = "topic"
    dataset = "topics"
    labels = ("sport", "business", "science", "music")
    prompts = {"default": "Name the topic.\nText: {text}\nTopic:"}  # noqa: RUF012


HEADLINES = ("the team wins the cup", "shares fall again", "a new comet is seen", "the band sings")


@pytest.fixture
def topics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(TASKS, "topic", TopicTask)
    folder = tmp_path / "topics"
    folder.mkdir()
    for split, rows in (("train", 32), ("validation", 8), ("test", 12)):
        lines = [{"text": f"{HEADLINES[i % 4]}, {split} {i}", "label": i % 4} for i in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_new_classification_is_one_class(topics: str, config: TrainConfig) -> None:
    config = replace(config, task="topic", dataset=topics, max_iters=80, eval_interval=40,
                     lora_rank=0)
    results = train(config)["last"]
    assert list(results["confusion"]) == [*TopicTask.labels]
    assert (results["n"], results["garbage"], results["accuracy"]) == (12, 0, 1)
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu", text="the cup final"))
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu", checkpoint="last"))
    again = read_json(Path(config.out_dir, "last", "results.json"))
    assert again == json.loads(json.dumps(results))


def test_labels_are_parsed_in_any_case_and_may_have_several_words(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TopicTask, "labels", ("World", "Sci/Tech", "New Music"))
    task = TopicTask()
    texts = (" World", "sci/tech.", " new music, I think", "worldwide", "New", "World and Sci/Tech")
    assert [task.parse(text) for text in texts] == [0, 1, 2, -1, -1, -1]


def test_label_with_the_name_of_a_score_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopicTask, "labels", ("y", "n"))
    with pytest.raises(ValueError, match="'n' cannot be a label: a score has this name"):
        TopicTask()


@pytest.mark.parametrize("labels", [("music", "new music"), ("a", "b", "A")])
def test_label_that_holds_another_is_refused(
    labels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TopicTask, "labels", labels)
    with pytest.raises(ValueError, match="cannot be a label: no answer would be read as this one"):
        TopicTask()


# --- a task of long answers ------------------------------------------------------------------


class EchoTask(Task):
    """Repeat the text."""

    name, dataset, answer_tokens = "echo", "lines", 16
    prompts = {"default": "Text: {text}\nAgain:"}  # noqa: RUF012
    headline = "echoed"
    metrics = {"echoed": Metric("echoed, %", 100, 1)}  # noqa: RUF012

    def read(self, dataset: str, split: str) -> list[Record]:
        return read_records(dataset, split)

    def answer(self, record: Record) -> str:
        return f" {record['text']}"

    def summarize(self, records: Sequence[Record], predictions: Sequence[Any]) -> dict[str, Any]:
        right = sum(prediction.generated.strip() == record["text"]
                    for prediction, record in zip(predictions, records, strict=True))
        return {"n": len(records), "echoed": right / len(records)}


def test_new_task_of_long_answers_trains_and_gets_a_plan_and_a_report(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TASKS, "echo", EchoTask)
    config = replace(config, task="echo", max_iters=2)
    results = train(config)["best"]
    assert is_finished(Path(config.out_dir))
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu"))
    shown = f"{100 * results['echoed']:.1f}"
    assert f"echoed, % {shown}" in capsys.readouterr().out
    settings = ExperimentsConfig(task="echo", init_from=config.init_from,
                                 report_dir=str(tmp_path / "report"))
    check(settings)
    trained = next(variant for variant in plan(settings)["answers"] if variant.trains)
    job = Job("echo", "train.py", asdict(config), Path(config.out_dir))
    row = Row(trained.label, trained.changes, [job], {})
    text = write_report({"shares": [], "answers": [row]}, settings, "", ["answers"]).read_text()
    assert f"# LoRA on {Path(config.init_from).name}: echo" in text
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {trained.label} | 1 |")]
    assert line.endswith(f" | {shown} |")
    predictions = read_lines(Path(config.out_dir, "best", "predictions.jsonl"))
    examples = [f"<tr><td>{row['text']}</td><td><pre>{row['text']}</pre></td><td><pre>"
                for row in predictions]
    assert sum(example in text for example in examples) == EXAMPLES


def test_example_in_the_docstring_of_task_is_a_task() -> None:
    text = inspect.cleandoc(Task.__doc__)
    code = text[text.index("    class SummaryTask") : text.index("The other methods")]
    names: dict[str, Any] = {"Task": Task, "Metric": Metric, "statistics": statistics}
    exec(textwrap.dedent(code), names)  # noqa: S102
    task, record = names["SummaryTask"](), {"text": "a long text", "summary": "text"}
    assert task.prompt(record) + task.answer(record) == (
        "Summarize.\nText: a long text\nSummary: text")
    predictions = [task.judge(Completion(text, 1, True, [])) for text in ("abc", "defgh")]
    results = task.summarize([record, record], predictions)
    assert task.describe(results) == "letters 4"
    assert task.row(record) == {"text": "a long text", "reference": "text"}
    assert task.tell(predictions[0]) == ["abc"]


def test_empty_split_of_any_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="the train split is empty"):
        CustomDataLoader(str(tmp_path), EchoTask(), 64).window(0, 1, 1)


# --- errors ----------------------------------------------------------------------------------


def test_number_outside_of_four_labels_is_refused(topics: str) -> None:
    (Path(topics) / "train.jsonl").write_text('{"text": "a", "label": 4}')
    with pytest.raises(ValueError, match=r"a label of 0, 1, 2 or 3, but is"):
        make_task("topic").read(topics, "train")


def test_labels_that_begin_with_the_same_token_are_refused(
    topics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TopicTask, "labels", ("sport science", "sport news"))
    model = GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(ValueError, match="begin with the same token"):
        ModelSampler(model, CustomDataLoader(topics, make_task("topic"), 64))


def test_unknown_task_is_refused_and_names_the_known() -> None:
    with pytest.raises(ValueError, match="task='poetry' must be one of sentiment, python_codes"):
        make_task("poetry")
    with pytest.raises(ValueError, match="must be one of default, plain, chat, or a template"):
        make_task("python_codes", "terse")


# --- programming questions -------------------------------------------------------------------


def test_supervised_ids_are_the_answer_and_end_of_text(questions: str) -> None:
    loader = loader_of(questions)
    (record,) = [r for r in loader.records("train") + loader.records("validation")
                 + loader.records("test") if r["question"] == "Print 5"]
    (batch,) = loader.batches([record], 1)
    answer = loader.tokenizer.encode_ordinary("\n```python\nprint(5)\n```")
    assert batch.targets[batch.targets != IGNORE].tolist() == [*answer, END]
    assert answer[0] == NEWLINE
    prompt = loader.tokenizer.decode(loader.encode_prompt(record))
    assert prompt == "Instruction: Answer with Python code.\nText: Print 5\nAnswer:"


@pytest.mark.parametrize("prompt", ["default", "plain", "{text}?"])
def test_text_with_the_answer_never_reaches_the_model(questions: str, prompt: str) -> None:
    loader = CustomDataLoader(questions, PythonCodesTask(prompt), 128)
    for split in ("train", "validation", "test"):
        for record in loader.records(split):
            prompt, answer = map(loader.tokenizer.decode, loader.encode(record))
            assert "SECRET" not in prompt + answer
            assert record["output"] not in prompt


def test_long_answer_is_cut_at_its_end_and_counted(questions: str) -> None:
    loader = loader_of(questions)
    (long,) = [r for split in ("train", "validation", "test") for r in loader.records(split)
               if "x98" in r["output"]]
    example = loader.encode(long)
    whole = [*loader.tokenizer.encode_ordinary(loader.task.answer(long)), END]
    assert len(example.prompt + example.answer) == 128
    assert example.answer == whole[: len(example.answer)]
    assert example.answer[-1] != END
    cut = sum(r is long for r in loader.records("train"))
    assert loader.answers_cut == cut == 1
    number = len(loader.records("train"))
    assert loader.notes() == [f"1 of {number} answers in train are cut to fit into 128 tokens"]
    assert loader_of(questions, 1024).notes() == []


def test_long_question_leaves_half_of_the_sequence_to_the_answer(questions: str) -> None:
    loader = loader_of(questions)
    prompt = loader.encode_prompt({"question": "why " * 500})
    assert len(prompt) == 64
    assert loader.tokenizer.decode(prompt).endswith("why\nAnswer:")


def test_training_logs_perplexity_and_scores_the_base_model(
    config: TrainConfig, questions: str, capsys: pytest.CaptureFixture
) -> None:
    config = replace(config, task="python_codes", dataset=questions, baseline=True, max_iters=6,
                     block_size=128)
    results = train(config)
    printed = capsys.readouterr().out
    assert "(0.09%) on 32 examples" in printed
    assert "1 of 32 answers in train are cut to fit into 128 tokens" in printed
    assert list(results) == ["base", "best", "last"]
    assert results["last"]["perplexity"] < results["base"]["perplexity"]
    metrics = read_metrics(Path(config.out_dir))
    assert metrics[-1]["test_perplexity_last"] == results["last"]["perplexity"]
    assert metrics[0]["validation_perplexity"] > metrics[-4]["validation_perplexity"]
    for name in results:
        rows = read_lines(Path(config.out_dir, name, "predictions.jsonl"))
        assert len(rows) == results[name]["n"] == 4
        assert {"question", "reference", "generated", "reference_nats"} <= rows[0].keys()
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu", checkpoint="last"))
    again = read_json(Path(config.out_dir, "last", "results.json"))
    assert again == json.loads(json.dumps(results["last"]))
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu", text="Print 3"))
    assert "64 tokens, cut off; does not parse as Python" in capsys.readouterr().out


def test_test_size_limits_the_examples_that_are_scored(config: TrainConfig, reviews: str) -> None:
    results = train(replace(config, test_size=5, max_iters=2))
    assert results["best"]["n"] == 5
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu"))
    assert read_json(Path(config.out_dir, "best", "results.json"))["n"] == 5
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu", limit=0))
    assert read_json(Path(config.out_dir, "best", "results-limit0.json"))["n"] == 12


@pytest.mark.parametrize(("task", "dataset"), [
    ("sentiment", "rotten_tomatoes"), ("python_codes", "python_codes")])
def test_task_has_a_default_data_set(task: str, dataset: str) -> None:
    assert resolve_dataset(TrainConfig(task=task)).dataset == dataset
    assert resolve_dataset(TrainConfig(task=task, dataset="mine")).dataset == "mine"


def test_reviews_are_refused_as_programming_questions(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="needs the texts instruction, input, output, but is"):
        Run(replace(config, task="python_codes"))


def test_prompt_without_a_token_is_refused(questions: str) -> None:
    loader = CustomDataLoader(questions, PythonCodesTask("{text}"), 64)
    with pytest.raises(ValueError, match="a prompt without words: ''"):
        loader.encode_prompt({"question": ""})


def test_preset_halves_the_perplexity_within_a_few_steps(tmp_path: Path) -> None:
    """The whole preset takes two minutes; `docs/programming-questions.md` has its figures."""
    preset = str(ROOT / "config" / "python_codes_mini.py")
    config = configure(TrainConfig, [preset, f"out_dir={tmp_path}", "max_iters=12", "test_size=2",
                                     "warmup_iters=2", "eval_interval=12", "dtype=float32",
                                     "eval_iters=1", "eval_batch_size=4"])
    results = train(config)
    assert results["last"]["perplexity"] < 0.5 * results["base"]["perplexity"]
