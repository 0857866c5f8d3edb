"""Scripts run as processes: some at a time, none twice, and each told from its folder."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from configurator import ROOT

STATE = "trainer_state.pt"
ATTEMPT = "$ python"  # stands in the log before what an attempt says


class Job(NamedTuple):
    """A script with its settings.

    It is finished when the file `result` (a pattern) holds the text `mark`. With several
    `processes` torchrun starts it.
    """

    name: str
    script: str
    settings: Mapping[str, Any]
    folder: Path
    result: str
    mark: str = ""
    processes: int = 1

    @property
    def finished(self) -> bool:
        return any(self.mark in path.read_text("utf-8") for path in self.folder.glob(self.result))

    @property
    def interrupted(self) -> bool:
        return not self.finished and (self.folder / STATE).is_file()

    @property
    def arguments(self) -> list[str]:
        settings = {**self.settings, "out_dir": self.folder}
        return [self.script, *(f"{name}={value}" for name, value in settings.items())]

    @property
    def command(self) -> str:
        launcher = ["python"] if self.processes == 1 else ["torchrun", *self.torchrun]
        return shlex.join([*launcher, *self.arguments])

    @property
    def torchrun(self) -> list[str]:
        return ["--standalone", f"--nproc_per_node={self.processes}"]

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def state(self) -> str:
        """Where it stands: finished, interrupted, to do, or what it said when it failed."""
        if self.finished or self.interrupted:
            return "finished" if self.finished else "interrupted"
        return f"failed: {self.last_words}" if self.last_words else "to do"

    @property
    def last_words(self) -> str:
        """The error with which its last attempt ended, if it said one."""
        said = self.log.read_text("utf-8", "replace") if self.log.is_file() else ""
        attempt = said.rpartition(ATTEMPT)[2]
        lines = [line for line in attempt.splitlines() if line.startswith("error: ")
                 and "another process of this job" not in line]  # that one said why
        return lines[-1].removeprefix("error: ") if lines else ""

    def tidy(self) -> None:
        """Delete what it takes to go on with a run, its largest file, once it is finished."""
        if self.finished:
            (self.folder / STATE).unlink(missing_ok=True)

    def start(self, environment: Mapping[str, str]) -> subprocess.Popen:
        """Start it, or go on with it, in a session of its own: Ctrl-C is the parent's to hear."""
        self.folder.mkdir(parents=True, exist_ok=True)
        resume = [self.script, "init_from=resume", f"out_dir={self.folder}"]
        arguments = resume if self.interrupted else self.arguments
        module = [] if self.processes == 1 else ["-m", "torch.distributed.run", *self.torchrun]
        with open(self.log, "a", encoding="utf-8") as log:
            print(ATTEMPT, shlex.join(arguments), file=log, flush=True)
            return subprocess.Popen(
                [sys.executable, *module, str(ROOT / arguments[0]), *arguments[1:]], stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **environment},
                start_new_session=True,
            )

    def failure(self, code: int) -> str:
        """Say why its process ended with `code`; "" if it ended well."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if not code:
            return "" if self.finished else "it ended without its result"
        return self.last_words or f"exit code {code}, see {self.log}"


def run_jobs(jobs: Iterable[Job], at_once: int) -> Iterator[tuple[Job, str]]:
    """Run `jobs`, so many at once; yield each as it ends, with what went wrong or "".

    Whoever closes the generator, or presses Ctrl-C, stops those that run; they save themselves
    first.
    """
    waiting, running = iter(jobs), {}
    try:
        while True:
            free = sorted(set(range(at_once)) - running.keys())
            for slot, job in zip(free, waiting, strict=False):
                running[slot] = job, job.start(share_of_machine(slot, at_once))
            if not running:
                return
            slot = next_to_end(running)
            job, process = running.pop(slot)
            error = job.failure(process.returncode)
            if not error:
                job.tidy()
            yield job, error
    finally:
        if running:
            print("stopping; the runs save themselves first", file=sys.stderr)
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def next_to_end(running: Mapping[int, tuple[Job, subprocess.Popen]]) -> int:
    """Wait until one of the processes has ended, and return its slot."""
    while True:
        for slot, (_, process) in running.items():
            if process.poll() is not None:
                return slot
        time.sleep(0.1)


def share_of_machine(slot: int, at_once: int) -> dict[str, str]:
    """Return the variables that give one of `at_once` processes its threads and its GPU."""
    if at_once == 1:
        return {}
    threads = str(max(1, torch.get_num_threads() // at_once))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    return share | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})
