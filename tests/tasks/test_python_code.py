"""Programming answers: no leak between splits, scores that one can compute by hand, nothing run."""

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

from models.tokenizer import get_tokenizer
from tasks import code_scores, python_code
from tasks.code_scores import (
    CodePrediction,
    bootstrap,
    corpus_scores,
    imported,
    parses,
    rouge_l,
    same,
    strip_fences,
    summarize,
)
from tasks.python_code import census, prepare, read_split, split_by_answer

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "validation", "test")


def row(instruction: str, output: str, context: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": context, "output": output,
            "text": f"{instruction} {context} {output}"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(path)


def said(generated: str, nats: float = 1.0, tokens: int = 1) -> CodePrediction:
    return CodePrediction(generated, 3, True, nats, tokens)


# --- splits ----------------------------------------------------------------------------------


FORMS = ("{}", " {} \n", "```python\n{}\n```", "```\n{}```", "```py\n{}\n```\n", "  {}  ")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(FORMS)), min_size=40))
def test_no_answer_is_in_two_splits(answers: list[tuple[int, str]]) -> None:
    """Whatever its white space and its fences, and however often it comes."""
    records = prepare([row(f"{i} {number}", form.format(f"print({number})"))
                       for i, (number, form) in enumerate(answers)], "rows")
    splits = split_by_answer(records)
    printed = [{record["question"].split()[1] for record in splits[split]} for split in SPLITS]
    assert sum(map(len, printed)) == len(set().union(*printed))
    assert sum(map(len, splits.values())) == len(answers)


def test_own_data_is_split_80_10_10_and_no_two_answers_are_alike() -> None:
    splits = {split: read_split("python_codes_mini", split) for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [202, 25, 25]
    whole = [strip_fences(record["output"]) for split in SPLITS for record in splits[split]]
    for one, other in itertools.combinations(whole, 2):
        pair = difflib.SequenceMatcher(None, one, other, autojunk=False)
        bounds = (pair.real_quick_ratio, pair.quick_ratio, pair.ratio)  # ever dearer and truer
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


def test_own_splits_are_kept_and_refused_where_they_leak(tmp_path: Path) -> None:
    for i, split in enumerate(SPLITS):
        write(tmp_path / f"{split}.jsonl", [row(split, f"print({i})")])
    assert read_split(str(tmp_path), "test")[0]["question"] == "test"
    python_code._splits.cache_clear()
    write(tmp_path / "test.jsonl", [row("leaks", "```python\nprint( 0 )\n```")])
    with pytest.raises(ValueError, match=r"the answer to 'leaks' is in train and in test; without"):
        read_split(str(tmp_path), "test")


@pytest.mark.parametrize("bad", [
    {"text": "a film", "label": 1}, {"instruction": "a", "input": "b"}, "a line", None,
    {"instruction": "a", "input": None, "output": "c"},
    {"instruction": 1, "input": "", "output": ""},
])
def test_other_rows_are_refused_by_number(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"file row 2 needs the texts instruction, input, output"):
        prepare([row("a", "b"), bad], "file")


def test_too_few_rows_leave_a_split_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the validation split is empty"):
        read_split(write(tmp_path / "few.jsonl", [row("a", "b")]), "train")


def test_text_that_holds_the_answer_is_dropped() -> None:
    records = [record for split in SPLITS for record in read_split("python_codes_mini", split)]
    assert {frozenset(record) for record in records} == {
        frozenset(("instruction", "input", "output", "question"))}


def test_question_has_the_input_only_where_there_is_one() -> None:
    with_input, without = prepare([row(" add ", "x", " 1 and 2\n"), row("add", "y", " ")], "")
    assert with_input["question"] == "add\nInput: 1 and 2"
    assert without["question"] == "add"


def test_own_data_is_large_varied_and_runs() -> None:
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
                assert not end.code, number
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
def test_code_is_what_stands_between_the_fences(answer: str, code: str) -> None:
    assert strip_fences(answer) == code


@pytest.mark.parametrize(("code", "expected"), [
    ("x = 1", True), ("def f():\n    return 1", True), ("def f(:", False), ("print 'two'", False),
    ("", False), ("# only a comment", False), ("x = '\\d'", True), ("\x00", False),
    ("(" * 5000, False), ("if True:\nx", False), ("\u00e9 = 1", True),
])
def test_code_parses_if_it_is_a_statement_at_least(code: str, expected: bool) -> None:
    assert parses(code) is expected


@settings(deadline=None)  # the first call imports the metrics
@given(st.text())
def test_any_text_is_judged_and_none_raises(text: str) -> None:
    assert parses(text) in (True, False)
    assert imported(text) is not None
    assert strip_fences(strip_fences(text)) is not None
    summarize(["x = 1"], [said(text)])


def test_generated_code_is_never_executed(tmp_path: Path) -> None:
    trap = f"import pathlib\npathlib.Path({str(tmp_path / 'run')!r}).touch()"
    results = summarize([trap], [said(f"```python\n{trap}\n```")])
    assert results["exact_match"] == results["parses"] == 1
    assert code_scores.tell(said(trap))[0] == trap
    assert code_scores.facts([trap])["imports"] == "pathlib 1"
    assert not (tmp_path / "run").exists()


def test_imports_are_the_modules_at_the_top() -> None:
    code = "import os.path, re as r\nfrom json import loads\nfrom . import a\ndef f():\n import io"
    assert imported(code) == {"os", "re", "json", "io"}


# --- scores ----------------------------------------------------------------------------------


def test_summary_of_a_worked_example() -> None:
    outputs = ["```python\na b c d\n```", "```python\nx = 1  \ny = 2\n```"]
    predictions = [CodePrediction("a c d e", 4, False, 6.0, 4),
                   CodePrediction("```python\nx = 1\ny = 2\n```\n", 12, True, 4.0, 16)]
    results = summarize(outputs, predictions)
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


def test_answers_of_which_some_share_nothing_have_an_interval() -> None:
    outputs = [f"x{i} = {i} + {i}" for i in range(6)]
    results = summarize(outputs, [said("x1 = 1 + 1"), *[said("§§")] * 5])
    low, high = results["interval_95"]["chrf"]
    assert 0 == low < results["chrf"] < high


def test_perfect_answers_get_full_marks() -> None:
    outputs = ["def f(x):\n    return x + 1", "print('a', 'b', 'c')\nprint(1)"]
    results = summarize(outputs, [said(output) for output in outputs])
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


def test_what_is_told_has_every_figure() -> None:
    results = summarize(["x = 1"], [said("x = 2", nats=2.0, tokens=2)])
    told = code_scores.describe(results)
    assert told.startswith("perplexity 2.72 (95 % interval 2.72 to 2.72, n=1), BLEU ")
    assert "exact 0.0%, 100.0% parse (of the right answers 100.0%), 3 tokens" in told
    assert list(code_scores.columns(results)) == [
        "perplexity", "95 % interval", "BLEU", "chrF", "ROUGE-L", "exact", "parse", "tokens"]
