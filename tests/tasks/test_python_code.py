"""Programming answers: splits without leaks, scores checked by hand, no code executed."""

import difflib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_models import loader_of

from models.tokenizer import get_tokenizer
from tasks import code_scores
from tasks.code_scores import (
    bootstrap,
    corpus_scores,
    imported,
    parses,
    rouge_l,
    same,
    strip_fences,
    summarize,
)
from tasks.python_code import PythonCodesTask, census, prepare, read_split, split_by_answer
from tasks.scores import Completion, TextPrediction

ROOT = Path(__file__).parents[2]
ENCODE = get_tokenizer().encode_ordinary
SPLITS = ("train", "validation", "test")


def row(instruction: str, output: str, context: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": context, "output": output,
            "text": f"{instruction} {context} {output}"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(path)


def predict(generated: str, nats: float = 1.0, tokens: int = 1) -> TextPrediction:
    return TextPrediction(generated, 3, True, nats, tokens)


# --- splits ----------------------------------------------------------------------------------


FORMS = ("{}", " {} \n", "```python\n{}\n```", "```\n{}```", "```py\n{}\n```\n", "  {}  ")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(FORMS)), min_size=40))
def test_no_answer_is_in_two_splits(answers: list[tuple[int, str]]) -> None:
    """Answers that differ only in white space and fences are equal."""
    records = prepare([row(f"{i} {number}", form.format(f"print({number})"))
                       for i, (number, form) in enumerate(answers)], "rows")
    splits = split_by_answer(records)
    printed = [{record["question"].split()[1] for record in splits[split]} for split in SPLITS]
    assert sum(map(len, printed)) == len(set().union(*printed))
    assert sum(map(len, splits.values())) == len(answers)


def test_bundled_data_is_split_80_10_10_and_no_two_answers_are_similar() -> None:
    splits = {split: read_split("python_codes_mini", split) for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [202, 25, 25]
    whole = [strip_fences(record["output"]) for split in SPLITS for record in splits[split]]
    for one, other in itertools.combinations(whole, 2):
        pair = difflib.SequenceMatcher(None, one, other, autojunk=False)
        bounds = (pair.real_quick_ratio, pair.quick_ratio, pair.ratio)  # slower, but closer
        assert any(bound() < 0.8 for bound in bounds), (one, other)


def test_split_is_the_same_in_another_process() -> None:
    code = ("from tasks.python_code import read_split; "
            "print([r['question'] for r in read_split('python_codes_mini', 'test')])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={"PYTHONHASHSEED": "1"})
    mine = [record["question"] for record in read_split("python_codes_mini", "test")]
    assert done.stdout == f"{mine}\n", done.stderr


def test_rows_stored_twice_count_once(tmp_path: Path) -> None:
    rows = [row(f"question {i}", f"print({i})") for i in range(20)]
    dataset = write(tmp_path / "twice.jsonl", [*rows, row("", "x = 1"), row("no code", " "), *rows])
    assert census(dataset) == {"rows": 42, "without instruction or answer": 2, "duplicates": 20,
                               "kept": 20, "different answers": 20}
    assert [len(read_split(dataset, split)) for split in SPLITS] == [16, 2, 2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file of one row for each split."""
    for i, split in enumerate(SPLITS):
        write(tmp_path / f"{split}.jsonl", [row(split, f"print({i})")])
    return tmp_path


def test_split_files_keep_their_rows(folder: Path) -> None:
    for split in SPLITS:
        assert [record["question"] for record in read_split(str(folder), split)] == [split]


def test_data_edited_in_place_is_read_again(folder: Path) -> None:
    assert read_split(str(folder), "test")[0]["question"] == "test"
    write(folder / "test.jsonl", [row("edited", "print(9)")])
    assert read_split(str(folder), "test")[0]["question"] == "edited"


def test_training_rows_with_a_held_out_answer_are_left_out_and_counted(folder: Path) -> None:
    write(folder / "train.jsonl", [row("a", "print(0)"), row("b", "print(3)")])
    write(folder / "test.jsonl", [row("leaks", "```python\nprint( 0 )\n```")])
    assert [record["instruction"] for record in read_split(str(folder), "train")] == ["b"]
    assert [record["instruction"] for record in read_split(str(folder), "test")] == ["leaks"]
    assert PythonCodesTask().left_out(str(folder)) == 1
    notes = loader_of(str(folder)).notes()
    assert "1 records of train are left out: their answer is in validation or test" in notes


@pytest.mark.parametrize("bad", [
    {"text": "a film", "label": 1}, {"instruction": "a", "input": "b"}, "a line", None,
    {"instruction": "a", "input": None, "output": "c"},
    {"instruction": 1, "input": "", "output": ""},
])
def test_other_rows_are_refused_by_number(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"file row 2 needs the texts instruction, input, output"):
        prepare([row("a", "b"), bad], "file")


def test_too_few_rows_for_three_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the validation split is empty"):
        read_split(write(tmp_path / "few.jsonl", [row("a", "b")]), "train")


def test_field_text_is_dropped_because_it_holds_the_answer() -> None:
    records = [record for split in SPLITS for record in read_split("python_codes_mini", split)]
    assert {frozenset(record) for record in records} == {
        frozenset(("instruction", "input", "output", "question"))}


def test_question_has_the_input_only_where_there_is_one() -> None:
    with_input, without = prepare([row(" add ", "x", " 1 and 2\n"), row("add", "y", " ")], "")
    assert with_input["question"] == "add\nInput: 1 and 2"
    assert without["question"] == "add"


def test_bundled_data_is_large_and_varied_and_its_code_runs() -> None:
    path = ROOT / "assets" / "python-codes-mini" / "python_codes.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(rows) >= 200
    for field in ("instruction", "output"):
        assert len({row[field] for row in rows}) == len(rows)
    assert sum(bool(row["input"]) for row in rows) > 50
    assert all(row["text"].endswith(row["output"]) for row in rows)
    assert len(set().union(*(imported(strip_fences(row["output"])) for row in rows))) > 40
    runner = """if True:
        import contextlib, io, json, sys
        for number, line in enumerate(open(sys.argv[1], encoding="utf-8"), 1):
            code = json.loads(line)["output"].removeprefix("```python\\n").removesuffix("```")
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(code, f"row {number}", "exec"), {"__name__": "__main__"})
            except SystemExit as end:  # as of unittest.main()
                assert end.code in (0, None, False, 5), number  # 5 since 3.12: it found no test
            except Exception as error:
                print(number, repr(error))
        print("done")
    """
    done = subprocess.run([sys.executable, "-c", runner, str(path)], capture_output=True,
                          text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


# --- one answer ------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "code"), [
    ("```python\nx = 1\n```", "x = 1"), ("\n```python\nx = 1\n", "x = 1"), ("x = 1\n", "x = 1"),
    ("Sure:\n```py\nx = 1\n\ny = 2\n```\nIt adds.", "x = 1\n\ny = 2"),
    ("```\nx = 1\n```\nthen\n```python\ny = 2\n```", "x = 1\ny = 2"),
    ("x = '```'", "x = '```'"), ("", ""), ("```python", "```python"),
    ("1. Do:\n   ```python\n   x = 1\n   y = 2\n   ```", "x = 1\ny = 2"),
    ("```python\nx = '```'\n```", "x = '```'"), ("```python\nprint(1)```", "print(1)"),
    ("Use ```python\nx = 1\n```\nDone.", "x = 1"), ("\nx = 1\n```", "x = 1"),
    ("    x = 1\n```\n", "    x = 1"),
])
def test_code_is_taken_from_between_the_fences(answer: str, code: str) -> None:
    assert strip_fences(answer) == code


@pytest.mark.parametrize(("code", "expected"), [
    ("x = 1", True), ("def f():\n    return 1", True), ("def f(:", False), ("print 'two'", False),
    ("", False), ("# only a comment", False), ("x = '\\d'", True), ("\x00", False),
    ("(" * 5000, False), ("if True:\nx", False), ("\u00e9 = 1", True),
])
def test_code_parses_if_it_holds_a_statement(code: str, expected: bool) -> None:
    assert parses(code) is expected


@settings(deadline=None)  # the first call imports the metrics
@given(st.text())
def test_any_text_has_a_score(text: str) -> None:
    code = strip_fences(text)
    assert all(line.strip() in text for line in code.splitlines())
    assert parses(text) or not imported(text)
    results = summarize(["x = 1"], [predict(text)], ENCODE)
    assert results["parses"] == parses(code)
    assert 0 <= results["rouge_l"] <= 1
    assert 0 <= results["bleu"] <= 100 + 1e-9
    assert 0 <= results["chrf"] <= 100 + 1e-9


def test_generated_code_is_never_executed(tmp_path: Path) -> None:
    trap = f"import pathlib\npathlib.Path({str(tmp_path / 'run')!r}).touch()"
    results = summarize([trap], [predict(f"```python\n{trap}\n```")], ENCODE)
    assert results["exact_match"] == results["parses"] == 1
    assert code_scores.tell(predict(trap))[0] == trap
    assert code_scores.facts([trap])["imports"] == "pathlib 1"
    assert not (tmp_path / "run").exists()


def test_imports_are_top_level_modules() -> None:
    code = "import os.path, re as r\nfrom json import loads\nfrom . import a\ndef f():\n import io"
    assert imported(code) == {"os", "re", "json", "io"}


# --- scores ----------------------------------------------------------------------------------


def test_summary_of_a_worked_example() -> None:
    outputs = ["```python\na b c d\n```", "```python\nx = 1  \ny = 2\n```"]
    predictions = [TextPrediction("a c d e", 4, False, 6.0, 4),
                   TextPrediction("```python\nx = 1\ny = 2\n```\n", 12, True, 4.0, 16)]
    results = summarize(outputs, predictions, ENCODE)
    assert results["n"] == 2
    assert results["loss"] == 10 / 20  # all nats over all tokens, not the mean of two means
    assert results["perplexity"] == pytest.approx(math.exp(0.5))
    assert results["exact_match"] == results["parses"] == results["ended"] == 0.5
    assert results["references_parse"] == 0.5
    lengths = [len(get_tokenizer().encode_ordinary(output)) for output in outputs]
    assert (results["tokens"], results["reference_tokens"]) == (8, sum(lengths) / 2)
    assert results["rouge_l"] == pytest.approx((0.75 + 1) / 2)
    for name, (low, high) in results["interval_95"].items():
        assert low <= results[name] <= high
    json.dumps(results)


def test_longest_common_subsequence_by_hand() -> None:
    assert rouge_l(["a b c d"], ["a c d e"]) == [0.75]  # a c d: 3 of 4 and 3 of 4
    assert rouge_l(["a b c d", "a"], ["a b", "b"]) == [pytest.approx(2 * 1 * 0.5 / 1.5), 0]


def test_bleu_and_chrf_by_hand() -> None:
    """One word of six differs: 5/6, 4/5, 3/4 and 2/3 of the n-grams are right."""
    (bleu, _), _ = corpus_scores(["a b c d e g"], ["a b c d e f"]).values()
    assert bleu == pytest.approx(100 * (1 / 3) ** 0.25)
    # Of "abc" in "abd" 2/3 of the letters, 1/2 of the pairs, none of the triples: precision and
    # recall are alike, so that their weighted mean is their mean over the orders.
    _, (chrf, _) = corpus_scores(["abd"], ["abc"]).values()
    assert chrf == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_interval_covers_answers_that_share_nothing_with_the_right_ones() -> None:
    outputs = [f"x{i} = {i} + {i}" for i in range(6)]
    results = summarize(outputs, [predict("x1 = 1 + 1"), *[predict("§§")] * 5], ENCODE)
    low, high = results["interval_95"]["chrf"]
    assert 0 == low < results["chrf"] < high


def test_perfect_answers_get_full_marks() -> None:
    outputs = ["def f(x):\n    return x + 1", "print('a', 'b', 'c')\nprint(1)"]
    results = summarize(outputs, [predict(output) for output in outputs], ENCODE)
    assert results["bleu"] == pytest.approx(100)
    assert results["chrf"] == pytest.approx(100)
    assert results["rouge_l"] == results["exact_match"] == results["parses"] == 1
    assert results["interval_95"]["bleu"] == pytest.approx((100, 100))


@pytest.mark.parametrize(("code", "other", "alike"), [
    ("x = 1", "x = 1 ", True), ("x = 1\n", "\nx = 1", True), ("x = 1", "x=1", False),
    ("if a:\n    b", "if a:\n  b", False), ("    a\n    b", "a\n    b", False),
])
def test_exact_match_forgives_white_space_at_the_ends_alone(
    code: str, other: str, alike: bool
) -> None:
    assert same(code, other) is alike


def test_bootstrap_covers_the_mean_as_the_normal_approximation_does() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=400)
    low, high = bootstrap(400, lambda chosen: values[chosen].mean(-1))
    spread = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - spread, abs=0.1 * spread)
    assert high == pytest.approx(values.mean() + spread, abs=0.1 * spread)
    assert bootstrap(7, lambda chosen: np.ones(len(chosen))) == (1, 1)


def test_line_and_table_show_every_score() -> None:
    results = summarize(["x = 1"], [predict("x = 2", nats=2.0, tokens=2)], ENCODE)
    line = code_scores.describe(results)
    assert line.startswith("perplexity 2.72 (95 % interval 2.72 to 2.72, n=1), BLEU ")
    assert "exact 0.0%, 100.0% parse (of the right answers 100.0%), 3 tokens" in line
    assert list(code_scores.columns(results)) == [
        "perplexity", "95 % interval", "BLEU", "chrF", "ROUGE-L", "exact", "parse", "tokens"]


def test_prediction_keeps_the_completion_and_the_report_strips_its_fences() -> None:
    task = PythonCodesTask()
    completion = Completion("```python\nx = 1\n```", 7, True, [], [(2.0, 4)])
    assert task.judge(completion) == TextPrediction(completion.text, 7, True, 2.0, 4)
    assert task.display(completion.text) == "x = 1"


def test_report_describes_the_right_answers() -> None:
    results = {"n": 25, "references_parse": 0.96, "reference_tokens": 109.4}
    assert PythonCodesTask().explain_references(results).startswith(
        "Of the 25 right answers 96.0% parse; they have 109 tokens on average.")
