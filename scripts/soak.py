"""A long run of every op on the CPU, in which memory must not grow: for the night, not for every change.

    python scripts/soak.py --steps 20000

Each op takes steps with inputs of a few sizes in turn, forward and backward. What is held after a tenth of the steps is
compared with what is held at the end, in three measures; too much in one of them is a leak, and the exit status is 1:

- resident memory. It is late to tell: a leak first fills the megabytes that were freed after the imports;
- bytes that malloc has given out (of glibc), which count from the first;
- Python's blocks of memory, for the small objects that do not come from malloc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lipgan.ops import gradient_penalty, interpolate, matrix_sqrt, spectral_norm_group
from lipgan.ops.mlp_gradient_penalty import penalize
from lipgan.ops.nearest_neighbours import ball_counts, nearest_neighbours

# Of growth. Runs without a leak have shown 172 KB, 5 KB and 226 blocks.
ALLOWED = {"resident": 8 << 20, "malloc": 64 << 10, "blocks": 500}


class Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc: ten sizes, of which two count here."""

    _fields_ = [
        ("before", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),  # of large blocks, each mapped by itself
        ("between", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),  # of all others
        ("after", ctypes.c_size_t * 2),
    ]


def held() -> dict[str, int]:
    """What the process holds now: resident memory and bytes of malloc, of Linux, and Python's blocks."""
    gc.collect()
    now = {"resident": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()}
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is not None:  # glibc since 2.33
        mallinfo.restype = Mallinfo
        info = mallinfo()
        now["malloc"] = info.uordblks + info.hblkhd
    now["blocks"] = sys.getallocatedblocks()
    return now


def spectral_norm_step(size: int) -> None:
    weights = [torch.randn(size, 70, requires_grad=True), torch.randn(20, size, 3, requires_grad=True)]
    us, vs = [torch.randn(size), torch.randn(size)], [torch.randn(70), torch.randn(60)]
    ys, sigma, _, _ = spectral_norm_group(weights, us, vs, 1, dims=[0, 1])
    torch.autograd.grad([ys[0].sum(), ys[1].sum(), sigma.sum()], weights)


def gradient_penalty_step(size: int) -> None:
    real, fake = torch.randn(8, 3, size), torch.randn(8, 3, size)
    x_hat = interpolate(real, fake, torch.rand(8)).requires_grad_()
    penalty, _ = gradient_penalty(x_hat, weight=10.0)
    torch.autograd.grad(penalty, x_hat)


def perceptron_step(size: int) -> None:
    x, weights = torch.randn(32, 5), [torch.randn(size, 5), torch.randn(1, size)]
    penalize(x, weights, [torch.randn(size), None], [0.2], [None], "two-sided", 10.0, 1.0)


def root_step(size: int) -> None:
    x = torch.randn(4, size % 60 + 2, size % 60 + 2, dtype=torch.float64)
    a = (x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype)).requires_grad_()
    torch.autograd.grad(matrix_sqrt.root(a).sum(), a)


def neighbours_step(size: int) -> None:
    x, y = torch.randn(size, 4), torch.randn(50, 4)
    nearest_neighbours(x, y, 3)
    ball_counts(x, y, torch.ones(size, dtype=torch.float64), torch.ones(50, dtype=torch.float64))


STEPS: dict[str, Callable[[int], None]] = {
    "spectral_norm": spectral_norm_step,
    "gradient_penalty": gradient_penalty_step,
    "mlp_gradient_penalty": perceptron_step,
    "matrix_sqrt": root_step,
    "nearest_neighbours": neighbours_step,
}
SIZES = (33, 200, 471)  # the last with outputs of 64 KB and more, whose memory is kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="of each op")
    parser.add_argument("--op", choices=STEPS, action="append", help="only this one; may be given more than once")
    args = parser.parse_args()
    leaks = False
    for name in args.op or STEPS:
        start = time.monotonic()
        settled: dict[str, int] = {}
        for step in range(args.steps):
            STEPS[name](SIZES[step % len(SIZES)])
            if step == args.steps // 10:
                settled = held()
        growth = {measure: count - settled[measure] for measure, count in held().items()}
        grows = any(growth[measure] > ALLOWED[measure] for measure in growth)
        leaks |= grows
        figures = ", ".join(
            f"{measure} {grown:+,}" if measure == "blocks" else f"{measure} {grown / 2**10:+,.1f} KB"
            for measure, grown in growth.items()
        )
        verdict = "GROWS" if grows else "flat"
        print(f"{name}: {verdict} ({figures}) over {args.steps} steps, {time.monotonic() - start:.0f} s", flush=True)
    return int(leaks)


if __name__ == "__main__":
    sys.exit(main())
