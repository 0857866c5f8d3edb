"""Unusable devices and precisions are refused; torchrun does not change a run's losses."""

import json
import mmap
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_models import read_lines
from torch.utils._python_dispatch import TorchDispatchMode

from runtime import device as device_module
from runtime import processes
from runtime.device import (
    PhaseMemory,
    forget_peak_memory,
    resolve_device,
    resolve_dtype,
    shapes_only,
)
from runtime.metrics import read_metrics
from train import Run, TrainConfig, train

ROOT = Path(__file__).parents[2]


def test_two_processes_have_the_losses_of_one(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, lora_dropout=0.0, max_iters=4, eval_interval=2)
    train(config)
    shared = replace(config, out_dir=str(tmp_path / "shared"))
    done = subprocess.run(torchrun(shared), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters (") == 1  # only rank 0 prints
    for mine, alone in zip(read_metrics(Path(shared.out_dir)),
                           read_metrics(Path(config.out_dir)), strict=True):
        assert mine.keys() == alone.keys()
        for key in {"train_loss", "validation_loss"} & mine.keys():
            assert mine[key] == pytest.approx(alone[key], abs=1e-6)
    for name in ("best", "last"):  # each process scored its share of the reviews
        mine, alone = (read_lines(Path(run.out_dir, name, "predictions.jsonl"))
                       for run in (shared, config))
        assert [row["text"] for row in mine] == [row["text"] for row in alone]
        assert [row["label"] for row in mine] == [row["label"] for row in alone]
        for one, other in zip(mine, alone, strict=True):
            assert one["label_logprobs"] == pytest.approx(other["label_logprobs"], abs=1e-4)


def torchrun(config: TrainConfig, script: str = "train.py", **changes: object) -> list[str]:
    settings = asdict(config) if script == "train.py" else {}
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            script, *(f"{name}={value}" for name, value in (settings | changes).items())]


@pytest.mark.faults  # it starts many processes
def test_two_processes_resume_as_if_never_stopped(config: TrainConfig, tmp_path: Path) -> None:
    """Each process draws its own dropout masks; resuming restores both random generators."""
    whole = replace(config, max_iters=4, dropout=0.1, lora_dropout=0.2)
    parts = replace(whole, max_iters=2, out_dir=str(tmp_path / "parts"))
    resume = [*torchrun(whole)[:6], "init_from=resume", f"out_dir={parts.out_dir}", "max_iters=4"]
    for command in (torchrun(whole), torchrun(parts), resume):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, other = (Path(run.out_dir, "last", "adapter_model.safetensors").read_bytes()
                  for run in (whole, parts))
    assert one == other
    with pytest.raises(ValueError, match="a resumed run keeps its processes: 2, now 1"):
        Run(whole, resume=True)


def test_process_that_dies_ends_the_job_with_a_line(config: TrainConfig) -> None:
    job = subprocess.Popen(torchrun(replace(config, max_iters=100000)), cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not job.stdout.readline().startswith("step 3:"):
        assert job.poll() is None
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    (second,) = (int(pid) for pid in children
                 if "\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_text())
    os.kill(second, signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "error: another process of this job has ended" in errors


def scored_alone_and_by_two(config: TrainConfig) -> list[dict[str, Any]]:
    """Score the best checkpoint in the run, then with two processes; return both results."""
    train(config)
    results = Path(config.out_dir, "best", "results.json")
    expected = json.loads(results.read_text())
    results.unlink()
    command = torchrun(config, "generate.py", init_from="resume", out_dir=config.out_dir)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1  # only rank 0 writes
    return [expected, json.loads(results.read_text())]


@pytest.mark.faults  # of words; the next test shares texts, and the first one the words of a run
def test_two_processes_share_the_scoring_of_a_finished_run(config: TrainConfig) -> None:
    expected, found = scored_alone_and_by_two(replace(config, max_iters=2))
    assert found["n"] == expected["n"]
    assert found["confusion"] == expected["confusion"]


def test_two_processes_share_long_answers_and_their_likelihood(
    config: TrainConfig, questions: str
) -> None:
    config = replace(config, task="python_codes", dataset=questions, max_iters=2, block_size=64)
    expected, found = scored_alone_and_by_two(config)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert (found["n"], found["chrf"]) == (4, expected["chrf"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_the_process_group_outlives_it() -> None:
    code = """if True:
        import torch
        from runtime import processes
        from pathlib import Path
        processes.start_processes("cpu", "gloo")
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports torch.distributed.nn
        processes.end_processes()
        print([path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")])
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
                          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    assert "python" in done.stdout, done.stderr
    assert "gloo" not in done.stdout


def join_job(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    """Set what torchrun sets in the process of this rank."""
    values = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank,
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_gathered_shares_have_the_original_order(monkeypatch: pytest.MonkeyPatch) -> None:
    items, shares = list(range(7)), []
    for number in range(3):
        join_job(monkeypatch, number, 3)
        shares.append(list(processes.own_share(items)))
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "all_gather_object",
                        lambda into, share: into.__setitem__(slice(None), shares))
    assert processes.gather_shares(shares[0]) == items


def test_processes_that_cannot_share_the_window_are_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_job(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match="must be a multiple of the 3 processes"):
        Run(config)


@pytest.mark.parametrize(("variables", "message"), [
    ({"WORLD_SIZE": "2"}, "has WORLD_SIZE, but lacks RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT;"),
    ({"RANK": "0"}, "has RANK, but lacks WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT;"),
    ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
     "but RANK is no number; start several processes with torchrun"),
    ({"RANK": "3", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
     "but RANK=3 is not below WORLD_SIZE=1"),
    ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
     "but RANK=0 is not below WORLD_SIZE=0"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "a"},
     "but MASTER_PORT is no number"),
])
def test_half_described_job_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for function in (processes.rank, processes.world_size):
        with pytest.raises(ValueError, match=message):
            function()


def test_world_of_one_process_needs_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (processes.rank(), processes.world_size()) == (0, 1)


def test_one_process_is_rank_zero_of_one_and_sums_nothing() -> None:
    assert (processes.rank(), processes.world_size()) == (0, 1)
    assert processes.start_processes("cpu", "auto") == torch.device("cpu")
    tensor = torch.ones(3)
    processes.sum_over_ranks([tensor])
    torch.testing.assert_close(tensor, torch.ones(3))


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "", "meta"])
def test_unusable_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device='{name}' is not usable"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="device='cuda' is not usable here; try auto or cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize(("has_cuda", "expected"), [(True, "cuda"), (False, "cpu")])
def test_automatic_device_is_cuda_if_available(
    has_cuda: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_named_dtype_is_used_on_every_device(name: str, device: str) -> None:
    assert resolve_dtype(name, torch.device(device)) == getattr(torch, name)


@pytest.mark.parametrize(
    ("device", "capability", "pays", "expected"),
    [("cuda", (7, 5), True, torch.float16), ("cuda", (8, 0), False, torch.bfloat16),
     ("cuda", (10, 0), False, torch.bfloat16), ("cpu", None, True, torch.bfloat16),
     ("cpu", None, False, torch.float32), ("mps", None, True, torch.float32)],
)
def test_automatic_dtype_depends_on_the_hardware(
    device: str, capability: tuple[int, int] | None, pays: bool, expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(device_module, "cpu_multiplies_bfloat16_faster", lambda cpuinfo: pays)
    assert resolve_dtype("auto", torch.device(device)) == expected


@pytest.mark.parametrize(("vendor", "flags", "faster"), [
    ("AuthenticAMD", "avx512f avx512_bf16", True), ("GenuineIntel", "avx512f avx512_bf16", False),
    ("GenuineIntel", "avx512_bf16 amx_bf16", True), ("AuthenticAMD", "avx2 avx512_bf16x", False),
])
def test_flags_of_the_processor_decide_on_bfloat16(vendor: str, flags: str, faster: bool) -> None:
    cpuinfo = f"vendor_id\t: {vendor}\nmodel name\t: a chip\nflags\t\t: fpu {flags} sse\nbugs\t: x"
    assert device_module.cpu_multiplies_bfloat16_faster(cpuinfo * 2) == faster
    assert not device_module.cpu_multiplies_bfloat16_faster("")


@pytest.mark.parametrize("name", ["float33", "nn"])
def test_unknown_dtype_is_refused(name: str) -> None:
    message = f"dtype='{name}' must be one of auto, float32, bfloat16, float16"
    with pytest.raises(ValueError, match=message):
        resolve_dtype(name, torch.device("cpu"))


def test_full_gpu_memory_is_reported_with_the_settings_to_change() -> None:
    @device_module.explain_out_of_memory()
    def fill() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(ValueError, match=r"a smaller batch_size .*Tried to allocate 2 GiB"):
        fill()


def test_memory_is_told_for_each_phase() -> None:
    memory = PhaseMemory(torch.device("cpu"))
    forget_peak_memory(memory.device)  # of the tests before
    before = memory.end("loading")["loading_memory_mib"]
    with mmap.mmap(-1, 2**27) as pages:  # 128 MiB that no allocator keeps
        for _ in range(2**7):
            pages.write(bytes(2**20))
    memory.end("training")
    peaks = memory.end("test")
    assert peaks.keys() == {
        "loading_memory_mib", "training_memory_mib", "test_memory_mib", "memory_mib"}
    assert peaks["memory_mib"] == peaks["training_memory_mib"] > before + 100
    if sys.platform == "linux":
        assert peaks["test_memory_mib"] < peaks["training_memory_mib"] - 100


def test_second_signal_stops_at_once() -> None:
    # A shell's background job starts with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with processes.stop_on_signal() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no terminals that hang up")
@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_terminal_that_closes_stops_a_run_unless_nohup_started_it(ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    with processes.stop_on_signal() as received:
        signal.raise_signal(signal.SIGHUP)
        assert received == ([] if ignored else [signal.SIGHUP])
    signal.signal(signal.SIGHUP, before)


def test_modules_of_shapes_only_hold_no_values_and_draw_none() -> None:
    """A draw on "meta" would import torch's compiler, which takes longer than loading a model."""
    before = torch.get_rng_state()
    with Operations() as seen, shapes_only():
        layer = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 5).double())
        torch.nn.init.normal_(layer[1].weight, std=0.02)
        torch.nn.init.kaiming_uniform_(tensor=layer[1].weight)
    assert [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in layer.parameters()] == [
        ((3, 4), torch.float32, "meta"), ((5, 4), torch.float64, "meta"),
        ((5,), torch.float64, "meta")]
    assert seen.names
    assert not [name for name in seen.names if "normal" in name or "uniform" in name]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


class Operations(TorchDispatchMode):
    """Keep the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
