"""``lipgan bench prdc``: precision, recall, density and coverage against matrices of all distances."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import pairwise_distances

from lipgan.bench.harness import Table, in_fresh_process, interleave, peak_memory, product_rate
from lipgan.metrics import prdc

Features = np.ndarray[Any, np.dtype[Any]]

# Points on either side, and features.
SIZES = [(2000, 512), (10_000, 512)]
NEAREST_K = 5

OURS, MATRICES = "lipgan", "matrices"


# ---- the peer, as the package prdc calls scikit-learn and NumPy ----


def _distances(x: Features, y: Features) -> Any:
    return pairwise_distances(x, y, metric="euclidean", n_jobs=8)


def _radii(x: Features, nearest_k: int) -> Any:
    distances = _distances(x, x)
    nearest = np.argpartition(distances, nearest_k + 1, axis=-1)[..., : nearest_k + 1]
    return np.take_along_axis(distances, nearest, axis=-1).max(axis=-1)


def _by_matrices(real: Features, fake: Features, nearest_k: int) -> dict[str, float]:
    of_real, of_fake = _radii(real, nearest_k), _radii(fake, nearest_k)
    cross = _distances(real, fake)
    return {
        "precision": float((cross < of_real[:, None]).any(axis=0).mean()),
        "recall": float((cross < of_fake[None, :]).any(axis=1).mean()),
        "density": float((1.0 / nearest_k) * (cross < of_real[:, None]).sum(axis=0).mean()),
        "coverage": float((cross.min(axis=1) < of_real).mean()),
    }


# ---- what is measured ----


def _variants(n: int, d: int, dtype: str, seed: int) -> dict[str, Callable[[], dict[str, float]]]:
    # Features of a network lie near a surface of fewer dimensions: so do these, with noise about it.
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(32, d, dtype=torch.float64, generator=generator) / d**0.5
    sides = []
    for scale in (1.0, 0.9):
        inner = scale * torch.randn(n, 32, dtype=torch.float64, generator=generator)
        noise = torch.randn(n, d, dtype=torch.float64, generator=generator)
        sides.append((inner @ basis + 0.1 / d**0.5 * noise).numpy().astype(dtype))
    real, fake = sides
    return {
        MATRICES: functools.partial(_by_matrices, real, fake, NEAREST_K),
        OURS: functools.partial(prdc, real, fake, NEAREST_K),
    }


def _times(n: int, d: int, dtype: str, seed: int, seconds: float) -> dict[str, float]:
    variants = _variants(n, d, dtype, seed)
    # scikit-learn rounds the distances of float32 features to float32: a few pairs fall on the other side of a border.
    tolerance = 1e-12 if dtype == "float64" else 3 / n

    def check(values: dict[str, dict[str, float]]) -> None:
        for key, value in values[MATRICES].items():
            if not abs(values[OURS][key] - value) <= tolerance:
                raise AssertionError(f"{key}: lipgan says {values[OURS][key]!r}, the matrices say {value!r}")

    return interleave(variants, seconds=seconds, warmup=1, check=check)


def _peak(n: int, d: int, dtype: str, seed: int, name: str) -> int | None:
    for warm in _variants(100, d, dtype, seed).values():  # what the libraries take once
        warm()
    return peak_memory(_variants(n, d, dtype, seed)[name])


def _mib(size: int | None) -> Any:
    return "-" if size is None else size / 2**20


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """The table of the benchmark; a call with matrices of the largest size takes seconds.

    Args:
        seed: of the features.
        seconds: for each size.
    """
    table = Table(
        f"Precision, recall, density and coverage, nearest_k = {NEAREST_K}, CPU",
        ["n", "d", "dtype", "matrices ms", "lipgan ms", "ratio", "of mm", "matrices MiB", "lipgan MiB", "memory ratio"],
        notes=[
            "matrices: scikit-learn's pairwise_distances and NumPy's argpartition, as the package prdc; n points on",
            "either side. MiB: memory beyond the features, at its peak. Ratios: matrices over lipgan. of mm: the rate",
            "of the 2 n n d multiplications that all distances take at least (half of them within a set), as a share",
            "of that of torch.mm.",
        ],
    )
    for n, d in SIZES:
        for dtype in ("float32", "float64"):
            times = in_fresh_process(_times, n, d, dtype, seed, seconds)
            peaks = {name: in_fresh_process(_peak, n, d, dtype, seed, name) for name in (MATRICES, OURS)}
            theirs, ours = peaks[MATRICES], peaks[OURS]
            rate = in_fresh_process(product_rate, 1000, d, n, getattr(torch, dtype))
            table.rows.append(
                {
                    "n": n,
                    "d": d,
                    "dtype": dtype,
                    "matrices ms": 1e3 * times[MATRICES],
                    "lipgan ms": 1e3 * times[OURS],
                    "ratio": times[MATRICES] / times[OURS],
                    "of mm": 2 * n * n * d / times[OURS] / rate,
                    "matrices MiB": _mib(theirs),
                    "lipgan MiB": _mib(ours),
                    "memory ratio": theirs / ours if theirs and ours else "-",
                }
            )
    return [table]


def plot(tables: list[Table], axes: Any) -> None:
    """Milliseconds over the number of points, both logarithmic, for float32."""
    rows = [row for row in tables[0].rows if row["dtype"] == "float32"]
    for key in ("matrices ms", "lipgan ms"):
        axes.plot([row["n"] for row in rows], [row[key] for row in rows], label=key.removesuffix(" ms"))
    title = f"{tables[0].title}, float32"
    axes.set(xscale="log", yscale="log", xlabel="points on either side", ylabel="ms", title=title)
    axes.set_xticks([row["n"] for row in rows], [str(row["n"]) for row in rows])
    axes.minorticks_off()
    axes.legend()
