"""A task is one class: a third one, with four labels, trains and scores like the others."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from made_models import loader_of

import generate
from checkpoints.files import read_json
from configurator import configure
from dataloader import TASKS, CustomDataLoader, make_task
from experiments.__main__ import check
from experiments.plan import ExperimentsConfig
from experiments.results import read_predictions
from generate import GenerateConfig, ModelSampler, make_loader
from model import GPT, IGNORE, GPTConfig
from runtime.run_folder import is_finished, read_metrics
from tasks.base import ClassificationTask
from tasks.python_code import PythonCodesTask
from train import Run, TrainConfig, train

ROOT = Path(__file__).parents[2]
END, NEWLINE = 50256, 198


# --- a third task ----------------------------------------------------------------------------


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


def test_third_task_is_one_class(topics: str, config: TrainConfig) -> None:
    config = replace(config, task="topic", dataset=topics, max_iters=80, eval_interval=40,
                     lora_rank=0)
    results = train(config)["last"]
    assert list(results["confusion"]) == [*TopicTask.labels]
    assert (results["n"], results["garbage"], results["accuracy"]) == (12, 0, 1)
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu", text="the cup final"))
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu", checkpoint="last"))
    again = read_json(Path(config.out_dir, "last", "results.json"))
    assert again == json.loads(json.dumps(results))


# --- the end of the third task ---------------------------------------------------------------


def test_words_are_told_whatever_their_case_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopicTask, "labels", ("World", "Sci/Tech", "New Music"))
    task = TopicTask()
    said = (" World", "sci/tech.", " new music, I think", "worldwide", "New", "World and Sci/Tech")
    assert [task.parse(text) for text in said] == [0, 1, 2, -1, -1, -1]
    monkeypatch.setattr(TopicTask, "labels", ("y", "n"))
    with pytest.raises(ValueError, match="a label cannot be called 'n': a score is"):
        TopicTask()


class EchoTask(PythonCodesTask):
    """Say it again: a task whose answers are texts, with a score of its own."""

    name = "echo"
    likelihood = False
    headline = "repeated"

    def summarize(self, records: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Any]:
        return {"n": len(records), "repeated": 0.5}

    def describe(self, results: Mapping[str, Any]) -> str:
        return f"repeated {results['repeated']}"

    def columns(self, results: Mapping[str, Any]) -> dict[str, str]:
        return {"repeated": str(results["repeated"])}


def test_task_of_long_answers_has_scores_of_its_own(
    questions: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "echo", EchoTask)
    config = replace(config, task="echo", dataset=questions, max_iters=2, block_size=64)
    assert train(config)["best"]["repeated"] == 0.5
    assert is_finished(Path(config.out_dir))
    with pytest.raises(ValueError, match="task='echo' has no report"):
        check(ExperimentsConfig(task="echo"))


def test_label_of_four_is_checked_by_number(topics: str) -> None:
    (Path(topics) / "train.jsonl").write_text('{"text": "a", "label": 4}')
    with pytest.raises(ValueError, match=r"a label of 0, 1, 2 or 3, but is"):
        make_task("topic").read(topics, "train")


def test_labels_that_begin_alike_have_no_odds_of_their_own(
    topics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TopicTask, "labels", ("sport science", "sport news"))
    model = GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(ValueError, match="begin with the same token"):
        ModelSampler(model, CustomDataLoader(topics, make_task("topic"), 64))


def test_unknown_task_is_refused_and_names_the_known() -> None:
    with pytest.raises(ValueError, match="task='poetry' must be one of sentiment, python_codes"):
        make_task("poetry")
    with pytest.raises(ValueError, match="must be one of default, plain, or a template"):
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


@pytest.mark.parametrize("prompt", [*PythonCodesTask.prompts, "{text}?"])
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
    assert loader.answers_cut == cut
    assert loader_of(questions, 1024).answers_cut == 0


def test_long_question_leaves_half_of_the_sequence_to_the_answer(questions: str) -> None:
    loader = loader_of(questions)
    prompt = loader.encode_prompt({"question": "why " * 500})
    assert len(prompt) == 64
    assert loader.tokenizer.decode(prompt).endswith("why\nAnswer:")


def test_training_tells_perplexity_and_scores_the_untouched_model(
    config: TrainConfig, questions: str, capsys: pytest.CaptureFixture
) -> None:
    config = replace(config, task="python_codes", dataset=questions, baseline=True, max_iters=6,
                     block_size=128)
    results = train(config)
    told = capsys.readouterr().out
    assert "(0.09%) on 32 examples" in told
    assert "1 of their answers are cut to fit into 128 tokens" in told
    assert list(results) == ["base", "best", "last"]
    assert results["last"]["perplexity"] < results["base"]["perplexity"]
    metrics = read_metrics(Path(config.out_dir))
    assert metrics[-1]["test_perplexity_last"] == results["last"]["perplexity"]
    assert metrics[0]["validation_perplexity"] > metrics[-4]["validation_perplexity"]
    for name in results:
        rows = read_predictions(Path(config.out_dir, name, "predictions.jsonl"))
        assert len(rows) == results[name]["n"] == 4
        assert {"question", "reference", "generated", "reference_nats"} <= rows[0].keys()
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu", checkpoint="last"))
    again = read_json(Path(config.out_dir, "last", "results.json"))
    assert again == json.loads(json.dumps(results["last"]))
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu", text="Print 3"))
    assert "64 tokens, cut off; does not parse as Python" in capsys.readouterr().out


def test_test_size_takes_that_many_evenly_spread(config: TrainConfig, reviews: str) -> None:
    results = train(replace(config, test_size=5, max_iters=2))
    assert results["best"]["n"] == 5
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu"))
    assert read_json(Path(config.out_dir, "best", "results.json"))["n"] == 5
    generate.main(GenerateConfig(out_dir=config.out_dir, device="cpu", limit=0))
    assert read_json(Path(config.out_dir, "best", "results-limit0.json"))["n"] == 12


def test_task_has_its_own_data_set(config: TrainConfig) -> None:
    settings = asdict(replace(config, dataset="auto"))
    model = GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=8))
    assert make_loader(settings, model).dataset == "rotten_tomatoes"
    assert make_loader(settings | {"task": "python_codes"}, model).dataset == "python_codes"


def test_reviews_are_no_programming_questions(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="needs the texts instruction, input, output, but is"):
        Run(replace(config, task="python_codes"))


def test_prompt_without_a_token_is_refused(questions: str) -> None:
    loader = CustomDataLoader(questions, PythonCodesTask("{text}"), 64)
    with pytest.raises(ValueError, match="a prompt without words: ''"):
        loader.encode_prompt({"question": ""})


def test_preset_halves_the_perplexity_within_a_few_steps(tmp_path: Path) -> None:
    """The whole preset takes two minutes; `docs/python-codes.md` has its figures."""
    preset = str(ROOT / "config" / "python_codes_mini.py")
    config = configure(TrainConfig, [preset, f"out_dir={tmp_path}", "max_iters=12", "test_size=4",
                                     "warmup_iters=2", "eval_interval=12", "dtype=float32"])
    results = train(config)
    assert results["last"]["perplexity"] < 0.5 * results["base"]["perplexity"]
