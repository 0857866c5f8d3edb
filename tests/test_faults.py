"""A run that is killed at any moment goes on, and ends as if nothing had happened."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from checkpoints.files import read_json, read_tensors
from checkpoints.trainer_state import read_state
from runtime.run_folder import read_metrics
from train import TrainConfig

ROOT = Path(__file__).parent.parent
# Forks a process for each line that it reads, {"arguments", "seconds", "operations"}, which trains
# until it is killed: after that many seconds, or before the n-th change of a file.
SERVER = """
import json, os, signal, sys, time
sys.argv[0] = "train.py"
import train
from configurator import configure, run_script

def kill_before(operations):
    def count(event, arguments):
        nonlocal operations
        changes = event in ("os.rename", "os.remove", "os.mkdir") or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        operations -= bool(changes)
        if changes and operations == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

for line in sys.stdin:
    order = json.loads(line)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        sys.argv[1:] = order["arguments"]
        os.dup2(2, 1)
        if order["operations"]:
            kill_before(order["operations"])
        if order["seconds"]:
            signal.setitimer(signal.ITIMER_REAL, order["seconds"])
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            run_script(train.main, train.TrainConfig)
        except SystemExit as end:
            os._exit(end.code)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, time.monotonic() - started]), flush=True)
"""


class Killer:
    """Starts training runs in a process of their own, and kills them."""

    def __init__(self, log: Path) -> None:
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, text=True,
                stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def run(self, arguments: list[str], seconds: float = 0, operations: int = 0
            ) -> tuple[int, float]:
        """Return the exit code, -9 for a kill, and the seconds it took."""
        order = {"arguments": arguments, "seconds": seconds, "operations": operations}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[Killer]:
    killer = Killer(tmp_path / "log.txt")
    yield killer
    killer.process.stdin.close()
    killer.process.wait()


def outcome(folder: Path) -> dict[str, object]:
    """All that a finished run leaves, without what depends on the clock and the process."""
    files = {str(path.relative_to(folder)): path.read_bytes()
             for name in ("best", "last") for path in sorted((folder / name).iterdir())}
    noise = {"reviews_per_second", "memory_mib"}
    lines = [{k: v for k, v in line.items() if k not in noise} for line in read_metrics(folder)]
    return {"files": files, "metrics": lines, "names": sorted(p.name for p in folder.iterdir())}


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
    there = {name for name in there if not name.endswith("results.json")}
    if not (folder / "trainer_state.pt").exists():
        seen.clear()
    assert seen <= there, "a checkpoint was lost"
    seen |= there


def survive(config: TrainConfig, killer: Killer, kills: int, seed: int) -> None:
    """Kill runs of `config` so many times in all; each that gets to its end must equal the first.

    Every second kill is before a random change of a file, the others at a random time.
    """
    rng, whole = random.Random(seed), replace(config, out_dir=f"{config.out_dir}-whole")
    code, duration = killer.run(arguments(whole))
    assert code == 0
    expected, killed, run = outcome(Path(whole.out_dir)), 0, 0
    while killed < kills:
        run += 1
        broken = replace(config, out_dir=f"{config.out_dir}-{run}")
        folder, seen, code = Path(broken.out_dir), set(), -9
        while code == -9:
            resume = ["init_from=resume", f"out_dir={folder}"]
            command = resume if (folder / "trainer_state.pt").exists() else arguments(broken)
            if killed >= kills:
                code, _ = killer.run(command)
            elif killed % 2:
                code, _ = killer.run(command, operations=rng.randrange(1, 60))
            else:
                code, _ = killer.run(command, seconds=rng.uniform(0.3, 1.0) * duration)
            killed += code == -9
            assert_whole(folder, seen)
        assert code == 0
        assert outcome(folder) == expected


def arguments(config: TrainConfig) -> list[str]:
    return [f"{name}={value}" for name, value in asdict(config).items()]


@pytest.mark.parametrize("rank", [0, 4])
def test_killed_runs_end_like_the_others(config: TrainConfig, killer: Killer, rank: int) -> None:
    survive(replace(config, lora_rank=rank, dropout=0.1), killer, kills=6, seed=rank)


@pytest.mark.faults
@pytest.mark.parametrize(("rank", "seed"), [(0, 11), (4, 12), (4, 13)])
def test_fifty_killed_runs_end_like_the_others(
    config: TrainConfig, killer: Killer, rank: int, seed: int
) -> None:
    survive(replace(config, lora_rank=rank, dropout=0.1), killer, kills=50, seed=seed)
