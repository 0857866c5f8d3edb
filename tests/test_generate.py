"""What a model says is scored as defined, and batches, caches and merging change none of it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

import generate
from checkpoint import read_json, save_adapter, write_json
from configurator import configure, run_script
from dataloader import CustomDataLoader, SentimentTask
from generate import (
    GenerateConfig,
    ModelSampler,
    make_loader,
    results_suffix,
    score,
)
from lora import lora_layers
from model import GPT, GPTConfig, build_model, load_checkpoint
from scores import Prediction, summarize

CPU = torch.device("cpu")
END, POSITIVE, NEGATIVE = 50256, 3967, 4633
SETTINGS = {
    "dataset": "rotten_tomatoes", "prompt": "terse", "block_size": 0, "train_size": 0, "seed": 0,
    "lora_rank": 2, "lora_alpha": 3.0, "lora_dropout": 0.0, "lora_qkv": "split",
    "lora_targets": "c_attn, mlp.c_fc", "dropout": 0.0, "init_from": "gpt2-mini",
    "dtype": "float32",
}
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def shaken(model: GPT) -> GPT:
    """Make every parameter count, and the two labels and end-of-text likely answers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        one, other = 2 * torch.randn(2, model.config.n_embd)
        model.transformer.wte.weight[[POSITIVE, NEGATIVE, END]] = torch.stack((one, -one, other))
    return model


@pytest.fixture
def model() -> GPT:
    """A random GPT-2 of the real vocabulary, with adapters, whose answers depend on the text."""
    torch.manual_seed(1)
    return shaken(GPT(GPTConfig(
        block_size=128, n_layer=2, n_head=2, n_embd=16, lora_rank=2, lora_alpha=3.0
    )))


def stubborn(model: GPT, token: int) -> GPT:
    """Make `model` say `token` whatever it is asked."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[token] = 5
    return model


def make_sampler(
    model: GPT, dataset: str = "", prompt: str = "terse", share_prefix: bool = True, **changes: Any
) -> ModelSampler:
    task, block_size = SentimentTask(prompt), model.config.block_size
    loader = CustomDataLoader(dataset, task, block_size, share_prefix=share_prefix)
    return ModelSampler(model, loader, **changes)


def assert_same(predictions: list[Prediction], expected: list[Prediction]) -> None:
    assert [p[:2] for p in predictions] == [p[:2] for p in expected]
    close([p.label_logprobs for p in predictions], [p.label_logprobs for p in expected])


# --- figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["terse", "question", "{text} Label:"])
def test_batches_and_caches_change_no_prediction_and_no_order(
    model: GPT, reviews: str, prompt: str
) -> None:
    alone = make_sampler(model, reviews, prompt, batch_size=1, share_prefix=False)
    records = alone.loader.records("train")
    expected = [alone.predict_labels([record])[0] for record in records]
    assert {prediction.label for prediction in expected} == {-1, 0, 1}
    assert len({prediction.generated for prediction in expected}) > 5
    for batch_size in (1, 5, 64):
        for share_prefix in (True, False):
            sampler = make_sampler(model, reviews, prompt, share_prefix, batch_size=batch_size)
            assert_same(sampler.predict_labels(records), expected)
            assert_same(sampler.predict_labels(records[::-1]), expected[::-1])


def test_label_odds_are_those_of_a_plain_forward(model: GPT, reviews: str) -> None:
    sampler = make_sampler(model, reviews)
    records = sampler.loader.records("train")
    predictions = sampler.predict_labels(records)
    for record, prediction in zip(records, predictions, strict=True):
        logits = model(torch.tensor([sampler.loader.encode_prompt(record)]))[0][0, -1]
        expected = logits.log_softmax(dim=-1)[[NEGATIVE, POSITIVE]]
        close(torch.tensor(prediction.label_logprobs), expected)


def test_greedy_answers_equal_those_of_transformers(
    model: GPT, reviews: str, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    reference = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    sampler = make_sampler(model, reviews, max_new_tokens=7)
    records = sampler.loader.records("train")
    predictions = sampler.predict_labels(records)
    for record, prediction in zip(records, predictions, strict=True):
        ids = torch.tensor([sampler.loader.encode_prompt(record)])
        said = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False,
            eos_token_id=END, pad_token_id=END,
        )[0, ids.size(1) :].tolist()
        words = sampler.loader.tokenizer.decode([token for token in said if token != END])
        assert prediction.generated == words
        assert prediction.label == sampler.loader.task.parse(words)
    assert len({prediction.generated for prediction in predictions}) > 5


@pytest.mark.parametrize("training", [True, False])
def test_adapters_are_merged_while_scoring_and_only_then(
    model: GPT, reviews: str, training: bool
) -> None:
    model.train(training)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    merged = []
    model.transformer.h[0].register_forward_hook(
        lambda *_: merged.extend(layer.has_weights_merged for layer in lora_layers(model).values())
    )
    sampler = make_sampler(model, reviews)
    sampler.predict_labels(sampler.loader.records("test"))
    assert merged
    assert all(merged)
    assert model.training == model.transformer.h[1].mlp.training == training
    assert {layer.has_weights_merged for layer in lora_layers(model).values()} == {not training}
    equal(dict(model.state_dict()), before)


def test_answer_of_nothing_is_garbage(model: GPT) -> None:
    (prediction,) = make_sampler(stubborn(model, END)).predict_labels([{"text": "dull"}])
    assert prediction[:2] == ("", -1)
    assert all(-1000 < logprob < -50 for logprob in prediction.label_logprobs)


@pytest.mark.parametrize("tokens", [1, 5, 12])
@pytest.mark.parametrize(("token", "word", "label"), [(POSITIVE, " positive", 1), (257, " a", -1)])
def test_answer_is_as_long_as_allowed(
    model: GPT, tokens: int, token: int, word: str, label: int
) -> None:
    sampler = make_sampler(stubborn(model, token), max_new_tokens=tokens)
    predictions = sampler.predict_labels([{"text": "dull"}, {"text": "dull film " * 1000}])
    assert [prediction[:2] for prediction in predictions] == [(word * tokens, label)] * 2


def test_sampled_answers_depend_on_the_seed_alone(model: GPT, reviews: str) -> None:
    records = make_sampler(model, reviews).loader.records("test")

    def sample(seed: int, **settings: Any) -> list[str]:
        torch.manual_seed(seed)
        predictions = make_sampler(model, reviews, **settings).predict_labels(records)
        return [prediction.generated for prediction in predictions]

    assert sample(1, temperature=1.0) == sample(1, temperature=1.0) != sample(2, temperature=1.0)
    assert sample(1, temperature=1.0, top_k=1) == sample(1) == sample(2)


def test_sampled_tokens_are_among_the_likeliest(model: GPT) -> None:
    sampler = make_sampler(model, temperature=9.0, top_k=2, max_new_tokens=1)
    record = {"text": "a fine film"}
    logits = model(torch.tensor([sampler.loader.encode_prompt(record)]))[0][0, -1]
    likeliest = {sampler._text([token]) for token in logits.topk(2).indices.tolist()}
    assert {said.generated for said in sampler.predict_labels([record] * 40)} == likeliest


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
    predictions = sampler.predict_labels(records)
    assert [json.loads(line) for line in lines] == [
        {"text": record["text"], "truth": record["label"], **prediction._asdict()}
        for record, prediction in zip(records, predictions, strict=True)
    ]
    scores = summarize([0, 1, 0, 1], predictions, SentimentTask.labels)
    assert results == scores | sampler.describe()
    assert score(sampler, records) == results
    assert len(list(tmp_path.rglob("*"))) == 3


def suffix(*arguments: str) -> str:
    return results_suffix(configure(GenerateConfig, list(arguments)), SETTINGS)


@pytest.mark.parametrize(
    "arguments",
    [[], ["split=test", "prompt=terse", "dataset=rotten_tomatoes"], ["batch_size=1", "seed=3"],
     ["temperature=0", "top_k=9"], ["temperature=2", "top_k=1"], ["max_new_tokens=5"]],
)
def test_own_settings_of_the_run_give_the_plain_name(arguments: list[str]) -> None:
    assert suffix(*arguments) == ""


def test_other_settings_give_names_that_differ() -> None:
    changes = (
        ["split=validation"], ["split=train"], ["dataset=movie_reviews"], ["dataset=data/a"],
        ["prompt=default"], ["prompt=detailed"], ["prompt={text} Good? Label:"],
        ["temperature=1"], ["temperature=0.7"], ["temperature=1", "seed=2"],
        ["temperature=1", "top_k=5"], ["split=validation", "prompt=default"],
        ["split=validation", "dataset=movie_reviews"], ["max_new_tokens=6"],
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
    name = suffix("prompt=" + "Read the following review closely. " * 20 + "{text} Label:")
    assert 10 < len(f".predictions{name}.1234567.jsonl".encode()) <= 255


# --- checkpoints and the script --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_load_on_their_base(checkpoint: str, tmp_path: Path, dtype: torch.dtype) -> None:
    settings = SETTINGS | {"init_from": checkpoint}
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
    settings = SETTINGS | {"init_from": "no/longer/there", "lora_rank": 0}
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
    assert json.loads(json.dumps(score(sampler, records))) == results
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


def test_best_and_last_of_a_run_are_scored_with_its_own_settings(
    checkpoint: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SETTINGS | {"init_from": checkpoint, "dataset": reviews, "block_size": 64}
    write_json(tmp_path / "config.json",
               {"settings": settings, "device": "cpu", "dtype": "float32"})
    for name in ("best", "last"):
        adapted = build_model(checkpoint, settings, CPU, torch.float32)
        for layer in lora_layers(adapted).values():
            torch.nn.init.normal_(layer.lora_B)
        save_adapter(adapted, tmp_path / name, checkpoint)
        run(f"out_dir={tmp_path}", f"checkpoint={name}", "dtype=auto")
        sampler = ModelSampler(adapted, make_loader(settings, adapted))
        expected = sampler.predict_labels(sampler.loader.records("test"))
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
        make_loader(SETTINGS | {"block_size": 129}, model)
    assert make_loader(SETTINGS, model).block_size == 128
    assert make_loader(SETTINGS | {"block_size": 64}, model).block_size == 64
