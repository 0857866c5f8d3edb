"""Word problems: their answers are right, and so is how numbers are read."""

import json
import re

import pytest

from tasks.arithmetic import ArithmeticTask, read_number
from tasks.registry import make_task
from tasks.scores import Completion
from tasks.sources import read_records

EQUATION = re.compile(r"([\d.]+) ([-+×/]) ([\d.]+) = ([\d.]*\d)")
COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b,
           "×": lambda a, b: a * b, "/": lambda a, b: a / b}


@pytest.mark.parametrize(("split", "number"), [("train", 8), ("test", 30)])
def test_every_equation_of_the_problems_holds_and_the_last_gives_the_answer(
    split: str, number: int
) -> None:
    rows = ArithmeticTask().read("arithmetic", split)
    assert len({row["text"] for row in rows}) == number
    for row in rows:
        found = EQUATION.findall(row["reason"])
        assert found, row
        for left, sign, right, result in found:
            assert COMPUTE[sign](float(left), float(right)) == pytest.approx(float(result)), row
        assert float(found[-1][-1]) == row["answer"]


def test_no_problem_is_both_shown_and_asked() -> None:
    assert not ({row["text"] for row in read_records("arithmetic", "train")}
                & {row["text"] for row in read_records("arithmetic", "test")})


@pytest.mark.parametrize(("answer", "number"), [
    (" 62.", 62), (" $1,080", 1080), ("3 × 4 = 12 dollars", 12), ("-3.5 degrees", -3.5),
    ("\n72\n73", 72), (" nothing", None), ("", None), ("12,5", 5), (".5", 0.5), ("1.", 1),
    ("12,3456", 3456), ("5-6 dollars", 6), ("\u22124", -4), ("2.50.", 2.5), ("$-3", -3)])
def test_last_number_of_the_first_line_with_one_counts(answer: str, number: float | None) -> None:
    assert read_number(answer) == number


def test_accuracy_counts_numbers_that_are_right() -> None:
    task = make_task("arithmetic")
    rows = [{"text": "a", "answer": answer} for answer in (3, "1,000", 5)]
    said = [task.judge(Completion(text, 1, True, [])) for text in (" 3.0", "1000", "five")]
    results = task.summarize(rows, said)
    assert (results["accuracy"], results["numbers"], results["n"]) == (2 / 3, 2 / 3, 3)
    assert task.describe(results) == (
        "66.7% right (95 % interval 0.208 to 0.939, n=3), 66.7% with a number")
    assert task.tell(said[2]) == ["answer: 'five'", "number: None"]


@pytest.mark.parametrize("row", [{"text": "a"}, {"text": 1, "answer": 2},
                                 {"text": "a", "answer": "12 / 2 = 6"},
                                 {"text": "a", "answer": "inf"}, ["a"]])
def test_row_without_a_number_is_refused(row: object, tmp_path: pytest.TempPathFactory) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="test row 1 needs the field text, and a number"):
        ArithmeticTask().read(str(tmp_path), "test")
