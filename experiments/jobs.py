"""Run scripts as processes, several at a time; finished ones are skipped."""

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

from checkpoints.trainer_state import STATE_FILE
from configurator import ROOT
from runtime.run_folder import is_finished

ATTEMPT = "$ python"  # the log's line before the output of an attempt


class Job(NamedTuple):
    """A script with its settings and its folder.

    A training run is finished when its folder says so, any other script when a file matches the
    pattern `result`. With several `processes` torchrun starts it.
    """

    name: str
    script: str
    settings: Mapping[str, Any]
    folder: Path
    result: str = ""
    processes: int = 1

    @property
    def finished(self) -> bool:
        if self.script == "train.py":
            return is_finished(self.folder)
        return any(self.folder.glob(self.result))

    @property
    def interrupted(self) -> bool:
        return not self.finished and (self.folder / STATE_FILE).is_file()

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
        """One of: finished, interrupted, to do, or failed with its error."""
        if self.finished or self.interrupted:
            return "finished" if self.finished else "interrupted"
        return f"failed: {self.last_error}" if self.last_error else "to do"

    @property
    def last_error(self) -> str:
        """The error that its last attempt printed, or ""."""
        text = self.log.read_text("utf-8", "replace") if self.log.is_file() else ""
        attempt = text.rpartition(ATTEMPT)[2]
        lines = [line for line in attempt.splitlines() if line.startswith("error: ")
                 and "another process of this job" not in line]  # a consequence, not the cause
        return lines[-1].removeprefix("error: ") if lines else ""

    def tidy(self) -> None:
        """Delete the trainer's state, the largest file, once the run is finished."""
        if self.finished:
            (self.folder / STATE_FILE).unlink(missing_ok=True)

    def start(self, environment: Mapping[str, str]) -> subprocess.Popen:
        """Start or resume it in a new session, so that Ctrl-C reaches only the parent."""
        self.folder.mkdir(parents=True, exist_ok=True)
        resume = [self.script, "init_from=resume", f"out_dir={self.folder}"]
        arguments = resume if self.interrupted else self.arguments
        module = [] if self.processes == 1 else ["-m", "torch.distributed.run", *self.torchrun]
        passive = {"OMP_WAIT_POLICY": "passive"} if self.processes > 1 else {}
        with open(self.log, "a", encoding="utf-8") as log:
            print(ATTEMPT, shlex.join(arguments), file=log, flush=True)
            return subprocess.Popen(
                [sys.executable, *module, str(ROOT / arguments[0]), *arguments[1:]], stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, env={**passive, **os.environ, **environment},
                start_new_session=True,
            )

    def failure(self, code: int) -> str:
        """Return why its process ended with `code`, or "" if it succeeded."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if not code:
            return "" if self.finished else "it ended without its result"
        return self.last_error or f"exit code {code}, see {self.log}"


def run_jobs(jobs: Iterable[Job], at_once: int) -> Iterator[tuple[Job, str]]:
    """Run `jobs`, `at_once` in parallel; yield each as it ends, with its error or "".

    Closing the generator, or Ctrl-C, stops the running ones after they have saved their state.
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
            print("stopping; the runs save their state first", file=sys.stderr)
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
    """Return the variables that give one of `at_once` processes its threads and its GPU.

    Its OpenMP threads sleep while they wait: spinning ones would take the cores from other runs.
    """
    if at_once == 1:
        return {}
    threads = str(max(1, torch.get_num_threads() // at_once))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
             "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    return share | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})
