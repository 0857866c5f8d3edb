"""Coordinate the processes of a torchrun job, and handle the signals that stop a run.

Without torchrun there is one process, of rank 0, and these functions leave values unchanged.
"""

import importlib
import itertools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.device import resolve_device

MISSING = object()
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun's
SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none
Item = TypeVar("Item")


def rank() -> int:
    return int(os.environ["RANK"]) if _in_a_job() else 0


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if _in_a_job() else 1


def _in_a_job() -> bool:
    """Return whether torchrun started this process.

    Raises ValueError if the environment describes several processes, but not as torchrun does.
    """
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    not_numbers = [name for name in VARIABLES if name != "MASTER_ADDR"
                   and not os.environ.get(name, "0").isdecimal()]
    if missing:
        fault = f"lacks {', '.join(missing)}"
    elif not_numbers:
        fault = f"{not_numbers[0]} is no number"
    elif int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        fault = f"RANK={os.environ['RANK']} is not below WORLD_SIZE={os.environ['WORLD_SIZE']}"
    else:
        return True
    there = " and ".join(sorted(os.environ.keys() & VARIABLES))
    raise ValueError(f"the environment has {there}, but {fault}; start several processes with "
                     "torchrun, or unset these variables")


def check_shares(passes: int) -> None:
    """Raise ValueError unless the processes of the job can share the passes of a step equally."""
    if passes % world_size():
        raise ValueError(f"gradient_accumulation_steps={passes} must be a multiple of the "
                         f"{world_size()} processes that share them")


def check_same_processes(number: int) -> None:
    """Raise ValueError unless the job has as many processes: its dropout masks would differ."""
    if number != world_size():
        raise ValueError(f"a resumed run keeps its processes: {number}, now {world_size()}; "
                         f"start it with torchrun --nproc_per_node={number}")


def start_processes(device_name: str, backend: str = "auto") -> torch.device:
    """Join the process group, if there is one; return the device of this process.

    `backend` is nccl, gloo or auto, which means nccl on CUDA, else gloo. Raises ValueError if torch
    lacks it or if there are more processes than GPUs.
    """
    device = resolve_device(device_name)
    if not _in_a_job():
        return device
    if device.type == "cuda":
        device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    # If an optimizer imported this module after the group exists, the module's functions would keep
    # the group as a default argument. The group's threads would then outlive `end_processes` and
    # sometimes abort the interpreter's exit.
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
def leave_job_at_the_end() -> Iterator[None]:
    """Leave the process group, if there is one, however the block ends."""
    try:
        yield
    finally:
        end_processes()


@contextmanager
def exit_if_a_process_is_gone() -> Iterator[None]:
    """Exit with one line if another process of the job has ended.

    Print it at once: torchrun kills the remaining processes a moment later.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        print("error: another process of this job has ended:", reason, file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one all-reduce."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with exit_if_a_process_is_gone():
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def own_share(items: Sequence[Item]) -> Sequence[Item]:
    """Return the share of this process: with n processes, every n-th of `items`."""
    return items[rank() :: world_size()]


def gather_shares(share: list[Item]) -> list[Item]:
    """Merge what all processes computed for their `own_share`, in the original order."""
    if not dist.is_initialized():
        return share
    shares: list[Any] = [None] * world_size()
    with exit_if_a_process_is_gone():
        dist.all_gather_object(shares, share)
    whole = [item for row in itertools.zip_longest(*shares, fillvalue=MISSING) for item in row]
    return [item for item in whole if item is not MISSING]


def any_rank(happened: bool) -> bool:
    """Return in all processes whether `happened` is true in any of them."""
    flag = torch.tensor(float(happened))
    if dist.is_initialized() and dist.get_backend() == "nccl":
        flag = flag.cuda()
    sum_over_ranks([flag])
    return bool(flag)


def of_rank_zero(value: Item) -> Item:
    """Return the value of rank 0 in all processes; they wait for it."""
    found = [value]
    if dist.is_initialized():
        with exit_if_a_process_is_gone():
            dist.broadcast_object_list(found, src=0)
    return found[0]


def typed_texts() -> Iterator[str]:
    """Yield the lines on the stdin of rank 0 up to an empty one; on a terminal, ask for them."""
    if sys.stdin is None:  # closed
        return
    prompt = "Type a text; an empty line ends: " if sys.stdin.isatty() else ""
    with suppress(EOFError):
        while rank() == 0 and (line := input(prompt)).strip():
            yield line


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM, SIGHUP so that the step can finish; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    numbers = [signal.SIGINT, signal.SIGTERM]
    if SIGHUP and signal.getsignal(SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def treat_as_ctrl_c(*names: str) -> None:
    """Let signals stop the runs as Ctrl-C does, unless they are ignored, as with nohup."""
    for number in [getattr(signal, name) for name in names if hasattr(signal, name)]:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
