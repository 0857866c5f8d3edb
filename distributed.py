"""Several processes under `torchrun`: who am I, and adding up what each of them found.

Without torchrun there is one process, of rank 0, and nothing here does anything.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from model import resolve_device


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_processes(device_name: str, backend: str) -> torch.device:
    """Join the process group, if there is one; return this process's own device.

    `backend` is nccl, gloo or auto: nccl on CUDA, else gloo.
    """
    device = resolve_device(device_name)
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    return device


def end_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one message."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
