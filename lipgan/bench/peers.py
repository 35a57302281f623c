"""``lipgan bench peers``: the code of other packages, as it is installed, beside lipgan on the same data.

The other benchmarks hold lipgan against PyTorch and SciPy, called as these packages call them. Here the packages
themselves run; one that is not there is shown as absent. ``pip install "lipgan[bench]"`` brings most of them;
pytorch-fid and torch-fidelity depend on torchvision, and can be installed by ``pip install --no-deps``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

import lipgan
from lipgan.bench.harness import Table, in_fresh_process, interleave
from lipgan.metrics import FeatureStats, kernel_distance, prdc, wasserstein_distance

# Features, and fewer of them; samples of either side, and of an exact transport; the side of a weight. The benchmark
# frechet has 2048 features, where a call of pytorch-fid takes ten seconds.
DIM, NARROW = 1024, 512
SAMPLES, TRANSPORTED = 5000, 1000
SIDE = 128

Run = Callable[[], Any]


# ---- packages whose own dependencies are not there ----


class _Class(type):
    """A class whose attributes are classes."""

    def __getattr__(cls, name: str) -> _Class:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Class(name, (), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a package and its modules as modules in which every name is a class."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _Class(self.package, (), {}).__getattr__  # type: ignore[method-assign]


@contextlib.contextmanager
def present_or_stand_in(package: str = "torchvision") -> Iterator[None]:
    """``package`` can be imported: itself, or where it is not, a stand-in that is gone afterwards.

    pytorch-fid and torch-fidelity import torchvision, and clean-fid requests, for what is not compared.
    """
    try:
        importlib.import_module(package)
    except ImportError:
        stand_in = _StandIn(package)
        sys.meta_path.append(stand_in)
        try:
            yield
        finally:
            sys.meta_path.remove(stand_in)
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]
    else:
        yield


# ---- what is compared: of a seed, a run of the package and one of lipgan, whose results agree ----


def _statistics(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.3, 2, DIM, dtype=torch.float64)
    sides = []
    for offset in (0.0, 0.1):
        x = torch.randn(SAMPLES, DIM, dtype=torch.float64, generator=generator) * spread + offset
        sides.append(FeatureStats(DIM).update(x))
    return sides[0].mean, sides[0].cov, sides[1].mean, sides[1].cov


def _pytorch_fid(module: Any, seed: int) -> tuple[Run, Run]:
    statistics = _statistics(seed)
    arrays = [value.numpy() for value in statistics]
    return functools.partial(module.calculate_frechet_distance, *arrays), functools.partial(
        lipgan.frechet_distance, *statistics
    )


def _torchmetrics_fid(module: Any, seed: int) -> tuple[Run, Run]:
    statistics = _statistics(seed)
    return functools.partial(module._compute_fid, *statistics), functools.partial(lipgan.frechet_distance, *statistics)


def _torch_fidelity_fid(module: Any, seed: int) -> tuple[Run, Run]:
    mu1, sigma1, mu2, sigma2 = _statistics(seed)
    first, second = ({"mu": mu.numpy(), "sigma": sigma.numpy()} for mu, sigma in ((mu1, sigma1), (mu2, sigma2)))

    def theirs() -> float:
        (value,) = module.fid_statistics_to_metric(first, second, False).values()
        return float(value)

    return theirs, functools.partial(lipgan.frechet_distance, mu1, sigma1, mu2, sigma2)


def _features(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """As a network's: near a surface of 32 dimensions, with noise about it."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(32, d, generator=generator) / d**0.5
    sides = []
    for scale in (1.0, 0.9):
        inner = scale * torch.randn(n, 32, generator=generator)
        sides.append(inner @ basis + 0.1 / d**0.5 * torch.randn(n, d, generator=generator))
    return sides[0], sides[1]


def _torch_fidelity_kid(module: Any, seed: int) -> tuple[Run, Run]:
    # Each package draws subsets of its own; where they hold all samples, the numbers can be compared.
    x, y = (side.abs() for side in _features(1000, DIM, seed))

    def theirs() -> float:
        values = module.kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=1000, verbose=False)
        return float(values["kernel_inception_distance_mean"])

    return theirs, lambda: kernel_distance(x, y, 20, 1000)[0]


def _torchmetrics_kid(module: Any, seed: int) -> tuple[Run, Run]:
    x, y = (side.abs() for side in _features(1000, DIM, seed))

    def theirs() -> float:
        return float(torch.stack([module.poly_mmd(x, y, 3, None, 1.0) for _ in range(20)]).mean())

    return theirs, lambda: kernel_distance(x, y, 20, 1000)[0]


def _prdc(module: Any, seed: int) -> tuple[Run, Run]:
    x, y = (side.numpy() for side in _features(SAMPLES, NARROW, seed))

    def theirs() -> float:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how many samples there are
            return float(module.compute_prdc(x, y, 5)["coverage"])

    return theirs, lambda: prdc(x, y, 5)["coverage"]


def _pot(module: Any, seed: int) -> tuple[Run, Run]:
    x, y = (side.double().numpy() for side in _features(TRANSPORTED, NARROW, seed))
    return lambda: module.emd2([], [], module.dist(x, y, metric="euclidean")), lambda: wasserstein_distance(x, y)


def _torchlip(module: Any, seed: int) -> tuple[Run, Run]:
    torch.manual_seed(seed)
    theirs = module.SpectralLinear(SIDE, SIDE, bias=False)
    ours = lipgan.nn.OrthogonalLinear(SIDE, SIDE, bias=False)
    # As after some training: near an orthogonal weight.
    start = nn.init.orthogonal_(torch.empty(SIDE, SIDE)) + 0.05 / SIDE**0.5 * torch.randn(SIDE, SIDE)
    incoming = torch.randn(SIDE, SIDE)
    runs = []
    for layer in (theirs, ours):
        (weight,) = layer.parameters()
        with torch.no_grad():
            weight.copy_(start)

        def run(layer: nn.Module = layer, weight: Tensor = weight) -> float:
            value = cast(Tensor, layer.weight)
            torch.autograd.grad(value, weight, incoming)
            return float(torch.linalg.vector_norm(value.detach()))

        runs.append(run)
    return runs[0], runs[1]


#: What is computed, the package, its module, how runs are made of that, and how far results may be apart.
PEERS: list[tuple[str, str, str, Callable[[Any, int], tuple[Run, Run]], float]] = [
    (f"Frechet distance, d = {DIM}", "pytorch-fid", "pytorch_fid.fid_score", _pytorch_fid, 1e-6),
    (f"Frechet distance, d = {DIM}", "torch-fidelity", "torch_fidelity.metric_fid", _torch_fidelity_fid, 1e-6),
    (f"Frechet distance, d = {DIM}", "torchmetrics", "torchmetrics.image.fid", _torchmetrics_fid, 1e-6),
    ("kernel distance, 20 x 1000", "torch-fidelity", "torch_fidelity.metric_kid", _torch_fidelity_kid, 1e-4),
    ("kernel distance, 20 x 1000", "torchmetrics", "torchmetrics.image.kid", _torchmetrics_kid, 1e-4),
    (f"precision and recall, {SAMPLES} x {NARROW}", "prdc", "prdc", _prdc, 2e-3),
    (f"Wasserstein distance, {TRANSPORTED} x {NARROW}", "POT", "ot", _pot, 1e-9),
    (f"orthogonal {SIDE} x {SIDE} and its gradient", "deel-torchlip", "deel.torchlip.modules.linear", _torchlip, 1e-4),
]


def _times(which: int, seed: int, seconds: float) -> dict[str, float] | None:
    """Seconds of both, once they agree; None where the package is absent."""
    what, package, name, make, tolerance = PEERS[which]
    with present_or_stand_in("torchvision"), present_or_stand_in("requests"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            return None
        theirs, ours = make(module, seed)

        def check(values: dict[str, Any]) -> None:
            one, other = float(values["theirs"]), float(values["lipgan"])
            if not abs(one - other) <= tolerance * max(1.0, abs(one)):
                raise AssertionError(f"{what}: {package} says {one!r}, lipgan says {other!r}")

        return interleave({"theirs": theirs, "lipgan": ours}, seconds=seconds, warmup=1, check=check)


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """The table of the benchmark; calls of some packages take seconds.

    Args:
        seed: of the data.
        seconds: for each row.
    """
    table = Table(
        "Other packages, run as they are installed, CPU",
        ["what", "package", "version", "theirs ms", "lipgan ms", "ratio"],
        notes=["ratio: theirs over lipgan. absent: not installed here. Checked first: the results agree."],
    )
    for which, (what, package, *_) in enumerate(PEERS):
        row: dict[str, Any] = {"what": what, "package": package, "version": "absent"}
        times = in_fresh_process(_times, which, seed, seconds)
        if times is not None:
            ratio = times["theirs"] / times["lipgan"]
            row |= {"version": importlib.metadata.version(package), "ratio": ratio}
            row |= {"theirs ms": 1e3 * times["theirs"], "lipgan ms": 1e3 * times["lipgan"]}
        table.rows.append(row)
    return [table]


def plot(tables: list[Table], axes: Any) -> None:
    """Bars of the ratios of the packages that are there."""
    rows = [row for row in tables[0].rows if "ratio" in row]
    axes.barh([f"{row['package']}: {row['what']}" for row in rows], [row["ratio"] for row in rows])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="time of the package / time of lipgan", title=tables[0].title)
