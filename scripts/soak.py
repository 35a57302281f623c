"""A long run of every op on the CPU, in which memory must not grow: for the night, not for every change.

    python scripts/soak.py --steps 20000

Each op takes steps with inputs of a few sizes in turn, forward and backward. The resident memory after a tenth of the
steps is compared with that at the end; 8 MB more is a leak, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lipgan.ops import gradient_penalty, interpolate, matrix_sqrt, spectral_norm_group
from lipgan.ops.mlp_gradient_penalty import penalize
from lipgan.ops.nearest_neighbours import ball_counts, nearest_neighbours

ALLOWED = 8 << 20  # of growth: an allocator's arenas breathe


def resident() -> int:
    """Bytes of resident memory, of Linux."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


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
    grown = False
    for name in args.op or STEPS:
        start, settled = time.monotonic(), 0
        for step in range(args.steps):
            STEPS[name](SIZES[step % len(SIZES)])
            if step == args.steps // 10:
                settled = resident()
        growth = resident() - settled
        grown |= growth > ALLOWED
        verdict = "grows" if growth > ALLOWED else "flat"
        print(f"{name}: {verdict}, {growth / 2**20:+.1f} MB over {args.steps} steps, {time.monotonic() - start:.0f} s")
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
