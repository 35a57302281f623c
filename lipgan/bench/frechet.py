"""``lipgan bench frechet``: the Frechet distance against SciPy's sqrtm and PyTorch's eigvals, and what it rests on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from scipy.linalg import blas
from torch import Tensor

from lipgan.bench import device as on_device
from lipgan.bench.harness import Table, in_fresh_process, interleave, peak_memory
from lipgan.linalg import sqrtm
from lipgan.metrics import FeatureStats, frechet_distance, frechet_distance_from_features

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]

# The last is the length of the features that FID is named for.
SIZES = [256, 512, 1024, 2048]
SAMPLES = 5000  # of either side
SPECTRA_SIZE = MEMORY_SIZE = 2048
DEFICIENT = "flat, rank deficient"
SPECTRA = ["flat", "to 1e-3, geometric", "1/k", "1/k^2", "to 1e-6, geometric", DEFICIENT]
FEW = 256
MATRICES = (1000, 32)

OURS, PREPARED = "lipgan", "lipgan, prepared"
SQRTM, EIGVALS = "scipy sqrtm", "torch eigvals"


# ---- the peers, as their packages call SciPy and PyTorch ----


def _by_sqrtm(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:
    """As pytorch-fid: the square root of the product, its imaginary part dropped, again with an offset if singular."""
    root = scipy.linalg.sqrtm(sigma1.dot(sigma2))
    if not np.isfinite(root).all():
        offset = np.eye(len(mu1)) * 1e-6
        root = scipy.linalg.sqrtm((sigma1 + offset).dot(sigma2 + offset))
    difference = mu1 - mu2
    return float(difference.dot(difference) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root.real))


def by_eigvals(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Tensor:
    """As torchmetrics: the eigenvalues of the product, which is not symmetric, so they come out complex."""
    roots: Tensor = torch.linalg.eigvals(sigma1 @ sigma2).sqrt().real.sum()
    return (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * roots


def _sqrtm_from_features(real: Tensor, fake: Tensor) -> float:
    x, y = real.double().numpy(), fake.double().numpy()
    return _by_sqrtm(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))


# ---- what is measured ----


def _spectrum(name: str, d: int) -> Tensor:
    """Standard deviations of independent features; eigenvalues of the covariance are their squares."""
    k = torch.arange(d, dtype=torch.float64)
    roots: dict[str, Tensor] = {
        "flat": torch.ones(d, dtype=torch.float64),
        "to 1e-3, geometric": 10 ** (-1.5 * k / max(1, d - 1)),
        "1/k": (1 + k) ** -0.5,
        "1/k^2": 1 / (1 + k),
        "to 1e-6, geometric": 10 ** (-3 * k / max(1, d - 1)),
    }
    return roots.get(name, roots["flat"])


def _few_samples(d: int) -> int:
    """1000 of 2048 features."""
    return max(2, 125 * d // 256)


def _spectral_statistics(name: str, d: int, seed: int) -> Statistics:
    """Of features with a spectrum of that name, each side in a basis of its own."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for _ in range(2):
        basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]
        x = torch.randn(_few_samples(d) if name == DEFICIENT else SAMPLES, d, dtype=torch.float64, generator=generator)
        sides.append(FeatureStats(d).update(x * _spectrum(name, d) @ basis.T))
    return sides[0].mean, sides[0].cov, sides[1].mean, sides[1].cov


def _spectral_times(name: str, d: int, seed: int, seconds: float) -> tuple[dict[str, float], str, float, float]:
    """Times; the route; how far the distance is from that by singular values; and the bound, without what is open."""
    statistics = _spectral_statistics(name, d, seed)
    distance, info = frechet_distance(*statistics, return_info=True)
    slow = frechet_distance(*statistics, method="svd")
    variants: dict[str, Callable[[], Any]] = {
        EIGVALS: functools.partial(by_eigvals, *statistics),
        OURS: functools.partial(frechet_distance, *statistics),
    }
    bound = (info.error_bound - info.undetermined) / float(distance)
    # Where the rank is deficient, what is left of its zeros has roots of half of the digits.
    check = functools.partial(_check, truth=float(distance), tolerance=1e-6)
    times = interleave(variants, seconds=seconds, warmup=1, rounds=2, check=check)
    return times, info.route, abs(float(distance / slow - 1)), bound


def _features(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(n, d, dtype=torch.float64, generator=generator)
    fake = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return real * torch.linspace(0.3, 2, d, dtype=torch.float64), fake + 0.1


def _variants(d: int, seed: int) -> dict[str, Callable[[], Any]]:
    real, fake = (FeatureStats(d).update(x) for x in _features(SAMPLES, d, seed))
    statistics = (real.mean, real.cov, fake.mean, fake.cov)
    arrays = [x.numpy() for x in statistics]
    return {
        SQRTM: functools.partial(_by_sqrtm, *arrays),
        EIGVALS: functools.partial(by_eigvals, *statistics),
        OURS: functools.partial(frechet_distance, *statistics),
        PREPARED: functools.partial(frechet_distance, *statistics, factor1=real.factor),
    }


def _check(values: dict[str, Any], truth: float, tolerance: float) -> None:
    """The variants agree, or nothing is timed."""
    for name, value in values.items():
        error = abs(float(value) / truth - 1)
        if not error < tolerance:
            raise AssertionError(f"{name}: the distance is off by {error:.1e}, relative")


def _times(d: int, seed: int, seconds: float) -> dict[str, float]:
    variants = _variants(d, seed)
    check = functools.partial(_check, truth=float(variants[OURS]()), tolerance=1e-9)
    return interleave(variants, seconds=seconds, warmup=1, check=check)


def _peak(d: int, seed: int, name: str) -> int | None:
    variants = _variants(d, seed)
    torch.linalg.eigvalsh(torch.eye(8))  # what the libraries take once
    return peak_memory(variants[name])


def _few_times(n: int, d: int, seed: int, seconds: float) -> tuple[float, dict[str, float]]:
    real, fake = (x.float() for x in _features(n, d, seed))
    grown = fake.clone().requires_grad_()
    value = frechet_distance_from_features(real, grown)
    # The route by a square root of a singular matrix is no truth: the offset and the noise have roots too.
    check = functools.partial(_check, truth=value.item(), tolerance=0.05)
    slow = {SQRTM: lambda: _sqrtm_from_features(real, fake)}
    slow_time = interleave(slow, seconds=0, warmup=1, rounds=1, check=check)[SQRTM]
    return slow_time, interleave(
        {
            "forward": lambda: frechet_distance_from_features(real, fake),
            "forward for backward": lambda: frechet_distance_from_features(real, grown),
            "backward": lambda: torch.autograd.grad(value, grown, retain_graph=True),
        },
        seconds=seconds,
    )


def _update_times(n: int, d: int, seed: int, seconds: float) -> dict[str, float]:
    features, _ = _features(n, d, seed)
    array, narrow = features.numpy(), features.float()
    stats, narrow_stats = FeatureStats(d), FeatureStats(d)
    scatter = np.zeros((d, d), order="F")
    expected = torch.from_numpy(np.cov(array, rowvar=False))
    error = float((FeatureStats(d).update(features).cov - expected).abs().max() / expected.abs().max())
    if not error < 1e-12:
        raise AssertionError(f"FeatureStats: the covariance is off by {error:.1e}, relative")
    return interleave(
        {
            "numpy.cov": lambda: np.cov(array, rowvar=False),
            "torch.cov": lambda: torch.cov(features.T),
            "one dsyrk": lambda: blas.dsyrk(1.0, array.T, beta=1.0, c=scatter, overwrite_c=1),
            "FeatureStats.update": lambda: stats.update(features),
            "FeatureStats.update, float32": lambda: narrow_stats.update(narrow),
        },
        seconds=seconds,
    )


def _eigh_sqrtm(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    root: Tensor = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
    return root


def _batch_times(count: int, n: int, seed: int, seconds: float) -> dict[str, float]:
    x = torch.randn(count, n, 2 * n, generator=torch.Generator().manual_seed(seed))
    a = x @ x.mT
    times = {}
    for dtype in (torch.float32, torch.float64):
        given = a.to(dtype)
        error = float((sqrtm(given) - _eigh_sqrtm(given)).abs().max() / _eigh_sqrtm(given).abs().max())
        if not error < 1e3 * torch.finfo(dtype).eps:
            raise AssertionError(f"sqrtm: the root is off by {error:.1e}, relative")
        key = str(dtype).removeprefix("torch.")
        variants = {
            f"eigh {key}": lambda given=given: _eigh_sqrtm(given),
            f"ours {key}": lambda given=given: sqrtm(given),
        }
        times.update(interleave(variants, seconds=seconds))
    return times


def _mib(size: int | None) -> Any:
    return "-" if size is None else size / 2**20


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """The tables of the benchmark; a call of SciPy's sqrtm of the largest size takes ten seconds and more.

    Args:
        seed: of the features.
        seconds: for each size.
    """
    return [
        _distances(seed, seconds),
        _spectra(seed, seconds),
        _few(seed, seconds),
        _updates(seed, seconds),
        _roots(seed, seconds),
        _memory(seed),
    ]


def run_on(device: torch.device, seed: int = 0, seconds: float = 3.0, timer: Any = None) -> list[Table]:
    """The table of the benchmark on a GPU: its time and that of the host apart.

    Args:
        device: the GPU.
        seed: of the features.
        seconds: for each size.
        timer: what takes the times; None for `lipgan.bench.device.Timer`.
    """
    timer = on_device.Timer(device) if timer is None else timer
    table = Table(
        f"Frechet distance from statistics of {SAMPLES} samples, full rank, float64, {on_device.name_of(device)}",
        ["d", *on_device.columns(("eigvals", OURS)), "to eigvals"],
        notes=[*on_device.NOTES, "eigvals: torch.linalg.eigvals of the product, as torchmetrics."],
    )
    for d in SIZES:
        sides = (FeatureStats(d).update(x) for x in _features(SAMPLES, d, seed))
        statistics = [x.to(device) for side in sides for x in (side.mean, side.cov)]
        variants: dict[str, Callable[[], Any]] = {
            "eigvals": functools.partial(by_eigvals, *statistics),
            OURS: functools.partial(frechet_distance, *statistics),
        }
        _check({"eigvals": variants["eigvals"]()}, float(variants[OURS]()), 1e-9)
        times = timer.interleave(variants, seconds=seconds, warmup=1, rounds=3)
        ratio = times["eigvals"].device / times[OURS].device
        table.rows.append({"d": d, **on_device.cells(times), "to eigvals": ratio})
    return [table]


def _distances(seed: int, seconds: float) -> Table:
    table = Table(
        f"Frechet distance from statistics of {SAMPLES} samples, full rank, float64, CPU",
        ["d", "sqrtm ms", "eigvals ms", "lipgan ms", "to sqrtm", "to eigvals", "prepared ms", "prepared to eigvals"],
        notes=[
            "sqrtm: scipy.linalg.sqrtm of the product, as pytorch-fid; eigvals: torch.linalg.eigvals of it, as",
            "torchmetrics; prepared: with the factor of one side given. Ratios: peer over lipgan, medians of one run.",
        ],
    )
    for d in SIZES:
        times = in_fresh_process(_times, d, seed, seconds)
        table.rows.append(
            {
                "d": d,
                "sqrtm ms": 1e3 * times[SQRTM],
                "eigvals ms": 1e3 * times[EIGVALS],
                "lipgan ms": 1e3 * times[OURS],
                "to sqrtm": times[SQRTM] / times[OURS],
                "to eigvals": times[EIGVALS] / times[OURS],
                "prepared ms": 1e3 * times[PREPARED],
                "prepared to eigvals": times[EIGVALS] / times[PREPARED],
            }
        )
    return table


def _spectra(seed: int, seconds: float) -> Table:
    d = SPECTRA_SIZE
    table = Table(
        f"Frechet distance by the spectrum of the covariances, d = {d}, float64, CPU",
        ["spectrum", "eigvals ms", "lipgan ms", "to eigvals", "route", "off by", "bound"],
        notes=[
            f"{SAMPLES} samples a side, {_few_samples(d)} where the rank is deficient; bases of sides differ.",
            "off by: from the distance by singular values; bound: on rounding, without what a deficient rank leaves;",
            "both relative to the distance. to 1e-3: the smallest eigenvalue is that share of the largest.",
        ],
    )
    for name in SPECTRA:
        times, route, difference, bound = in_fresh_process(_spectral_times, name, d, seed, seconds)
        table.rows.append(
            {
                "spectrum": name,
                "eigvals ms": 1e3 * times[EIGVALS],
                "lipgan ms": 1e3 * times[OURS],
                "to eigvals": times[EIGVALS] / times[OURS],
                "route": route,
                "off by": difference,
                "bound": bound,
            }
        )
    return table


def _few(seed: int, seconds: float) -> Table:
    slow, times = in_fresh_process(_few_times, FEW, SIZES[-1], seed, seconds)
    return Table(
        f"From {FEW} features of either side to the distance, d = {SIZES[-1]}, float32 features, CPU",
        ["sqrtm ms", "forward ms", "to sqrtm", "forward for backward ms", "backward ms", "backward over forward"],
        [
            {
                "sqrtm ms": 1e3 * slow,
                "forward ms": 1e3 * times["forward"],
                "to sqrtm": slow / times["forward"],
                "forward for backward ms": 1e3 * times["forward for backward"],
                "backward ms": 1e3 * times["backward"],
                "backward over forward": times["backward"] / times["forward"],
            }
        ],
        ["sqrtm: numpy.cov of both sides and scipy.linalg.sqrtm of the product, one call."],
    )


def _updates(seed: int, seconds: float) -> Table:
    times = in_fresh_process(_update_times, SAMPLES, SIZES[-1], seed, seconds)
    rows = [
        {
            "variant": name,
            "ms": 1e3 * time,
            "over numpy.cov": time / times["numpy.cov"],
            "over dsyrk": time / times["one dsyrk"],
        }
        for name, time in times.items()
    ]
    return Table(
        f"Mean and covariance of {SAMPLES} x {SIZES[-1]} features, float64, CPU",
        ["variant", "ms", "over numpy.cov", "over dsyrk"],
        rows,
        ["dsyrk: SciPy's, of these features as they are, into one triangle; the least that a covariance takes."],
    )


def _roots(seed: int, seconds: float) -> Table:
    times = in_fresh_process(_batch_times, *MATRICES, seed, seconds)
    rows = []
    for key in ("float32", "float64"):
        eigh, ours = times[f"eigh {key}"], times[f"ours {key}"]
        rows.append({"dtype": key, "eigh ms": 1e3 * eigh, "lipgan ms": 1e3 * ours, "ratio": eigh / ours})
    return Table(
        f"Square roots of {MATRICES[0]} matrices of {MATRICES[1]} x {MATRICES[1]}, CPU",
        ["dtype", "eigh ms", "lipgan ms", "ratio"],
        rows,
        ["eigh: torch.linalg.eigh, the roots of the eigenvalues, and the product."],
    )


def _memory(seed: int) -> Table:
    rows, covariance = [], 8 * MEMORY_SIZE**2
    for name in (SQRTM, EIGVALS, OURS, PREPARED):
        peak = in_fresh_process(_peak, MEMORY_SIZE, seed, name)
        rows.append({"variant": name, "MiB": _mib(peak), "covariances": "-" if peak is None else peak / covariance})
    return Table(
        f"Memory that a distance takes beyond its statistics, d = {MEMORY_SIZE}",
        ["variant", "MiB", "covariances"],
        rows,
        [f"A covariance is {covariance / 2**20:.0f} MiB."],
    )


def plot(tables: list[Table], axes: Any) -> None:
    """Milliseconds over the length of the features, both logarithmic."""
    rows = tables[0].rows
    for key in [column for column in tables[0].columns if column.endswith(" ms")]:
        axes.plot([row["d"] for row in rows], [row[key] for row in rows], label=key.removesuffix(" ms"))
    axes.set(xscale="log", yscale="log", xlabel="d, features", ylabel="ms", title=tables[0].title)
    axes.set_xticks([row["d"] for row in rows], [str(row["d"]) for row in rows])
    axes.minorticks_off()
    axes.legend()
