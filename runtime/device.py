"""Choose the device and the precision of a run, and measure its memory."""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
OWN_MAP = 64 * 2**20
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # the second is torch's
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class DeviceConfig:
    """Settings of the device and its precision."""

    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[Dtype, "of the matrix products; auto is the fastest on this hardware"] = "auto"


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is CUDA if available, else the CPU.

    Raises ValueError if this machine or torch does not have the device.
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
    """Return the name of the hardware; results and precision are comparable on the same one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe(device: torch.device) -> dict[str, str]:
    """Return the hardware and the versions, on which speed and rounding depend."""
    processor = re.search(r"model name\s*: (.*)", _cpuinfo())
    return {"device": device_name(device),
            "processor": processor[1] if processor else platform.processor(),
            "threads": str(torch.get_num_threads()), "torch": torch.__version__,
            "python": platform.python_version()}


class _NoDraws(TorchFunctionMode):
    """Leave tensors as they are where `torch.nn.init` would fill them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Give the modules that are made here shapes and dtypes, but neither memory nor values.

    To draw from a normal distribution on "meta", torch would import its compiler, for a second.
    """
    with torch.device("meta"), _NoDraws():
        yield


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated on CUDA, else resident.

    Returns 0 if the system does not report it, as on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        import resource  # does not exist on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux, getrusage(2) would start from what the parent held at the fork.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.is_file() else "")
    return 1024 * int(found[1]) if found else 0


class PhaseMemory:
    """The peak memory of each phase of a run, in MiB.

    Where the system cannot forget a peak (not Linux, not CUDA), a phase has that of all before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, float] = {}

    def end(self, phase: str) -> dict[str, float]:
        """End a phase; return the last peak of each phase so far, and the largest as memory_mib."""
        peak = peak_memory(self.device) / 2**20
        self.peaks[f"{phase}_memory_mib"] = peak
        self.peaks["memory_mib"] = max(peak, self.peaks.get("memory_mib", 0.0))
        forget_peak_memory(self.device)
        return dict(self.peaks)


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew from what is in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype called `name`; "auto" is the fastest that `device` supports.

    On CUDA it is bfloat16 from capability 8.0 on, else float16 (a T4 only emulates bfloat16). On a
    CPU it is bfloat16 if the processor multiplies it faster than float32, else float32.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"dtype={name!r} must be one of auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    faster = device.type == "cpu" and cpu_multiplies_bfloat16_faster(_cpuinfo())
    return torch.bfloat16 if faster else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` in the settings, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute matrix products in `dtype`; float32 leaves everything unchanged."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def cpu_multiplies_bfloat16_faster(cpuinfo: str) -> bool:
    """Return whether the processor that `cpuinfo` describes gains from bfloat16.

    Its flags decide, not a measurement, so that every run on it has the same precision. AMX gains,
    and so does AVX-512 on AMD's processors. On Intel's, AVX-512 alone has half of float32's speed.
    """
    flags = re.search(r"^flags\s*:(.*)", cpuinfo, re.MULTILINE)
    names = flags[1].split() if flags else []
    return "amx_bf16" in names or ("avx512_bf16" in names and "AuthenticAMD" in cpuinfo)


def _cpuinfo() -> str:
    """Return Linux's description of the processors; on other systems, nothing."""
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.is_file() else ""


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn CUDA's out-of-memory error into a ValueError that names the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU's memory is full; a smaller batch_size (and more gradient_accumulation_steps) "
            f"needs less, and so does gradient_checkpointing=True: {error}"
        ) from None


def set_up_memory() -> None:
    """Make glibc reuse freed blocks, and limit torch's caches of kernels.

    By default glibc maps large blocks anew at each step (mallopt(3)); on a CPU the page faults cost
    a third of a small model's step. Only blocks of `OWN_MAP` bytes, which are few, are still mapped
    on their own: among smaller ones they would leave holes, and full fine-tuning took three times
    the memory. torch and oneDNN cache kernels for 1,024 shapes each; as each batch brings new
    shapes, they would take more memory than the activations.
    """
    for variable in KERNEL_CACHES:  # read at the first product
        os.environ.setdefault(variable, "64")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl does not have it
        for parameter, value in ((M_MMAP_THRESHOLD, OWN_MAP), (M_TRIM_THRESHOLD, 2**31 - 1)):
            if mallopt:
                mallopt(parameter, value)
