"""What a run runs on: the device, its precision, torchrun's processes, and the signals to stop.

Without torchrun there is one process, of rank 0, and nothing is summed.
"""

import ctypes
import importlib
import itertools
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MISSING = object()
Item = TypeVar("Item")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class DeviceConfig:
    """Settings of what a script runs on."""

    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[Dtype, "of the matrix products; auto is the fastest true one"] = "auto"


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is CUDA where there is one, else the CPU.

    Raises ValueError for a device that this machine or torch does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("only cpu, cuda and mps are known")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} is not usable here; try auto or cpu: {error}") from None
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the hardware, by which results and precision can be compared."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe(device: torch.device) -> dict[str, str]:
    """Return what speed and rounding depend on: the hardware and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    processor = re.search(r"model name\s*: (.*)", text)
    return {"device": device_name(device),
            "processor": processor[1] if processor else platform.processor(),
            "threads": str(torch.get_num_threads()), "torch": torch.__version__,
            "python": platform.python_version()}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: allocated on CUDA, else resident.

    0 where the system does not tell, as on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        import resource  # Windows has none

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux, getrusage(2) would start from what the parent held at the fork.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.is_file() else "")
    return 1024 * int(found[1]) if found else 0


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype called `name`; "auto" is the fastest that `device` truly has.

    bfloat16 on CUDA of capability 8.0 and more, float16 before (a T4 only emulates bfloat16), on
    a CPU bfloat16 if it has the instructions and they pay, else float32.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"dtype={name!r} must be one of auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_bfloat16_pays() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute matrix products in `dtype`; with float32 everything stays as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _cpu_bfloat16_pays() -> bool:
    """Probe a matrix product of GPT-2's size: bfloat16 must be clearly faster than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    if "avx512_bf16" not in flags and "amx_bf16" not in flags:
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(256, 768, dtype=dtype), torch.ones(3072, 768, dtype=dtype)
        times = []
        for _ in range(12):
            started = time.perf_counter()
            F.linear(x, weight)
            times.append(time.perf_counter() - started)
        seconds[dtype] = statistics.median(times)
    return seconds[torch.bfloat16] * 1.2 < seconds[torch.float32]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_processes(device_name: str, backend: str = "auto") -> torch.device:
    """Join the process group, if there is one; return this process's own device.

    `backend` is nccl, gloo or auto: nccl on CUDA, else gloo. Raises ValueError if torch lacks it
    or if there are more processes than GPUs.
    """
    device = resolve_device(device_name)
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    # Imported later, as by an optimizer, its functions would hold the group as their default; its
    # threads would outlive `end_processes`, and now and then abort the interpreter's exit.
    importlib.import_module("torch.distributed.nn")
    try:
        dist.init_process_group(backend)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"backend={backend!r} does not work here: {error}") from None
    return device


def end_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """End with a line where another process of the job is gone.

    It is said here and now: torchrun kills those that are left a moment later.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        print("error: another process of this job has ended:", reason, file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one message."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with together():
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def own_share(items: Sequence[Item]) -> Sequence[Item]:
    """Return every n-th of `items`, if there are n processes; another process has the next."""
    return items[rank() :: world_size()]


def gather_shares(share: list[Item]) -> list[Item]:
    """Put together what all processes made of their `own_share`, in the old order."""
    if not dist.is_initialized():
        return share
    shares: list[Any] = [None] * world_size()
    with together():
        dist.all_gather_object(shares, share)
    whole = [item for row in itertools.zip_longest(*shares, fillvalue=MISSING) for item in row]
    return [item for item in whole if item is not MISSING]


def any_rank(happened: bool) -> bool:
    """Tell whether it happened in any process, so that all may do the same."""
    flag = torch.tensor(float(happened))
    if dist.is_initialized() and dist.get_backend() == "nccl":
        flag = flag.cuda()
    sum_over_ranks([flag])
    return bool(flag)


def of_rank_zero(value: Item) -> Item:
    """Return the value of rank 0 in all processes, once it has come that far."""
    found = [value]
    if dist.is_initialized():
        with together():
            dist.broadcast_object_list(found, src=0)
    return found[0]


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Turn CUDA's out-of-memory error into a ValueError that says what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU's memory is full; a smaller batch_size (and more "
            f"gradient_accumulation_steps) needs less: {error}"
        ) from None


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step can end; the second one stops at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def set_up_memory() -> None:
    """Let glibc reuse large blocks that were freed, instead of mapping them anew at each step.

    On a CPU the page faults of fresh blocks cost a third of a small model's step (mallopt(3)).
    And oneDNN keeps the kernels of fewer shapes: batches bring ever new ones, and 1,024 of them
    would hold more memory than the activations.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # read at its first product
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            if mallopt:
                mallopt(parameter, 2**31 - 1)
