"""``lipgan bench kid``: the kernel distance of features against whole kernel matrices of every subset."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lipgan.bench.harness import Table, in_fresh_process, interleave, peak_memory, product_rate
from lipgan.metrics import kernel_distance

Features = np.ndarray[Any, np.dtype[Any]]

# Samples on either side, and the dtype of their features.
CASES = [(5000, "float32"), (5000, "float64"), (10_000, "float32")]
DIM = 2048
SUBSETS, SUBSET_SIZE = 100, 1000

OURS, MATRICES = "lipgan", "matrices"

# `lipgan.metrics` has a function of this name.
_module = sys.modules["lipgan.metrics.kernel_distance"]


# ---- the peer, as torch-fidelity calls NumPy, but with the subsets of lipgan ----


def _kernel(x: Features, y: Features) -> Any:
    return (np.matmul(x, y.T) * (1.0 / x.shape[1]) + 1) ** 3


def _discrepancy(x: Features, y: Features) -> float:
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    m = len(x)
    within = (xx.sum(axis=1) - np.diagonal(xx)).sum() + (yy.sum(axis=1) - np.diagonal(yy)).sum()
    return float(within / (m * (m - 1)) - 2 * xy.sum(axis=0).sum() / (m * m))


def _by_matrices(real: Features, fake: Features, seed: int, subsets: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    in_real, in_fake = (_module._subsets(len(x), subsets, SUBSET_SIZE, generator).numpy() for x in (real, fake))
    values = [_discrepancy(real[i], fake[j]) for i, j in zip(in_real, in_fake, strict=True)]
    return float(np.mean(values)), float(np.std(values))


def _by_lipgan(real: Features, fake: Features, seed: int, subsets: int) -> tuple[float, float]:
    return kernel_distance(real, fake, subsets, SUBSET_SIZE, generator=torch.Generator().manual_seed(seed))


# ---- what is measured ----


def _variants(n: int, dtype: str, seed: int, subsets: int) -> dict[str, Callable[[], tuple[float, float]]]:
    generator = torch.Generator().manual_seed(seed)
    # Positive, as what a ReLU gives.
    real, fake = ((torch.randn(n, DIM, generator=generator) + shift).abs().numpy() for shift in (0.0, 0.1))
    sides = real.astype(dtype), fake.astype(dtype)
    return {
        MATRICES: functools.partial(_by_matrices, *sides, seed, subsets),
        OURS: functools.partial(_by_lipgan, *sides, seed, subsets),
    }


def _times(n: int, dtype: str, seed: int, seconds: float) -> dict[str, float]:
    # Entries of the kernel matrices lie about 4. In float32 the matrices' own rounding is a part of 1e6 of that.
    tolerance = 1e-12 if dtype == "float64" else 1e-5

    def check(values: dict[str, tuple[float, float]]) -> None:
        for name, ours, theirs in zip(("mean", "deviation"), values[OURS], values[MATRICES], strict=True):
            if not abs(ours - theirs) <= tolerance:
                raise AssertionError(f"{name}: lipgan says {ours!r}, the matrices say {theirs!r}")

    return interleave(_variants(n, dtype, seed, SUBSETS), seconds=seconds, warmup=1, check=check)


def _peak(n: int, dtype: str, seed: int, name: str) -> int | None:
    # The memory of the matrices is that of one subset.
    variant = _variants(n, dtype, seed, 1 if name == MATRICES else SUBSETS)[name]
    torch.zeros(100, 100).mm(torch.zeros(100, 100))  # what the libraries take once
    return peak_memory(variant)


def _mib(size: int | None) -> Any:
    return "-" if size is None else size / 2**20


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """The table of the benchmark; a call takes seconds.

    Args:
        seed: of features and subsets.
        seconds: for each case.
    """
    table = Table(
        f"Kernel distance, {SUBSETS} subsets of {SUBSET_SIZE}, d = {DIM}, CPU",
        ["n", "dtype", "matrices ms", "lipgan ms", "ratio", "of mm", "matrices MiB", "lipgan MiB"],
        notes=[
            "matrices: three kernel matrices of every subset in the dtype of the features, as torch-fidelity; lipgan",
            "takes products of float32 features in float32, and all else in float64. n samples on either side. MiB:",
            "memory beyond the features, at its peak. of mm: the rate of the multiplications that the kernels take at",
            "least (of all pairs once, or of the pairs of each subset, half of them within a side), as a share of the",
            "rate of torch.mm.",
        ],
    )
    for n, dtype in CASES:
        times = in_fresh_process(_times, n, dtype, seed, seconds)
        peaks = {name: in_fresh_process(_peak, n, dtype, seed, name) for name in (MATRICES, OURS)}
        rate = in_fresh_process(product_rate, SUBSET_SIZE, DIM, n, getattr(torch, dtype))
        products = 2 * DIM * min(n * n, SUBSETS * SUBSET_SIZE**2)
        table.rows.append(
            {
                "n": n,
                "dtype": dtype,
                "matrices ms": 1e3 * times[MATRICES],
                "lipgan ms": 1e3 * times[OURS],
                "ratio": times[MATRICES] / times[OURS],
                "of mm": products / times[OURS] / rate,
                "matrices MiB": _mib(peaks[MATRICES]),
                "lipgan MiB": _mib(peaks[OURS]),
            }
        )
    return [table]


def plot(tables: list[Table], axes: Any) -> None:
    """Bars: milliseconds of each case."""
    rows = tables[0].rows
    for k, key in enumerate(("matrices ms", "lipgan ms")):
        places = [i + 0.4 * k for i in range(len(rows))]
        axes.bar(places, [row[key] for row in rows], width=0.4, label=key.removesuffix(" ms"))
    axes.set_xticks([i + 0.2 for i in range(len(rows))], [f"{row['n']}, {row['dtype']}" for row in rows])
    axes.set(ylabel="ms", title=tables[0].title)
    axes.legend()
