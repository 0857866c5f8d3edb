"""Examples in a prompt are drawn equally and stand in its form; caching them changes no logit."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from made_models import close, make_sampler
from made_tokenizers import sentence_piece

from dataloader import CustomDataLoader, make_loader
from generate import GenerateConfig, ModelSampler, Question, main
from model import GPT
from models.families import load_decoder
from models.hub_tokenizer import HubTokenizer
from models.tokenizer import get_tokenizer, load_tokenizer
from tasks.demonstrations import Demonstrations, ShotsConfig, draw
from tasks.python_code import PythonCodesTask
from tasks.sentiment import SentimentTask

RECORDS = [{"text": f"film {i}", "label": int(i % 3 == 0)} for i in range(60)]


def label_of(record: dict) -> int:
    return record["label"]


@pytest.mark.parametrize("number", [1, 2, 5, 16])
def test_draws_are_balanced_and_grow(number: int) -> None:
    drawn = [draw(RECORDS, number, seed, label_of) for seed in range(20)]
    for each, seed in zip(drawn, range(20), strict=True):
        counts = Counter(map(label_of, each))
        assert max(counts.values()) - min(counts[0], counts[1]) <= 1
        assert each == draw(RECORDS, 40, seed, label_of)[:number]
        assert len({record["text"] for record in each}) == number
    assert len({json.dumps(each) for each in drawn}) > 15
    assert len({label_of(each[0]) for each in drawn}) == 2  # no label always comes first


def test_rare_label_gives_what_it_has() -> None:
    drawn = draw(RECORDS[:9], 9, 0, label_of)
    assert Counter(map(label_of, drawn)) == {1: 3, 0: 6}


def test_examples_have_the_form_of_the_prompt_with_its_answer(model: GPT, reviews: str) -> None:
    loader = make_sampler(model, reviews).loader
    loader.show(ShotsConfig(shots=2, shots_seed=3), [{"text": "dull"}], loader.answer_room)
    first, second = draw(loader.records("train"), 2, 3, label_of)
    text = loader.tokenizer.decode(loader.encode_prompt({"text": "dull"}))
    for order in ((first, second), (second, first)):
        shown = "\n\n".join(
            loader.task.prompt(each) + loader.task.answer(each) for each in order)
        if text == f"{shown}\n\n{loader.task.prompt({'text': 'dull'})}":
            return
    pytest.fail(text)


def test_seed_draws_the_examples_and_order_their_order(model: GPT, reviews: str) -> None:
    def shown(seed: int, order: int) -> list[tuple[str, str]]:
        loader = make_sampler(model, reviews, "{text}").loader
        loader.show(ShotsConfig(6, seed, order), [{"text": "dull"}], loader.answer_room)
        return loader.demonstrations.turns

    orders = [shown(0, order) for order in range(6)]
    assert len({str(each) for each in orders}) > 3
    assert all(sorted(each) == sorted(orders[0]) for each in orders)
    assert sorted(shown(1, 0)) != sorted(orders[0])
    assert shown(0, 0) == orders[0]


def test_balanced_training_set_is_what_a_prompt_shows(model: GPT, reviews: str) -> None:
    loader = make_sampler(model, reviews, "{text}").loader
    loader.show(ShotsConfig(6, 7), [{"text": "dull"}], loader.answer_room)
    few = CustomDataLoader(reviews, SentimentTask("{text}"), 128, 6, seed=7, balanced=True)
    assert sorted(prompt for prompt, _ in loader.demonstrations.turns) == sorted(
        record["text"] for record in few.records("train"))


@pytest.mark.parametrize("prompt", ["terse", "{text} Label:"])
@pytest.mark.parametrize("family", ["checkpoint", "llama"])
def test_prompt_with_examples_equals_the_same_text_without_the_shared_prefix(
    family: str, reviews: str, prompt: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    model = load_decoder(folder)
    question = Question(dataset=reviews, prompt=prompt, train_size=0, shots=3)
    loader = make_loader(question, model.config, load_tokenizer(folder))
    sampler = ModelSampler(model, loader)
    records = loader.records("test")
    loader.show(question, records, sampler.room)
    prompts = [loader.encode_prompt(record) for record in records]
    prefix = loader.prefix(prompts)
    assert len(prefix) >= len(loader.demonstrations.ids)
    past = model.eval().prefill(torch.tensor([prefix]))
    predictions = sampler.predict(records)
    for ids, prediction in zip(prompts, predictions, strict=True):
        plain = model(torch.tensor([ids]))[0][0, len(prefix) :]
        close(model(torch.tensor([ids[len(prefix) :]]), past=past)[0][0], plain)
        odds = plain[-1].log_softmax(-1)[sampler.choice_ids]
        close(torch.tensor(prediction.label_logprobs), odds)


def test_too_many_examples_are_refused_with_the_largest_number_that_fits(
    model: GPT, reviews: str
) -> None:
    loader = make_sampler(model, reviews).loader
    question = [loader.records("test")[0]]
    with pytest.raises(ValueError, match=r"shots=40 examples are too long: \d+ tokens are free "
                                         r"for them, and shots=(\d+) is the most that fits") as no:
        loader.show(ShotsConfig(40), question, loader.answer_room)
    most = int(str(no.value).split("shots=")[2].split()[0])
    assert most > 1
    with pytest.raises(ValueError, match=f"shots={most} is the most that fits"):
        loader.show(ShotsConfig(most + 1), question, loader.answer_room)
    loader.show(ShotsConfig(most), question, loader.answer_room)
    assert loader.texts_cut(question) == 0


def test_more_examples_than_there_are_and_prompts_with_reasons_are_refused(
    model: GPT, reviews: str
) -> None:
    for prompt, message in (("terse", "the training split has 48 examples"),
                            ("step_by_step", "the training examples give no reasons")):
        loader = make_sampler(model, reviews, prompt).loader
        with pytest.raises(ValueError, match=message):
            loader.show(ShotsConfig(49), [{"text": "dull"}], 8)


def test_answer_ends_where_another_example_would_begin(model: GPT) -> None:
    task, tokenizer = SentimentTask("terse"), get_tokenizer()
    said = " positive\n\nText: a second film"
    assert Demonstrations(task, tokenizer).cut(said) == said
    assert Demonstrations(task, tokenizer, RECORDS[:1]).cut(said) == " positive"
    assert Demonstrations(SentimentTask("chain_of_thought"), tokenizer).cut(said) == " positive"


def test_blank_line_in_code_ends_no_answer() -> None:
    record = {"question": "Print 1", "output": "print(1)\n\nprint(2)"}
    code = "\nprint(3)\n\nprint(4)"
    said = f"{code}\n\nInstruction: Answer with Python code.\nText: Print 5"
    assert Demonstrations(PythonCodesTask(), get_tokenizer(), [record]).cut(said) == code
    assert Demonstrations(PythonCodesTask("plain"), get_tokenizer(), [record]).cut(said) == said


@pytest.mark.parametrize("scheme", ["prepend", "first", "always"])
def test_tokenizers_that_begin_a_text_with_a_space_put_none_before_later_examples(
    scheme: str
) -> None:
    tokenizer = HubTokenizer(
        sentence_piece(scheme), {"bos_token": "<s>", "eos_token": "</s>"})
    task = SentimentTask("terse")
    shown = Demonstrations(task, tokenizer, RECORDS[:2])
    whole = "\n\n".join([*(task.prompt(each) + task.answer(each) for each in RECORDS[:2]),
                         task.prompt(RECORDS[2])])
    ids = shown.encode(task.prompt(RECORDS[2]))
    assert ids[: len(tokenizer.start)] == [*tokenizer.start]
    assert tokenizer.decode(ids[len(tokenizer.start) :]) == tokenizer.decode(
        tokenizer.encode_ordinary(whole))


def test_examples_are_earlier_messages_of_a_chat(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    task = SentimentTask("chat")
    shown = Demonstrations(task, tokenizer, [RECORDS[0]])
    question = task.prompt(RECORDS[1])
    ids = shown.encode(question)
    assert ids == tokenizer.encode_chat(task.prompt(RECORDS[0]), "positive", question)
    text = tokenizer.decode(ids)
    assert "film 0<|im_end|>\n<|im_start|>assistant\npositive<|im_end|>\n" in text
    assert text.index("film 0") < text.index("film 1")


def test_examples_of_the_split_that_is_scored_are_refused(checkpoint: str, tmp_path: Path) -> None:
    config = GenerateConfig(init_from=checkpoint, out_dir=str(tmp_path), split="train", shots=2)
    with pytest.raises(ValueError, match="shots=2 shows examples of split=train"):
        main(config)


def test_generate_scores_with_examples_under_a_name_of_their_own(
    checkpoint: str, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = GenerateConfig(init_from=checkpoint, out_dir=str(tmp_path), dataset=reviews,
                            device="cpu", dtype="float32", prompt="terse", shots=4, shots_seed=2,
                            calibrate=True)
    main(config)
    (path,) = tmp_path.glob("*/results*.json")
    assert path.stem.endswith("-shots4_seed2_order0-calibrated")
    results = json.loads(path.read_text())
    assert (results["shots"], results["shots_seed"], results["n"]) == (4, 2, 12)
    assert f"calibrated {results['calibrated_accuracy']:.4f}" in capsys.readouterr().out
    main(GenerateConfig(init_from=checkpoint, out_dir=str(tmp_path), dataset=reviews, shots=1,
                        device="cpu", text="a witty film", calibrate=True))
    assert "calibrated: " in capsys.readouterr().out
