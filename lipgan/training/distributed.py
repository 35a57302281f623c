"""Data parallelism: every process trains on its part of each batch and they average gradients.

Works with whatever `torch.distributed` group is initialized; without one, everything here is the identity. The losses
and gradients are averaged directly, in place of DistributedDataParallel, since a step has two networks and a penalty
whose parameter gradients are computed outside of the backward pass.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "ProcessLostError",
    "average",
    "average_gradients",
    "gathered",
    "group",
    "in_any",
    "rank",
    "wait",
    "world_size",
]

T = TypeVar("T")

TIMEOUT = "LIPGAN_DISTRIBUTED_TIMEOUT"
# Seconds: longer than what the first process may do alone, which is to write a folder and to evaluate.
_DEFAULT_TIMEOUT = 600.0


class ProcessLostError(RuntimeError):
    """Another process of the group has died, never started, or did not answer within the time limit."""


@contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """The group of the processes that torchrun started, with the device of this one; without torchrun, nothing.

    A process waits for the others for as many seconds as ``LIPGAN_DISTRIBUTED_TIMEOUT`` of the environment says, by
    default 600.

    Raises:
        ValueError: that is no number of seconds.
        ProcessLostError: the others did not start within the time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with _answering():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=_timeout()))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _timeout() -> float:
    text = os.environ.get(TIMEOUT) or str(_DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 1e6:
        raise ValueError(f"{TIMEOUT} must be a number of seconds, above 0 and up to 1e6, got {text!r}")
    return seconds


@contextmanager
def _answering() -> Iterator[None]:
    """What a backend of `torch.distributed` raises about another process, each in its own words, in ours."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ProcessLostError(
            f"another process of this run died or did not answer within the time limit ({TIMEOUT}): {reason}"
        ) from error


def _all_reduce(tensor: Tensor) -> None:
    with _answering():
        dist.all_reduce(tensor)


def wait() -> None:
    """Until every process is here."""
    if world_size() > 1:
        with _answering():
            dist.barrier()


def in_any(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds in any of the processes."""
    if world_size() == 1:
        return condition
    flag = torch.tensor(float(condition), device=device)
    _all_reduce(flag)
    return bool(flag > 0)


def gathered(value: T) -> list[T]:
    """The values of all processes in the order of their ranks. They are pickled on the way."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _answering():
        dist.all_gather_object(values, value)
    return values


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
    _all_reduce(tensor)
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
