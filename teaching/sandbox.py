"""Start the worker that runs submissions, and ask it for observations."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from configurator import ROOT


class Seen(NamedTuple):
    """What a probe saw of a submission, or why it saw nothing."""

    value: dict | None = None
    error: str = ""


class Limits(NamedTuple):
    """What a submission may use: seconds of a test and of all, and memory beside torch's own."""

    seconds: float = 20
    total_seconds: float = 120
    memory_mib: int = 1024


class Sandbox:
    """A worker process, which has torch imported and forks a limited child per submission."""

    def __init__(self, limits: Limits, preload: Mapping[str, Sequence[str]]) -> None:
        self.limits = limits
        # Nothing of the environment but what Python needs: no key or token reaches a submission.
        kept = ("PATH", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                        "OMP_WAIT_POLICY": "passive", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "teaching.worker"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._write(preload)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _write(self, value: object) -> None:
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def observe(self, folder: Path, probes: Sequence[str]) -> tuple[dict[str, Seen], list[str]]:
        """Return what each of `probes` sees of the code in `folder`, and which protection holds.

        Raises OSError if the worker is gone.
        """
        with tempfile.TemporaryDirectory() as scratch:
            try:
                self._write({
                    "token": secrets.token_hex(16), "folder": str(folder), "scratch": scratch,
                    "hidden": hidden_paths(folder), "probes": list(probes),
                    **self.limits._asdict()})
                answer = json.loads(self.process.stdout.readline())
            except (ValueError, BrokenPipeError):
                raise OSError("the worker that runs submissions has ended") from None
        found = {name: Seen(seen.get("value"), seen.get("error", ""))
                 for name, seen in answer["found"].items()}
        return found, answer["holds"]


def hidden_paths(*needed: Path) -> list[str]:
    """Return the files and folders of the solution, but for what holds Python or `needed`."""
    kept = [Path(sys.prefix), Path(sys.base_prefix), *(path.resolve() for path in needed)]
    return [str(path) for path in sorted(ROOT.iterdir()) if path.name != "__pycache__"
            and not any(each.is_relative_to(path.resolve()) for each in kept)]
