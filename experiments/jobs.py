"""Run scripts as processes, several at a time; finished ones are skipped."""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints.trainer_state import STATE_FILE
from configurator import ROOT
from experiments.escaping import in_words, one_line
from experiments.finished_runs import (
    UNREADABLE,
    Scores,
    changed_sources,
    load_run,
    load_scores,
    load_started,
    other_settings,
)
from generate import GenerateConfig
from methods.build import GPT2_TARGETS
from runtime.run_folder import FINISHED_FILE, FREE_SETTINGS, is_finished
from tasks.registry import make_task
from train import TrainConfig

ATTEMPT = "$ python"  # the log's line before the output of an attempt
# What a job's folder may hold. A job repeats what is to do again, but replaces no other run.
TO_DO, INTERRUPTED, FINISHED = "to do", "interrupted", "finished"
AGAIN, OTHER = "to do again", "holds another run"
Started = subprocess.Popen | str  # the process of a job, or the error that kept it from starting


# The settings that named a run's folder when every setting did, defaults too.
FIRST_SETTINGS = {
    "backend", "batch_size", "beta1", "beta2", "block_size", "compile", "dataset", "decay_lr",
    "device", "dropout", "dtype", "eval_batch_size", "eval_interval", "eval_iters", "eval_only",
    "grad_clip", "gradient_accumulation_steps", "init_from", "learning_rate", "limit", "lora_alpha",
    "lora_dropout", "lora_qkv", "lora_rank", "lora_targets", "lr_decay_iters", "max_iters",
    "min_lr", "prompt", "seed", "task", "test_size", "train_size", "warmup_iters", "weight_decay",
}


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
        return self.standing[0] == FINISHED

    @property
    def interrupted(self) -> bool:
        return self.standing[0] == INTERRUPTED

    @property
    def standing(self) -> tuple[str, str]:
        """What its folder holds, one of the constants above, and the reason or "".

        A run that cannot be read, or whose data or base model changed, is to do again.
        """
        try:
            return self.kept_scores() if self.result else self.kept_run()
        except UNREADABLE as error:
            return AGAIN, in_words(error)

    def kept_run(self) -> tuple[str, str]:
        """Return the standing of a training run. Raises as `load_run` does."""
        complete = (self.folder / FINISHED_FILE).is_file() or is_finished(self.folder)
        if not complete and not (self.folder / STATE_FILE).is_file():
            return TO_DO, ""
        saved, metrics = load_started(self.folder)
        if other := other_settings(saved, metrics, self.settings):
            return OTHER, other
        if changed := changed_sources(saved.facts, self.settings):
            return AGAIN, changed
        if not complete:
            return INTERRUPTED, ""
        load_run(self.folder)
        if not is_finished(self.folder):
            return AGAIN, f"{self.folder / FINISHED_FILE} is not that of a complete run"
        return FINISHED, ""

    def kept_scores(self) -> tuple[str, str]:
        """Return the standing of a script that trains nothing. Raises as `load_run` does."""
        if not any(self.folder.glob(self.result)):
            return TO_DO, ""
        if self.script != "generate.py":
            return FINISHED, ""
        changed = changed_sources(self.scores().results, self.settings)
        return (AGAIN, changed) if changed else (FINISHED, "")

    def scores(self) -> Scores:
        """Return the scores that `generate.py` wrote, of today's data if there are several.

        Raises as `load_run` does.
        """
        task = make_task(str(self.settings.get("task", TrainConfig.task)))
        found, errors = [], []
        for path in sorted(self.folder.glob(self.result)):
            try:
                found.append(load_scores(path, task))
            except UNREADABLE as error:
                errors.append(error)
        if not found:
            raise errors[0]
        return min(found, key=lambda scores: bool(changed_sources(scores.results, self.settings)))

    @property
    def launched(self) -> "Job":
        """This job with as many processes as the run in its folder, because resuming keeps them."""
        if self.result or self.standing[0] not in (FINISHED, INTERRUPTED):
            return self
        return self._replace(processes=load_started(self.folder)[0].processes)

    @property
    def arguments(self) -> list[str]:
        settings = {**self.settings, "out_dir": self.folder}
        return [self.script, *(f"{name}={value}" for name, value in settings.items())]

    @property
    def command(self) -> str:
        """The command that starts it, or started the run in its folder."""
        job = self.launched
        launcher = ["python"] if job.processes == 1 else ["torchrun", *job.torchrun]
        return shlex.join([*launcher, *self.arguments])

    @property
    def torchrun(self) -> list[str]:
        return ["--standalone", f"--nproc_per_node={self.processes}"]

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def state(self) -> str:
        """Its standing with the reason; for a job that is to do, the error of its last attempt."""
        kind, reason = self.standing
        if kind == TO_DO and self.last_error:
            return f"failed: {self.last_error}"
        return f"{kind}: {reason}" if reason else kind

    @property
    def last_attempt(self) -> str:
        """The log since its last start: the arguments, then what it printed; or ""."""
        try:
            text = self.log.read_text("utf-8", "replace") if self.log.is_file() else ""
        except OSError:  # it cannot have printed anything there
            return ""
        return text.rpartition(ATTEMPT)[2]

    @property
    def last_error(self) -> str:
        """The error that its last attempt printed, or ""."""
        lines = [line.partition("error: ")[2] for line in self.last_attempt.splitlines()
                 if "error: " in line  # it may follow a progress bar
                 and "another process of this job" not in line]  # a consequence, not the cause
        return one_line(lines[-1]) if lines else ""

    def tidy(self) -> None:
        """Delete the trainer's state, the largest file, once the run is finished."""
        if self.finished:
            with suppress(OSError):  # it only takes room
                (self.folder / STATE_FILE).unlink(missing_ok=True)

    def start(self, environment: Mapping[str, str]) -> subprocess.Popen:
        """Start or resume it in a new session, so that Ctrl-C reaches only the parent.

        `environment` is for one process; those of torchrun share all of the machine.
        Raises ValueError if its folder holds another run, OSError if nothing can be written there.
        """
        kind, reason = self.standing
        if kind == OTHER:
            raise ValueError(f"{self.folder} {kind}: {reason}; move it away or delete it")
        self.folder.mkdir(parents=True, exist_ok=True)
        job, module, arguments = self.launched, [], self.arguments
        if kind == INTERRUPTED:
            arguments = [self.script, "init_from=resume", f"out_dir={self.folder}"]
        if job.processes > 1:
            module = ["-m", "torch.distributed.run", *job.torchrun]
            environment = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
        with open(self.log, "a", encoding="utf-8", errors="backslashreplace") as log:
            print(ATTEMPT, shlex.join(arguments), file=log, flush=True)
            return subprocess.Popen(
                [sys.executable, *module, str(ROOT / arguments[0]), *arguments[1:]], stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **environment},
                start_new_session=True,
            )

    def failure(self, code: int) -> str:
        """Return why its process ended with `code`, or "" if it succeeded."""
        if code < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"killed by {names.get(-code, f'signal {-code}')}"
        if code:
            error = self.last_error or f"exit code {code}, see {self.log}"
            resumed = "init_from=resume" in self.last_attempt.partition("\n")[0]
            afresh = resumed and "is in use by another run" not in error
            return error + (f" (to start afresh, delete {self.folder})" if afresh else "")
        kind, reason = self.standing
        if kind == FINISHED:
            return ""
        return "it ended without its result" + (f": {reason}" if reason else "")


def make_job(name: str, script: str, settings: Mapping[str, Any], defaults: TrainConfig |
             GenerateConfig, out_dir: str) -> Job:
    """Name the run's folder after the settings that differ from the defaults, too.

    A setting added later thus leaves the names of older runs as they are. A folder named by all
    settings, as the first version did, is used where it exists.
    """
    known = asdict(defaults)
    changed = {key: value for key, value in settings.items()
               if key != "out_dir" and value != known[key]}
    folder = Path(out_dir, f"{name}-{fingerprint(changed, changed.keys())}")
    first = Path(out_dir, f"{name}-{fingerprint(settings, FIRST_SETTINGS)}")
    added_later = changed.keys() - FIRST_SETTINGS - FREE_SETTINGS
    use_first = first.is_dir() and not folder.exists() and not added_later
    return Job(name, script, changed, first if use_first else folder)


def job_of(folder: Path, config: TrainConfig) -> Job:
    """Return the job of a run that stands in `folder`, whoever started it."""
    defaults = asdict(TrainConfig())
    changed = {name: value for name, value in asdict(config).items()
               if name != "out_dir" and value != defaults[name]}
    return Job(folder.name, "train.py", changed, folder)


def fingerprint(settings: Mapping[str, Any], names: Collection[str]) -> str:
    """Hash the settings called `names` that change what a run computes."""
    essential = {key: settings[key] for key in sorted(settings.keys() - FREE_SETTINGS)
                 if key in names}
    if essential.get("lora_targets") in GPT2_TARGETS:  # as all folders were named at first
        essential["lora_targets"] = GPT2_TARGETS[essential["lora_targets"]]
    return hashlib.sha256(json.dumps(essential).encode()).hexdigest()[:8]


def run_jobs(jobs: Iterable[Job], at_once: int) -> Iterator[tuple[Job, str]]:
    """Run `jobs`, `at_once` in parallel; yield each as it ends, with its error or "".

    Closing the generator, or Ctrl-C, stops the running ones after they have saved their state.
    """
    waiting, running = iter(jobs), {}
    try:
        while True:
            free = sorted(set(range(at_once)) - running.keys())
            for slot, job in zip(free, waiting, strict=False):
                running[slot] = job, try_to_start(job, share_of_machine(slot, at_once))
            if not running:
                return
            job, started = running.pop(next_to_end(running))
            error = started if isinstance(started, str) else job.failure(started.returncode)
            if not error:
                job.tidy()
            yield job, error
    finally:
        if running:
            print("stopping; the runs save their state first", file=sys.stderr)
        processes = [started for _, started in running.values() if not isinstance(started, str)]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def try_to_start(job: Job, environment: Mapping[str, str]) -> Started:
    try:
        return job.start(environment)
    except UNREADABLE as error:
        return in_words(error)


def next_to_end(running: Mapping[int, tuple[Job, Started]]) -> int:
    """Wait until a process has ended; return its slot, or that of a job that did not start."""
    while True:
        for slot, (_, started) in running.items():
            if isinstance(started, str) or started.poll() is not None:
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
    gpus = [gpu for gpu in gpus if gpu.strip()]  # as in "0,1,"
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
             "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    return share | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})
