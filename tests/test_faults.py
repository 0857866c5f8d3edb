"""A run that is killed at any moment goes on, and ends as if nothing had happened."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from checkpoints.files import read_json, read_tensors
from checkpoints.trainer_state import read_state
from runtime.metrics import read_metrics
from train import TrainConfig

ROOT = Path(__file__).parent.parent
# Forks the processes of each order that it reads, a line of JSON. One of them, the victim, kills
# itself and its children after some seconds, or before the n-th change of a file.
SERVER = """
import importlib, json, os, signal, sys, time
sys.argv[0] = "script"
import matplotlib.figure, torch
import experiments.__main__, pretraining.__main__, train
from configurator import run_script

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports torch's compiler, once for all

CONFIGS = {"train": "TrainConfig", "pretraining.__main__": "PretrainConfig",
           "experiments.__main__": "ExperimentsConfig"}

def die(*_):
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        for child in children.read().split():
            os.kill(int(child), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

def kill_before(operations):
    def count(event, arguments):
        nonlocal operations
        changes = event in ("os.rename", "os.remove", "os.mkdir") or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        operations -= bool(changes)
        if changes and operations == 0:
            die()
    sys.addaudithook(count)

def run(order, rank):
    os.dup2(2, 1)
    sys.argv[1:] = order["arguments"]
    signal.alarm(120)  # a process that waits for a dead one for ever fails the test
    if order["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "WORLD_SIZE": str(order["processes"]), "MASTER_PORT": str(order["port"])}
    if rank == order["victim"] and order["operations"]:
        kill_before(order["operations"])
    if rank == order["victim"] and order["seconds"]:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_REAL, order["seconds"])
        signal.signal(signal.SIGALRM, die)
    module = importlib.import_module(order["script"])
    try:
        run_script(module.main, getattr(module, CONFIGS[order["script"]]))
    except SystemExit as end:
        os._exit(end.code)
    os._exit(0)

for line in sys.stdin:
    order = json.loads(line)
    started, children = time.monotonic(), []
    for rank in range(order["processes"]):
        children.append(os.fork())
        if children[-1] == 0:
            run(order, rank)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps([codes, time.monotonic() - started]), flush=True)
"""


@dataclass(frozen=True)
class Scenario:
    """A script and its arguments in a folder; `resume` follows once there is a state."""

    script: str
    folder: Path
    start: list[str]
    resume: list[str]
    processes: int = 1


class Killer:
    """Starts scenarios in processes of their own, and kills them."""

    def __init__(self, folder: Path) -> None:
        with open(folder / "log.txt", "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER], cwd=folder, stdin=subprocess.PIPE, text=True,
                stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def run(self, scenario: Scenario, victim: int = 0, seconds: float = 0, operations: int = 0
            ) -> tuple[bool, float]:
        """Return whether it was killed, and the seconds it took; anything else fails."""
        has_state = any(scenario.folder.rglob("trainer_state.pt"))
        order = {"script": scenario.script, "processes": scenario.processes, "victim": victim,
                 "arguments": scenario.resume if has_state else scenario.start,
                 "seconds": seconds, "operations": operations, "port": free_port()}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        codes, duration = json.loads(self.process.stdout.readline())
        killed = codes[victim] == -9
        assert killed or codes[victim] == 0, codes
        assert all(code in ((0, 2) if killed else (0,)) for code in codes if code != -9), codes
        return killed, duration


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}


@pytest.fixture(scope="module")
def killer(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: str, reviews: str, imdb: str, pairs: str
) -> Iterator[Killer]:
    """Works in a folder of somebody's files, and changes neither these nor its inputs."""
    foreign = tmp_path_factory.mktemp("foreign")
    for name in ("config.json", "base/thesis.txt", "best/model.safetensors", "out/metrics.jsonl"):
        (foreign / name).parent.mkdir(parents=True, exist_ok=True)
        (foreign / name).write_text(name)
    places = [foreign, *map(Path, (checkpoint, reviews, imdb, pairs))]
    before = [contents(place) for place in places]
    killer = Killer(foreign)
    yield killer
    killer.process.stdin.close()
    killer.process.wait()
    assert [contents(place) for place in places] == before


def outcome(folder: Path) -> dict[str, object]:
    """All that a finished run leaves, without what depends on the clock and the process."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    files = {name: (folder / name).read_bytes() for name in names
             if Path(name).parent.name in ("best", "last", "model")}
    noise = "reviews_per_second", "memory_mib", "seconds"
    lines = [{key: value for key, value in line.items() if not key.endswith(noise)}
             for path in folder.rglob("metrics.jsonl") for line in read_metrics(path.parent)]
    return {"files": files, "metrics": lines, "names": names}


def assert_whole(folder: Path, seen: set[str]) -> None:
    """Every file is one that can be read, and none that was there is gone.

    Before its first state is whole, a run starts again and makes its checkpoints anew.
    """
    readers = {".json": read_json, ".safetensors": read_tensors, ".pt": read_state}
    there = set()
    for path in folder.rglob("[!.]*.*"):  # a hidden file is half of one, for the next run to remove
        if path.suffix in readers:
            assert readers[path.suffix](path)
            there.add(str(path.relative_to(folder)))
    there = {name for name in there if not name.endswith(("results.json", "finished.json"))}
    if not any(folder.rglob("trainer_state.pt")):
        seen.clear()
    assert seen <= there, "a checkpoint was lost"
    seen |= there


def survive(
    make: Callable[[Path], Scenario], folder: Path, killer: Killer, kills: int, seed: int
) -> None:
    """Kill scenarios so many times in all; each that gets to its end must equal the first.

    Every second kill is before a random change of a file, the others at a random time.
    """
    rng, whole = random.Random(seed), make(folder / "whole")
    killed, duration = killer.run(whole)
    assert not killed
    expected, total, number = outcome(whole.folder), 0, 0
    while total < kills:
        number += 1
        broken, seen, killed = make(folder / f"broken{number}"), set(), True
        while killed:
            limit = {"operations": rng.randrange(1, 60)} if total % 2 else {
                "seconds": rng.uniform(0.3, 1.0) * duration}
            victim = rng.randrange(broken.processes)
            killed, _ = killer.run(broken, victim, **limit if total < kills else {})
            total += killed
            assert_whole(broken.folder, seen)
        assert outcome(broken.folder) == expected


def arguments(config: object) -> list[str]:
    return [f"{name}={value}" for name, value in asdict(config).items()]


def training(config: TrainConfig, processes: int = 1) -> Callable[[Path], Scenario]:
    return lambda folder: Scenario(
        "train", folder, arguments(replace(config, out_dir=str(folder))),
        ["init_from=resume", f"out_dir={folder}"], processes)


def extension(config: TrainConfig, killer: Killer, finished: Path) -> Callable[[Path], Scenario]:
    """A finished run that is to train twice as many steps."""
    killer.run(training(config)(finished))

    def make(folder: Path) -> Scenario:
        shutil.copytree(finished, folder)
        resume = ["init_from=resume", f"out_dir={folder}", f"max_iters={2 * config.max_iters}"]
        return Scenario("train", folder, resume, resume)

    return make


def pretraining_run(data: str) -> Callable[[Path], Scenario]:
    settings = ["device=cpu", "dtype=float32", "n_layer=1", "n_head=2", "n_embd=16", "dropout=0.1",
                "block_size=32", "batch_size=4", "negatives=50", "full_softmax_iters=2",
                "max_iters=12", "eval_interval=3", "eval_iters=1", f"data={data}"]

    def make(folder: Path) -> Scenario:
        start = [*settings, f"out_dir={folder}"]
        return Scenario("pretraining.__main__", folder, start, [*start, "init_from=resume"])

    return make


def experiment(config: TrainConfig) -> Callable[[Path], Scenario]:
    """One run of the plan, in a process of its own."""
    planned = {"lora_rank", "lora_alpha", "overwrite", "out_dir"}
    settings = [argument for argument in arguments(config)
                if argument.partition("=")[0] not in planned]

    def make(folder: Path) -> Scenario:
        command = [*settings, f"out_dir={folder}", f"report_dir={folder}-report",
                   "only=r16_alpha64-seed1337"]
        return Scenario("experiments.__main__", folder, command, command)

    return make


@pytest.fixture
def small(config: TrainConfig) -> TrainConfig:
    return replace(config, dropout=0.1)


KINDS = ("lora", "full", "extension", "two processes", "pretraining", "experiment", "preferences")


def scenarios(
    kind: str, config: TrainConfig, imdb: str, pairs: str, killer: Killer, folder: Path
) -> Callable[[Path], Scenario]:
    match kind:
        case "full":
            return training(replace(config, lora_rank=0))
        case "extension":
            return extension(replace(config, max_iters=4), killer, folder / "finished")
        case "two processes":
            return training(replace(config, max_iters=6), processes=2)
        case "pretraining":
            return pretraining_run(imdb)
        case "preferences":
            return training(replace(config, task="preferences", dataset=pairs, max_iters=6))
        case "experiment":
            return experiment(replace(config, max_iters=4))
    return training(config)


@pytest.mark.parametrize(("kind", "kills"), [  # experiments take long: they are in the long form
    ("lora", 2), ("full", 2), ("extension", 2), ("two processes", 1), ("pretraining", 2),
    ("preferences", 2)])
def test_killed_runs_end_like_the_others(
    kind: str, kills: int, small: TrainConfig, imdb: str, pairs: str, killer: Killer,
    tmp_path: Path,
) -> None:
    make = scenarios(kind, small, imdb, pairs, killer, tmp_path)
    survive(make, tmp_path, killer, kills, seed=KINDS.index(kind))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "kills"), list(zip(KINDS, (50, 50, 40, 20, 25, 15, 40), strict=True)))
def test_two_hundred_killed_runs_end_like_the_others(
    kind: str, kills: int, small: TrainConfig, imdb: str, pairs: str, killer: Killer,
    tmp_path: Path,
) -> None:
    make = scenarios(kind, small, imdb, pairs, killer, tmp_path)
    survive(make, tmp_path, killer, kills, seed=11 + KINDS.index(kind))
