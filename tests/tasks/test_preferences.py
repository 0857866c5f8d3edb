"""Preference pairs are read in all forms of trl's schema, and scored by their likelihoods."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dataloader import CustomDataLoader
from tasks import preferences, sources
from tasks.preferences import PreferencePrediction, PreferencesTask, read_pair
from tasks.registry import make_task
from tasks.scores import Completion

USER = {"role": "user", "content": "Name a film."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Alien.", "No."))
DIALOGUE = "\n\nHuman: Name a film.\n\nAssistant:"


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), [
    ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
     "The sky is", " blue.", " green."),
    ({"chosen": f"{DIALOGUE} Alien.", "rejected": f"{DIALOGUE} No."}, DIALOGUE, " Alien.", " No."),
    ({"chosen": f"{DIALOGUE} A.\n\nHuman: Why?\n\nAssistant: B.",
      "rejected": f"{DIALOGUE} A.\n\nHuman: Why?\n\nAssistant: C."},
     f"{DIALOGUE} A.\n\nHuman: Why?\n\nAssistant:", " B.", " C."),
    ({"chosen": f"{DIALOGUE} A.\n\nAssistant: B.", "rejected": f"{DIALOGUE} C."},
     DIALOGUE, " A.\n\nAssistant: B.", " C."),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, DIALOGUE, " Alien.", " No."),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, DIALOGUE, " Alien.", " No."),
    ({"prompt": "Name a film.", "chosen": [GOOD], "rejected": [BAD]}, DIALOGUE, " Alien.", " No."),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 7.5}, DIALOGUE, " Alien.",
     " No."),
    ({"chosen": [{"role": "system", "content": "Be kind."}, USER, GOOD, USER, GOOD],
      "rejected": [{"role": "system", "content": "Be kind."}, USER, GOOD, USER, BAD]},
     f"\n\nHuman: Be kind.{DIALOGUE} Alien.{DIALOGUE}", " Alien.", " No."),
])
def test_each_form_of_the_schema_is_read(
    row: dict[str, Any], prompt: str, chosen: str, rejected: str
) -> None:
    task, record = PreferencesTask(), read_pair(row, "here")
    assert task.prompt(record) == prompt
    assert task.answers_of(record) == [(chosen, True), (rejected, True)]


def test_chat_prompt_is_the_text_without_the_marks_of_the_speakers() -> None:
    record = read_pair({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "here")
    assert PreferencesTask("chat").prompt(record) == "Name a film."


@pytest.mark.parametrize(("row", "said"), [
    ("text", "here needs chosen and rejected"),
    ({"prompt": "x", "chosen": "y"}, "here needs chosen and rejected"),
    ({"prompt": "x", "chosen": "y", "rejected": [BAD]}, "here needs chosen and rejected"),
    ({"prompt": 3, "chosen": "y", "rejected": "z"}, "here needs a text as prompt"),
    ({"chosen": "y", "rejected": "z"}, "here needs a text as prompt, or two dialogues"),
    ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "here needs messages"),
    ({"prompt": [USER], "chosen": ["x"], "rejected": [BAD]}, "here needs messages"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "here needs messages"),
    ({"prompt": 3, "chosen": [GOOD], "rejected": [BAD]}, "here needs messages"),
    ({"chosen": [USER, GOOD], "rejected": [GOOD, BAD]}, "here needs two conversations"),
    ({"prompt": "x", "chosen": "y", "rejected": "z", "chosen_ended": 1}, "must be true or false"),
    ({"prompt": "x", "chosen": " ", "rejected": "z", "chosen_ended": False}, "here has an empty"),
    ({"prompt": " ", "chosen": "y", "rejected": "z"}, "here has an empty prompt"),
    ({"prompt": [USER], "chosen": [GOOD, USER, BAD], "rejected": [GOOD, USER, GOOD]}, "needs two"),
    ({"chosen": [USER, USER], "rejected": [USER, BAD]}, "needs messages of the assistant"),
])
def test_rows_of_other_forms_are_refused(row: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_pair(row, "here")


def test_cut_off_answers_have_no_end_of_text(pairs: str) -> None:
    loader = CustomDataLoader(pairs, PreferencesTask(), 128)
    eot = loader.tokenizer.eot_token
    ends = [[loader.encode(record, i).answer[-1] == eot for i in range(2)]
            for record in loader.records("train")[:4]]
    assert ends == [[True, True], [True, False], [True, True], [True, False]]
    assert loader.answers_cut == 0


def test_answer_is_cut_and_counted_where_it_does_not_fit(tmp_path: Path) -> None:
    rows = [{"prompt": "the film", "chosen": " good" * length, "rejected": " bad" * 90}
            for length in (2, 90)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loader = CustomDataLoader(str(tmp_path), PreferencesTask(), 40)
    assert [loader.encode(record).length for record in loader.records("train")] == [5, 40]
    assert loader.answers_cut == 1


def test_hub_data_without_validation_lends_every_twentieth_row(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = [{"chosen": [USER, GOOD], "rejected": [USER, BAD | {"content": str(i)}]}
                for i in range(41)]
    rows = {"train": numbered, "test": numbered[:1]}
    asked = []

    def read(dataset: str, split: str) -> list[dict]:
        asked.append((dataset, split))
        return rows[split]

    monkeypatch.setattr(preferences, "read_records", read)
    preferences._train_rows.cache_clear()
    task = make_task("preferences")
    assert [r["rejected"] for r in task.read("hh_rlhf", "validation")] == [" 0", " 20", " 40"]
    assert len(task.read("hh_rlhf", "train")) == 38
    assert len(task.read("hh_rlhf", "test")) == 1
    assert asked == [("hh_rlhf", "train"), ("hh_rlhf", "test")]
    preferences._train_rows.cache_clear()
    assert {"ultrafeedback", "hh_rlhf"} <= sources.HUB.keys()


def test_ranking_accuracy_compares_whole_answers() -> None:
    task = PreferencesTask()
    said = [task.judge(Completion(" a", 1, True, [], nats))
            for nats in ([(2.0, 4), (3.0, 1)], [(3.0, 2), (3.0, 1)], [(5.0, 2), (4.0, 8)])]
    results = task.summarize([{}] * 3, said)
    assert results["ranking_accuracy"] == pytest.approx(1 / 3)
    assert results["perplexity"] == pytest.approx(math.exp(10 / 8))
    assert results["rejected_perplexity"] == pytest.approx(math.exp(10 / 10))
    low, high = results["interval_95"]["ranking_accuracy"]
    assert 0 < low < 1 / 3 < high < 1
    assert said[0] == PreferencePrediction(" a", 1, True, 2.0, 4, 3.0, 1)
