"""Run probes on submissions, each submission in a limited child process.

`sandbox.py` starts this module once; it imports torch and forks, so that a submission costs no
start of Python. Requests and answers are lines of JSON on stdin and stdout. No file of the
solution is imported here: a child inherits this process's memory.
"""

import gc
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

from teaching.isolation import (
    OUTPUT_MIB,
    adopt_orphans,
    end_children,
    limit,
    protect,
    refuse,
)
from teaching.layer_probes import warm_up
from teaching.model_probes import PROBES

OPEN_FILES = 1024
LONGEST = 8 * 2**20  # bytes of a child's answers
TOO_LONG, TOO_MUCH_OUTPUT = "answers too long", f"it writes more than {OUTPUT_MIB} MiB"
UNSIGNED = "it writes to the grader's pipe"


class Child(NamedTuple):
    pid: int
    pipe: int


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.dont_write_bytecode = True
    sys.path.remove(os.getcwd())
    for name, taken in json.loads(sys.stdin.readline()).items():
        with suppress(ImportError):
            __import__(name, fromlist=taken)  # some modules load what they hold when it is taken
    warm_up()
    adopt_orphans()
    gc.freeze()  # a collection in a child would copy the pages that it shares with this process
    for line in sys.stdin:
        answers.write(json.dumps(observe(json.loads(line))) + "\n")
        answers.flush()


def observe(request: dict[str, Any]) -> dict[str, Any]:
    """Return for each probe what it saw or why it failed; a new child takes over from a dead one.

    An import that kills the process fails all probes of these modules, without another try.
    """
    left, found, holds = list(request["probes"]), {}, []
    deadline = time.monotonic() + request["total_seconds"]
    while left:
        child = start(request, left)
        ended, imported, holds = follow(child, request, left, found, holds, deadline)
        if ended and left:
            name = left.pop(0)
            found[name] = {"error": ended}
            if not imported:
                modules = PROBES[name].modules
                for other in [other for other in left if set(modules) <= {*PROBES[other].modules}]:
                    left.remove(other)
                    found[other] = {"error": ended}
        if time.monotonic() > deadline:
            late = f"the submission used up {request['total_seconds']:g} s in earlier tests"
            found |= {name: {"error": late} for name in left}
            break
    return {"found": found, "holds": holds}


def follow(
    child: Child, request: dict[str, Any], left: list[str], found: dict[str, Any],
    holds: list[str], deadline: float,
) -> tuple[str, bool, list[str]]:
    """Read a child's answers, moving names from `left` to `found`; return why it ended early.

    Beside it: whether the modules of the first probe left were imported, and what holds.
    """
    rest, size, imported, reason = b"", 0, False, ""
    while left and not reason:
        patience = min(request["seconds"], max(deadline - time.monotonic(), 0.1))
        if not select.select([child.pipe], [], [], patience)[0]:
            reason = f"it takes longer than {request['seconds']:g} s"
            break
        block = os.read(child.pipe, 65536)
        if not block:
            break
        size += len(block)
        *lines, rest = (rest + block).split(b"\n")
        reason = TOO_LONG if size > LONGEST else ""
        for line in lines:
            kind, value = understood(line, request["token"])
            if kind == "holds":
                holds = value
            elif kind == "imported":
                imported = True
            elif kind == "done" and left:
                found[left.pop(0)] = value
                imported = False
            else:
                reason = UNSIGNED
                break
    return reap(child, reason, bool(left)), imported, holds


def understood(line: bytes, token: str) -> tuple[str, Any]:
    """Return the kind and the value of a child's message; ("", None) if it is none of ours."""
    try:
        sent, kind, value = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return "", None
    known = sent == token and (kind != "done" or isinstance(value, dict))
    return (kind, value) if known else ("", None)


def reap(child: Child, reason: str, early: bool) -> str:
    """Kill the child and what it started; return why it ended, if it was too `early`."""
    if not early or reason:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    os.close(child.pipe)
    end_children()  # also those that left the group
    if reason or not early:
        return reason
    if os.WIFSIGNALED(status):
        kind = signal.Signals(os.WTERMSIG(status))
        known = {signal.SIGXCPU: "it takes too much processor time",
                 signal.SIGXFSZ: TOO_MUCH_OUTPUT}
        return known.get(kind, f"it dies of {kind.name}")
    return f"it ends the process, with exit code {os.WEXITSTATUS(status)}"


def start(request: dict[str, Any], names: Sequence[str]) -> Child:
    """Fork the child that runs the probes `names` of one submission."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                be_child(request, names, write, output.fileno())
            finally:
                os._exit(0)
    os.close(write)
    with suppress(OSError):
        os.setpgid(pid, pid)
    return Child(pid, read)


def be_child(request: dict[str, Any], names: Sequence[str], pipe: int, output: int) -> None:
    """Run the probes in this process and write an answer for each to `pipe`."""
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.closerange(3, pipe)  # what the worker has open is not for a submission
    os.closerange(pipe + 1, OPEN_FILES)
    fresh_output()
    root, scratch, token = request["folder"], request["scratch"], request["token"]

    def send(kind: str, value: Any = None) -> None:
        data = json.dumps([token, kind, value]).encode() + b"\n"
        while data:
            data = data[os.write(pipe, data):]

    send("holds", protect(request["hidden"], root, scratch))
    limit(request["seconds"] * len(names), request["memory_mib"])
    os.chdir(scratch)
    os.environ |= {"HOME": scratch, "TMPDIR": scratch, "WANDB_MODE": "disabled"}
    tempfile.tempdir = scratch
    sys.path.insert(0, root)
    refuse(request["hidden"], scratch)
    failed: dict[str, str] = {}
    for name in names:
        send("done", run(name, root, scratch, failed, send))
        fresh_output()


def fresh_output() -> None:
    """Forget what was printed, in buffers too, so that a test cannot fill the file of the next."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    os.ftruncate(1, 0)
    os.lseek(1, 0, os.SEEK_SET)


def run(
    name: str, root: str, scratch: str, failed: dict[str, str], send: Any
) -> dict[str, Any]:
    """Return what a probe sees, or an error in one line; `failed` keeps the imports that fail."""
    probe, submission = PROBES[name], SimpleNamespace(scratch=scratch)
    try:
        for module in probe.modules:
            if module in failed:
                return {"error": failed[module]}
            try:
                setattr(submission, module.rpartition(".")[2], importlib.import_module(module))
            except BaseException as error:
                failed[module] = f"importing {module} fails: {said(error, root)}"
                raise
        send("imported")
        seen = probe.run(submission)
        sys.stdout.flush()
        return {"value": json.loads(json.dumps(seen))}
    except BaseException as error:  # a submission may raise anything, SystemExit too
        module = next((each for each in probe.modules if each in failed), None)
        return {"error": failed[module] if module else said(error, root)}


def said(error: BaseException, root: str) -> str:
    """Return an exception in one line, with the place in the submission that raised it."""
    if isinstance(error, OSError) and error.errno == 27:
        return TOO_MUCH_OUTPUT
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "it needs more memory than a submission may use"
    text = " ".join(str(error).split())[:300]
    if isinstance(error, SystemExit):
        text = f"it ends the process, with exit code {error.code}"[:300]
    elif not isinstance(error, (NotImplementedError, PermissionError)):
        text = f"{type(error).__name__}: {text}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename.startswith(root)]
    place = f" ({os.path.relpath(frames[-1].filename, root)}:{frames[-1].lineno})" if frames else ""
    return text + place


if __name__ == "__main__":
    main()
