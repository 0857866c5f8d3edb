"""Checkpoints load from the hub and its cache; a hub in trouble gives one clear error."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from made_models import TINY
from transformers import GPT2Config, GPT2LMHeadModel

from checkpoints.files import read_json, write_json
from checkpoints.hub_format import CONFIG, PICKLE, WEIGHTS

ROOT = Path(__file__).parents[2]
IDX = torch.arange(12).view(2, 6)

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

LOADER = """
import json, sys, time
import torch
from model import GPT

time.sleep = lambda seconds: None  # the hub's client waits 23 s in all between its attempts
for name in sys.argv[1:]:
    try:
        answer = GPT.from_pretrained(name).eval()(torch.arange(12).view(2, 6))[0].tolist()
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer))
"""


class HubHandler(BaseHTTPRequestHandler):
    """Serve `/gpt2/resolve/main/config.json` as the hub does; other repositories fail."""

    def do_HEAD(self) -> None:
        self.server.requests.append(self.path)
        _, repository, *_, file = self.path.split("/")
        path = self.server.folder / repository / file
        if repository == "dropped":
            return
        if repository == "slow":
            self.server.closing.wait()
            return
        status = 401 if repository == "private" else 200 if path.is_file() else 404
        content = path.read_bytes() if status == 200 else b""
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{repository}-{file}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: 100 if repository in self.server.cut else None])

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


class Hub(ThreadingHTTPServer):
    """A local hub that serves the checkpoints in `folder`; its clients share one cache."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder, self.requests, self.cut = folder, [], {"cut", "half"}
        self.closing = threading.Event()
        self.reference = GPT2LMHeadModel(GPT2Config(
            vocab_size=TINY.vocab_size, n_positions=TINY.block_size, n_layer=TINY.n_layer,
            n_head=TINY.n_head, n_embd=TINY.n_embd)).eval()
        self.reference.save_pretrained(folder / "gpt2")
        self.reference.save_pretrained(folder / "sharded", max_shard_size="20KB")
        for name in ("weightless", "pickled", "cut", "slow"):
            write_json(folder / name / CONFIG, read_json(folder / "gpt2" / CONFIG))
        torch.save(self.reference.state_dict(), folder / "pickled" / PICKLE)
        shutil.copytree(folder / "gpt2", folder / "half")

    def ask(self, *names: str, port: int | None = None, offline: str = "0") -> dict[str, Any]:
        """Load `names` in a new process; return the logits or the error of each."""
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{port or self.server_port}", "NO_PROXY": "127.0.0.1",
            "HF_HOME": str(self.folder / "home"), "HF_HUB_CACHE": str(self.folder / "home/hub"),
            "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        }
        loaded = subprocess.run(
            [sys.executable, "-c", LOADER, *names], env=os.environ | settings, cwd=ROOT,
            stdout=subprocess.PIPE, text=True, check=True,
        )
        return dict(zip(names, map(json.loads, loaded.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.closing.set()
        hub.shutdown()


@pytest.fixture(scope="module")
def answers(hub: Hub) -> dict[str, Any]:
    return hub.ask("gpt2", "sharded", "weightless", "pickled", "private", "dropped", "cut", "slow")


def assert_one_line(answer: Any, name: str, file: str, reason: str) -> None:
    line = f"{name!r} is no folder here and the hub did not give its {file}: .*{reason}.*"
    assert re.fullmatch("(OSError|FileNotFoundError): " + line, answer), answer


def test_checkpoint_of_the_hub_loads(hub: Hub, answers: dict[str, Any]) -> None:
    close(torch.tensor(answers["gpt2"]), hub.reference(IDX).logits)


@pytest.mark.parametrize("name", ["sharded", "pickled"])
def test_other_files_of_the_hub_load(hub: Hub, answers: dict[str, Any], name: str) -> None:
    close(torch.tensor(answers[name]), hub.reference(IDX).logits)


@pytest.mark.parametrize(
    ("name", "file", "reason"),
    [("weightless", WEIGHTS, "404"), ("private", CONFIG, "401"),
     ("dropped", CONFIG, r"\w"), ("cut", CONFIG, r"\w"), ("slow", CONFIG, "[Tt]imed? ?out")],
)
def test_failure_of_the_hub_is_one_clear_line(
    answers: dict[str, Any], name: str, file: str, reason: str
) -> None:
    assert_one_line(answers[name], name, file, reason)


def test_incomplete_download_is_not_used_but_repeated(hub: Hub) -> None:
    assert_one_line(hub.ask("half")["half"], "half", CONFIG, r"\w")
    hub.cut.remove("half")
    close(torch.tensor(hub.ask("half")["half"]), hub.reference(IDX).logits)


def test_cached_checkpoint_loads_without_the_hub(hub: Hub, answers: dict[str, Any]) -> None:
    assert isinstance(answers["gpt2"], list)  # it loaded and is cached
    with socket.socket() as closed:  # bound but not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        answers = hub.ask("gpt2", "sharded", "distilgpt2", port=closed.getsockname()[1])
    close(torch.tensor(answers["gpt2"]), hub.reference(IDX).logits)
    close(torch.tensor(answers["sharded"]), hub.reference(IDX).logits)
    assert_one_line(answers["distilgpt2"], "distilgpt2", CONFIG, "[Cc]onnection")


def test_uncached_checkpoint_offline_is_one_clear_line_without_a_request(hub: Hub) -> None:
    hub.requests.clear()
    answers = hub.ask("gpt2-xl", offline="1")
    assert_one_line(answers["gpt2-xl"], "gpt2-xl", CONFIG, "(local cache|offline mode)")
    assert hub.requests == []
