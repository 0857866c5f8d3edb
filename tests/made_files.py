"""Rows with texts that are hard to store, and files of every form that hold rows."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

TEXTS = (
    "plain", "commas, commas,", 'she said "no"', "two\nlines", "other\r\nlines", "a\u2028b\x85c",
    "🎬 naïve שלום", "NA", "null", "", " padded\t", "1", "back\\slash",
    "x" * 200_000,  # csv's limit is 131,072
)
ROWS = [{"text": text, "label": place % 2} for place, text in enumerate(TEXTS)]


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
