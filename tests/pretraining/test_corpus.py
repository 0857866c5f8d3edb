"""The pretraining corpus: whole reviews, pieces with the right verdict, rows that cover all."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints.layouts import END_OF_TEXT
from models.tokenizer import get_tokenizer
from pretraining.corpus import (
    VERDICTS,
    Document,
    Windows,
    documents,
    pieces,
    read_reviews,
    spaced,
    tokenize,
)
from tasks.sentiment import PROMPTS

REVIEW = "A dull film. " + "It never ends, and nobody in it seems to care. " * 6 + "Skip it!"


def write_imdb(folder: Path, rows: dict[str, list[dict]]) -> str:
    for split, records in rows.items():
        lines = "\n".join(json.dumps(record) for record in records)
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")
    return str(folder)


def test_spaced_text_looks_like_an_old_review_corpus() -> None:
    assert spaced('It\'s  "Conan" (1982), again.') == 'it\'s " conan " ( 1982 ) , again .'


def test_joined_pieces_are_the_review() -> None:
    for seed in range(20):
        cut = list(pieces(REVIEW, random.Random(seed)))
        assert " ".join(cut) == REVIEW
        assert all(len(piece.split()) >= 8 for piece in cut[:-1])


def test_unlabelled_reviews_stay_whole_and_appear_once() -> None:
    reviews = [{"text": f"Film {i}.<br /><br />Good  fun.", "label": -1} for i in range(40)]
    made = documents(reviews, passes=3, seed=0)
    assert sorted(document.text.lower().replace(" .", ".") for document in made) == sorted(
        f"film {i}. good fun." for i in range(40))
    assert {document[1:] for document in made} == {("", "")}
    assert len({document.text.islower() for document in made}) == 2  # some spaced, some not


@pytest.mark.parametrize("label", [0, 1])
def test_pieces_of_labelled_reviews_get_its_verdict(label: int) -> None:
    once, twice = (documents([{"text": REVIEW, "label": label}] * 30, n, seed=1) for n in (1, 2))
    assert {document[1:] for document in once} == {
        (question, answers[label]) for question, answers in VERDICTS}
    assert 1.8 < len(twice) / len(once) < 2.2


def test_corpus_depends_only_on_the_seed() -> None:
    reviews = [{"text": REVIEW, "label": i % 2} for i in range(5)]
    first = documents(reviews, 1, seed=1)
    random.seed(7)  # the global generator does not matter
    assert documents(reviews, 1, seed=1) == first
    assert documents(reviews, 1, seed=2) != first


def test_verdicts_have_neither_the_form_nor_the_labels_of_our_prompts() -> None:
    words = " ".join(question + " ".join(answers) for question, answers in VERDICTS).lower()
    assert not {"label", "instruction", "text", "positive", "negative", "sentiment"} & set(
        words.replace(":", " ").split())
    assert not any(question.strip() in prompt for question, _ in VERDICTS for prompt in
                   PROMPTS.values())


def test_the_first_token_of_an_answer_decides_and_is_marked() -> None:
    tokenizer = get_tokenizer()
    made = [Document("fine .", *(question, answer)) for question, answers in VERDICTS
            for answer in answers] + [Document("just text")]
    tokens, verdicts = tokenize(made)
    assert tokens.dtype == np.uint16
    assert verdicts.dtype == bool
    assert (tokens == END_OF_TEXT).sum() == len(made)
    assert tokens[-1] == END_OF_TEXT
    firsts = [tokenizer.encode_ordinary(document.answer)[0] for document in made[:-1]]
    assert tokens[verdicts].tolist() == firsts
    assert all(len({firsts[i], firsts[i + 1]}) == 2 for i in range(0, len(firsts), 2))
    assert tokenizer.decode(tokens.tolist()) == "".join(
        "".join(document) + "<|endoftext|>" for document in made)


def test_documents_are_tokenized_alike_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = documents([{"text": REVIEW, "label": i % 2} for i in range(5)], 1, seed=0)
    whole = tokenize(made)
    monkeypatch.setattr("pretraining.corpus.CHUNK", 3)
    for chunked, expected in zip(tokenize(made), whole, strict=True):
        np.testing.assert_array_equal(chunked, expected)


def test_each_epoch_visits_every_row_once_in_a_new_order() -> None:
    stream = np.arange(101, dtype=np.uint16), np.arange(101) % 7 == 0
    rows = Windows(stream, length=10, seed=3)
    epochs = [torch.cat([rows.batch(i, 5)[0] for i in (e, e + 1)]) for e in (0, 2)]
    for seen in epochs:
        torch.testing.assert_close(seen.sort(dim=0).values, rows.take(range(10))[0])
    assert not torch.equal(*epochs)
    tokens, verdicts = rows.batch(0, 5)
    assert tokens.shape == (5, 11)
    assert verdicts.shape == (5, 10)
    torch.testing.assert_close(verdicts, tokens[:, 1:] % 7 == 0)
    torch.testing.assert_close(rows.batch(3, 4)[0], Windows(stream, 10, 3).batch(3, 4)[0])


def test_text_that_fills_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens of text do not fill a row of 10"):
        Windows((np.arange(10), np.zeros(10)), length=10, seed=0)


def test_reviews_appear_once_in_a_fixed_order_and_a_hundredth_is_held_out(
    tmp_path: Path,
) -> None:
    rows = [{"text": f"review {i:03}", "label": i % 3 - 1} for i in range(250)]
    mixed = random.Random(0).sample(rows, 250)
    folders = []
    for name, order in (("a", rows), ("b", mixed)):
        (tmp_path / name).mkdir()
        splits = {"train": order[:100], "test": order[100:], "unsupervised": order[:60]}
        folders.append(read_reviews(write_imdb(tmp_path / name, splits)))
    assert folders[0] == folders[1]
    assert [review["text"][-3:] for review in folders[0][1]] == ["000", "100", "200"]
    assert len(folders[0][0]) == 247


@pytest.mark.parametrize("row", [
    {"text": "x", "label": 2}, {"text": 3, "label": 1}, {"label": 0}, ["x", 1], "x", None,
    {"text": "x", "label": True}, {"text": "x", "label": 0.5}])
def test_invalid_row_is_refused_by_number(row: dict, tmp_path: Path) -> None:
    fine = {"text": "a", "label": 1}
    data = write_imdb(tmp_path, {"train": [fine], "test": [fine, row], "unsupervised": []})
    with pytest.raises(ValueError, match=r"test row 2 needs a text and a label of 0, 1"):
        read_reviews(data)


@pytest.mark.parametrize("data", ["movie_reviews", "rotten_tomatoes", "", "no/such/folder"])
def test_other_sources_are_refused(data: str) -> None:
    with pytest.raises(ValueError, match=r"must be imdb \(from the hub\) or a folder with"):
        read_reviews(data)


@pytest.mark.parametrize("label", ["-1", "-1.0"])
def test_labels_may_be_text_as_in_csv_files(label: str, tmp_path: Path) -> None:
    for split in ("train", "test", "unsupervised"):
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{split},{label}\n", "utf-8")
    train, held_out = read_reviews(str(tmp_path))
    assert [review["label"] for review in train + held_out] == [-1, -1, -1]


def test_a_single_text_is_refused_because_one_is_held_out(tmp_path: Path) -> None:
    data = write_imdb(tmp_path, {split: [{"text": "a", "label": 1}]
                                 for split in ("train", "test", "unsupervised")})
    with pytest.raises(ValueError, match="needs two different texts or more: one is held out"):
        read_reviews(data)


def test_million_spaces_in_a_review_are_no_trouble() -> None:
    tokens, _ = tokenize([Document("a film" + " " * 1_000_001 + "x")])
    assert tokens[-1] == END_OF_TEXT
    assert len(tokens) > 1_000_000
