"""What a model says is scored as defined, from checkpoints that are what was saved."""

import io
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from made_models import POSITIVE, assert_same, loader_of, make_sampler, shaken, stubborn

import generate
from checkpoints.files import read_json, write_json
from checkpoints.peft_format import save_adapter
from configurator import configure, run_script
from dataloader import make_loader
from generate import (
    GenerateConfig,
    ModelSampler,
    ModelSettings,
    predict_labels,
    resolve_question,
    results_suffix,
    score,
)
from lora import lora_layers
from methods.build import build_model, load_checkpoint
from model import GPT
from runtime.processes import typed_texts
from runtime.result_files import spare_results
from tasks.scores import Prediction, fields, summarize
from tasks.sentiment import SentimentTask

CPU = torch.device("cpu")
SETTINGS = ModelSettings(
    init_from="gpt2-mini", dataset="rotten_tomatoes", prompt="terse", train_size=0, seed=0,
    lora_rank=2, lora_alpha=3.0, lora_dropout=0.0, lora_targets="c_attn, mlp.c_fc")
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


# --- results ---------------------------------------------------------------------------------


def test_score_writes_what_it_returns(model: GPT, tmp_path: Path) -> None:
    sampler = make_sampler(model)
    texts = ("naïve 🎬", "a\u2028b\nc", "lone \ud83d", "")
    records = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    results = score(sampler, records, tmp_path / "best", "-here")
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "predictions-here.jsonl", "results-here.json"
    ]
    assert read_json(tmp_path / "best/results-here.json") == json.loads(json.dumps(results))
    lines = (tmp_path / "best/predictions-here.jsonl").read_text().split("\n")
    assert lines.pop() == ""
    predictions = sampler.predict(records)
    assert [json.loads(line) for line in lines] == [
        {"text": record["text"], "truth": record["label"], **fields(prediction)}
        for record, prediction in zip(records, predictions, strict=True)
    ]
    scores = summarize([0, 1, 0, 1], predictions, SentimentTask.labels)
    assert results == scores | sampler.describe()
    assert score(sampler, records) == results
    assert len(list(tmp_path.rglob("*"))) == 3


def test_predict_labels_follows_the_data_set_and_keeps_garbage(model: GPT, reviews: str) -> None:
    sampler = make_sampler(model, reviews)
    records = sampler.loader.records("test")
    labels = predict_labels(records, sampler)
    assert labels == [prediction.label for prediction in sampler.predict(records)]
    assert set(labels) > {-1}
    assert predict_labels(records[::-1], sampler) == labels[::-1]
    assert predict_labels(records, make_sampler(stubborn(model, 11), reviews)) == [-1] * 12


def test_predict_labels_refuses_a_task_without_labels(model: GPT, questions: str) -> None:
    sampler = ModelSampler(model, loader_of(questions))
    with pytest.raises(ValueError, match="task='python_codes' has no labels"):
        predict_labels(sampler.loader.records("test"), sampler)


def suffix(*arguments: str) -> str:
    settings, config = replace(SETTINGS, test_size=3), configure(GenerateConfig, list(arguments))
    plain = GenerateConfig(task=config.task, split=config.split)
    own = resolve_question(plain, settings, "float32")
    dtype = "float32" if config.dtype == "auto" else config.dtype
    question = resolve_question(config, settings, dtype)
    question = replace(question, max_new_tokens=question.max_new_tokens or 5)
    own = replace(own, max_new_tokens=5)
    return results_suffix(asdict(question), asdict(own), settings.task)


@pytest.mark.parametrize(
    "arguments",
    [[], ["split=test", "prompt=terse", "dataset=rotten_tomatoes"], ["batch_size=1", "seed=3"],
     ["temperature=0", "top_k=9"], ["temperature=2", "top_k=1"], ["max_new_tokens=5"],
     ["limit=3"], ["task=sentiment"]],
)
def test_own_settings_of_the_run_give_the_plain_name(arguments: list[str]) -> None:
    assert suffix(*arguments) == ""


def test_other_settings_give_names_that_differ() -> None:
    changes = (
        ["split=validation"], ["split=train"], ["dataset=movie_reviews"], ["dataset=data/a"],
        ["prompt=default"], ["prompt=detailed"], ["prompt={text} Good? Label:"],
        ["temperature=1"], ["temperature=0.7"], ["temperature=1", "seed=2"],
        ["temperature=1", "top_k=5"], ["split=validation", "prompt=default"],
        ["split=validation", "dataset=movie_reviews"], ["max_new_tokens=6"], ["limit=6"],
        ["block_size=64"], ["task=python_codes"], ["split=validation", "limit=3"],
        ["task=python_codes", "dataset=rotten_tomatoes"], ["task=python_codes", "prompt=terse"],
        ["dataset=validation"], ["dataset=limit6"], ["dataset=float16"], ["dtype=float16"],
        ["task=python_codes", "dataset=validation"], ["limit=0"],
    )
    names = [suffix(*change) for change in changes]
    assert len({"", *names}) == len(changes) + 1
    assert not any(set(name) & set("/\\ {}?:\n") for name in names)


@pytest.mark.parametrize(
    ("one", "other"),
    [("prompt={text} Good?", "prompt={text}\nGood:"), ("dataset=../data", "dataset=data"),
     ("dataset=data/a", "dataset=data-a")],
)
def test_names_differ_where_only_punctuation_does(one: str, other: str) -> None:
    assert suffix(one) != suffix(other)


def test_name_of_a_long_prompt_fits_a_file_system() -> None:
    for words in ("Read the following review closely. ", "判断这段影评的情感倾向", "é" * 40):
        name = suffix(f"prompt={words * 20}{{text}} Label:", f"dataset={words * 9}",
                      f"limit={2**63}", "temperature=0.123456789", f"seed={2**63 - 1}")
        assert 10 < len(f".predictions{name}.1234567.partial.jsonl".encode()) <= 255


@pytest.mark.parametrize(("there", "own_data", "longer"), [
    ({"dtype": "bfloat16"}, "", ""),  # of an older version
    ({"dtype": "float32", "data_sha256": "ab" * 32}, "", "-bfloat16"),
    ({"dtype": "bfloat16", "data_sha256": "cd" * 32}, "", "-data_abababab"),
    ({"dtype": "bfloat16", "base_sha256": "cd" * 32}, "", "-base_12121212"),
    ({"dtype": "bfloat16", "batch_size": 5}, "", "-batch64"),
    (None, "ab" * 32, ""),
    (None, "cd" * 32, "-data_abababab"),
])
def test_results_of_another_precision_data_or_model_stay(
    there: dict[str, str] | None, own_data: str, longer: str, tmp_path: Path
) -> None:
    asked = {"dtype": "bfloat16", "data_sha256": "ab" * 32, "base_sha256": "12" * 32,
             "batch_size": 64}
    path = tmp_path / "results-train.json"
    if there:
        write_json(path, there)
    assert spare_results(tmp_path, "-train", asked, own_data) == "-train" + longer
    path.write_text("damaged")
    assert spare_results(tmp_path, "-train", asked, "") == "-train"


def test_base_models_that_differ_have_results_of_their_own(
    checkpoint: str, reviews: str, tmp_path: Path
) -> None:
    settings = [f"init_from={tmp_path / 'base'}", f"dataset={reviews}", f"out_dir={tmp_path}"]
    for seed in (1, 2, 2):
        torch.manual_seed(seed)
        shaken(GPT.from_pretrained(checkpoint)).save_pretrained(tmp_path / "base")
        run(*settings, "limit=2")
    assert len(list(tmp_path.glob("zero_shot-*/results-*.json"))) == 2


def test_close_temperatures_have_names_of_their_own() -> None:
    names = {suffix(f"temperature={t}") for t in ("0.7", "0.70000001", "1", "1.0", "1e-9")}
    assert len(names) == 4
    assert any("-temperature1_top0_" in name for name in names)


def test_relative_and_absolute_path_of_the_runs_data_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    settings = replace(SETTINGS, dataset=str(tmp_path / "data"))
    own, asked = (resolve_question(GenerateConfig(dataset=dataset), settings, "float32")
                  for dataset in ("auto", "data"))
    assert results_suffix(asdict(asked), asdict(own), settings.task) == ""


def save_run(folder: Path, settings: ModelSettings, device: str, dtype: str) -> GPT:
    """Write a run whose best checkpoint has untrained adapters; return the model."""
    write_json(folder / "config.json",
               {"settings": asdict(settings), "device": device, "dtype": dtype})
    adapted = build_model(settings.init_from, settings, CPU, torch.float32)
    save_adapter(adapted, folder / "best", settings.init_from)
    return adapted


def test_run_on_other_hardware_keeps_the_results_of_its_own(
    checkpoint: str, reviews: str, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, init_from=checkpoint, dataset=reviews, block_size=64)
    save_run(tmp_path, settings, "Tesla T4", "float16")
    run(f"out_dir={tmp_path}")
    assert [path.name for path in (tmp_path / "best").glob("results*")] == ["results-float32.json"]


def test_run_that_is_trained_on_while_it_is_scored_keeps_its_results(
    checkpoint: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, init_from=checkpoint, dataset=reviews, block_size=64)
    adapted = save_run(tmp_path, settings, "cpu", "float32")
    write_json(tmp_path / "best" / "results.json", {"accuracy": 0.5})
    predict = ModelSampler.predict

    def meanwhile(*arguments: object) -> object:
        save_adapter(adapted, tmp_path / "best", checkpoint)
        return predict(*arguments)

    monkeypatch.setattr(ModelSampler, "predict", meanwhile)
    with pytest.raises(ValueError, match="best changed while it was scored: nothing is written"):
        run(f"out_dir={tmp_path}")
    assert read_json(tmp_path / "best" / "results.json") == {"accuracy": 0.5}


def test_answers_drawn_in_other_batches_have_a_name_of_their_own(
    checkpoint: str, reviews: str, tmp_path: Path
) -> None:
    settings = [f"init_from={checkpoint}", f"dataset={reviews}", f"out_dir={tmp_path}", "limit=5"]
    for more in (["temperature=1"], ["temperature=1", "batch_size=2"], [], ["batch_size=2"]):
        run(*settings, *more)
    assert len(list(tmp_path.rglob("results*.json"))) == 3


def test_base_model_that_changed_under_its_adapter_is_refused(
    checkpoint: str, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, init_from=checkpoint)
    write_json(tmp_path / "config.json", {
        "settings": asdict(settings), "device": "cpu", "dtype": "float32", "base_sha256": "0" * 64})
    with pytest.raises(ValueError, match="the base model changed since the run began"):
        run(f"out_dir={tmp_path}", "text=fine")


def test_checkpoint_of_a_run_never_comes_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("checkpoints.hub_format.try_to_load_from_cache", pytest.fail)
    settings = replace(SETTINGS, lora_rank=0)
    write_json(Path("out/config.json"),
               {"settings": asdict(settings), "device": "cpu", "dtype": "float32"})
    with pytest.raises(FileNotFoundError, match="there is no folder out/best"):
        run("out_dir=out", "text=fine")


@pytest.mark.parametrize("text", ["", "  \t"])
def test_text_without_words_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"command line: text='.*' holds no words to answer"):
        configure(GenerateConfig, [f"text={text}"])


# --- checkpoints and the script --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_load_on_their_base(checkpoint: str, tmp_path: Path, dtype: torch.dtype) -> None:
    settings = replace(SETTINGS, init_from=checkpoint)
    trained = build_model(checkpoint, settings, CPU, torch.float32)
    for layer in lora_layers(trained).values():
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(trained, tmp_path, checkpoint)
    loaded = load_checkpoint(tmp_path, settings, CPU, dtype)
    assert lora_layers(loaded).keys() == lora_layers(trained).keys()
    for name, tensor in trained.state_dict().items():
        stored = dtype if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else (
            torch.float32)
        equal(loaded.state_dict()[name], tensor.to(stored))


def test_all_weights_load_without_their_base(checkpoint: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, init_from="no/longer/there", lora_rank=0)
    trained = shaken(build_model(checkpoint, settings, CPU, torch.float32))
    trained.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path, settings, CPU, torch.float32)
    equal(dict(loaded.state_dict()), dict(trained.state_dict()))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def run(*arguments: str) -> None:
    generate.main(configure(GenerateConfig, ["device=cpu", "dtype=float32", *arguments]))


def test_model_that_was_never_trained_is_scored_in_its_own_folder(
    checkpoint: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"init_from={checkpoint}", f"dataset={reviews}", f"out_dir={tmp_path}", "split=validation")
    (folder,) = tmp_path.glob("zero_shot-*")
    (path,) = folder.glob("results-validation-*.json")
    (predictions,) = folder.glob("predictions-validation-*.jsonl")
    results, printed = read_json(path), capsys.readouterr().out
    sampler = make_sampler(GPT.from_pretrained(checkpoint), reviews, "default")
    records = sampler.loader.records("validation")
    assert json.loads(json.dumps(score(sampler, records))) == {
        key: value for key, value in results.items() if key != "base_sha256"}
    assert len(predictions.read_text().splitlines()) == results["n"] == 12
    assert f"accuracy {results['accuracy']:.4f}" in printed
    assert f"{results['garbage']} garbage" in printed
    assert printed.endswith(f"written: {path}\n")


def test_one_text_is_labelled_and_nothing_is_written(
    model: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stubborn(model, POSITIVE).save_pretrained(tmp_path / "model")
    run(f"init_from={tmp_path / 'model'}", "text=a fine film", f"out_dir={tmp_path / 'out'}")
    assert capsys.readouterr().out.splitlines() == [
        f"continuation: {' positive' * 5!r}", "label: positive", "P(negative) = 0.0000",
        "P(positive) = 1.0000",
    ]
    run(f"init_from={tmp_path / 'model'}", "text=dull", "max_new_tokens=1", "prompt={text}")
    assert "continuation: ' positive'\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_typed_texts_are_answered_until_an_empty_line(
    model: GPT, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "model")
    settings = [f"init_from={tmp_path / 'model'}", f"dataset={reviews}", "prompt=terse", "shots=2"]
    expected = ""
    for text in ("a fine film", "dull"):
        run(*settings, f"text={text}")
        expected += capsys.readouterr().out
    for typed in ("a fine film\ndull\n \nnot read\n", "a fine film\ndull"):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        run(*settings, "ask=True")
        assert capsys.readouterr().out == expected
    assert expected.count("label: ") == 2


def test_terminal_is_asked_for_a_text(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO("\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    run(f"init_from={checkpoint}", "ask=True")
    assert capsys.readouterr().out == "Type a text; an empty line ends: "


def test_closed_stdin_holds_no_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert list(typed_texts()) == []


@pytest.mark.parametrize("both", [["export=x", "text=y"], ["export=x", "ask=True"],
                                  ["text=y", "ask=True"]])
def test_a_model_is_either_exported_or_asked_in_one_way(both: list[str]) -> None:
    with pytest.raises(ValueError, match="export writes a model, text and ask question it"):
        run(*both)


def test_cut_texts_are_counted(
    checkpoint: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"init_from={checkpoint}", f"dataset={reviews}", f"out_dir={tmp_path}"]
    run(*settings, "text=" + "long " * 300)
    assert capsys.readouterr().out.startswith("1 of 1 texts are cut to fit into 256 tokens\n")
    run(*settings, "block_size=72", "limit=4")
    assert capsys.readouterr().out.startswith("4 of 4 texts are cut to fit into 72 tokens\n")
    run(*settings, "limit=4")
    assert "are cut to fit" not in capsys.readouterr().out


def test_best_and_last_of_a_run_are_scored_with_its_own_settings(
    checkpoint: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, init_from=checkpoint, dataset=reviews, block_size=64)
    write_json(tmp_path / "config.json",
               {"settings": asdict(settings), "device": "cpu", "dtype": "float32"})
    for name in ("best", "last"):
        adapted = build_model(checkpoint, settings, CPU, torch.float32)
        for layer in lora_layers(adapted).values():
            torch.nn.init.normal_(layer.lora_B)
        save_adapter(adapted, tmp_path / name, checkpoint)
        run(f"out_dir={tmp_path}", f"checkpoint={name}", "dtype=auto")
        sampler = ModelSampler(adapted, make_loader(settings, adapted.config))
        expected = sampler.predict(sampler.loader.records("test"))
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        found = [Prediction(*list(json.loads(line).values())[2:]) for line in lines]
        assert_same(found, expected)
        assert f"written: {tmp_path / name / 'results.json'}\n" in capsys.readouterr().out
    best, last = (read_json(tmp_path / name / "results.json") for name in ("best", "last"))
    assert best["n"] == last["n"] == 12
    run(f"out_dir={tmp_path}", "split=validation")
    assert read_json(tmp_path / "best/results.json") == best
    assert (tmp_path / "best/results-validation.json").is_file()


def test_seed_of_the_script_fixes_what_it_samples(
    checkpoint: str, reviews: str, tmp_path: Path
) -> None:
    said = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(f"init_from={checkpoint}", f"dataset={reviews}", f"out_dir={tmp_path / folder}",
            "temperature=1", f"seed={seed}")
        (path,) = (tmp_path / folder).rglob("predictions*_seed*.jsonl")
        said.append(path.read_text())
    assert said[0] == said[1] != said[2]


def test_folder_without_a_run_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["generate.py", f"out_dir={tmp_path}", "device=cpu"])
    with pytest.raises(SystemExit, match=r"^2$"):
        run_script(generate.main, GenerateConfig)
    expected = f"error: out_dir='{tmp_path}' holds no run: there is no {tmp_path}/config.json\n"
    assert capsys.readouterr() == ("", expected)


def test_block_longer_than_the_model_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match=r"block_size=129, but the model has 128$"):
        make_loader(replace(SETTINGS, block_size=129), model.config)
    assert make_loader(SETTINGS, model.config).block_size == 128
    assert make_loader(replace(SETTINGS, block_size=64), model.config).block_size == 64
