"""Data parallelism: every process trains on its part of each batch and they average gradients.

Works with whatever `torch.distributed` group is initialized; without one, everything here is the identity. The losses
and gradients are averaged directly, in place of DistributedDataParallel, since a step has two networks and a penalty
whose parameter gradients are computed outside of the backward pass.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["average", "average_gradients", "group", "in_any", "rank", "wait", "world_size"]


@contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """The group of the processes that torchrun started, with the device of this one; without torchrun, nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Until every process is here."""
    if world_size() > 1:
        dist.barrier()


def in_any(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds in any of the processes."""
    if world_size() == 1:
        return condition
    flag = torch.tensor(float(condition), device=device)
    dist.all_reduce(flag)
    return bool(flag > 0)


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def average(tensor: Tensor) -> Tensor:
    """The mean over the processes."""
    if world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / world_size()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by the mean over the processes, in one message per dtype.

    A parameter without a gradient in this process counts as zero: another one may have it.
    """
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        members = [p for p in parameters if p.dtype == dtype]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in members])
        flat = average(flat)
        for p, part in zip(members, torch.split(flat, [p.numel() for p in members]), strict=True):
            p.grad = part.view_as(p)
