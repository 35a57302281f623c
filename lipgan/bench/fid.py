"""``lipgan bench fid``: from features to the Frechet distance, sums of both sides included, as torchmetrics does it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lipgan.bench.frechet import _by_eigvals, _features
from lipgan.bench.harness import Table, in_fresh_process, interleave
from lipgan.metrics import FrechetDistance

# The length of the features that FID is named for.
DIM = 2048
SAMPLES = 5000  # of either side

# Rows that come at once: the batches of pytorch-fid, and all, as from a file.
BATCHES = [50, SAMPLES]

OURS, EIGVALS = "lipgan", "torch eigvals"


# ---- the peer, as torchmetrics calls PyTorch ----


def _sums(batches: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Mean and covariance from the sums of features and of their products, in float64."""
    dim = batches[0].shape[1]
    total = torch.zeros(dim, dtype=torch.float64)
    products = torch.zeros(dim, dim, dtype=torch.float64)
    count = 0
    for batch in batches:
        rows = batch.double()
        total += rows.sum(0)
        products += rows.t().mm(rows)
        count += len(rows)
    mean = (total / count).unsqueeze(0)
    return mean.squeeze(0), (products - count * mean.t().mm(mean)) / (count - 1)


def _by_sums(real: tuple[Tensor, ...], fake: tuple[Tensor, ...]) -> float:
    return float(_by_eigvals(*_sums(real), *_sums(fake)))


# ---- what is measured ----


def _by_lipgan(real: tuple[Tensor, ...], fake: tuple[Tensor, ...]) -> float:
    metric = FrechetDistance()
    for side, batches in ((True, real), (False, fake)):
        for batch in batches:
            metric.update(batch, real=side)
    return float(metric.compute())


def _times(batch: int, seed: int, seconds: float) -> dict[str, float]:
    real, fake = (torch.split(x.float(), batch) for x in _features(SAMPLES, DIM, seed))
    values: dict[str, float] = {}

    def timed(name: str) -> None:
        values[name] = variants[name](real, fake)

    # The calls are long, so they are checked where they are timed.
    variants = {EIGVALS: _by_sums, OURS: _by_lipgan}
    times = interleave({name: functools.partial(timed, name) for name in variants}, seconds=seconds, warmup=1, rounds=2)
    error = abs(values[OURS] / values[EIGVALS] - 1)
    if not error < 1e-9:
        raise AssertionError(f"lipgan and torch eigvals differ by {error:.1e}, relative")
    return times


def run(seed: int = 0, seconds: float = 3.0) -> list[Table]:
    """The table of the benchmark; a call of the peer takes seconds.

    Args:
        seed: of the features.
        seconds: for each size of the batches.
    """
    table = Table(
        f"FID from {SAMPLES} float32 features of either side, d = {DIM}, sums included, CPU",
        ["rows at once", "eigvals ms", "lipgan ms", "ratio"],
        notes=[
            "eigvals: sums of features and of their products in float64, torch.linalg.eigvals of the product of the",
            "covariances, as torchmetrics; lipgan: lipgan.metrics.FrechetDistance. Ratio: peer over lipgan.",
        ],
    )
    for batch in BATCHES:
        times = in_fresh_process(_times, batch, seed, seconds)
        table.rows.append(
            {
                "rows at once": batch,
                "eigvals ms": 1e3 * times[EIGVALS],
                "lipgan ms": 1e3 * times[OURS],
                "ratio": times[EIGVALS] / times[OURS],
            }
        )
    return [table]


def plot(tables: list[Table], axes: Any) -> None:
    """Bars: milliseconds for each size of the batches."""
    rows = tables[0].rows
    for k, key in enumerate(("eigvals ms", "lipgan ms")):
        places = [i + 0.4 * k for i in range(len(rows))]
        axes.bar(places, [row[key] for row in rows], width=0.4, label=key.removesuffix(" ms"))
    axes.set_xticks([i + 0.2 for i in range(len(rows))], [str(row["rows at once"]) for row in rows])
    axes.set(xlabel="rows at once", ylabel="ms", title=tables[0].title)
    axes.legend()
