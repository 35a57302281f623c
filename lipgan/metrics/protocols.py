"""How packages compute metrics that go by one name, so that a number can be compared with theirs.

A `Protocol` holds the choices that a package makes at its defaults; the functions and classes of :mod:`lipgan.metrics`
take its name as ``protocol`` and read them. "clean" is clean-fid; "lipgan" is what they do at their own defaults, but
the subsets of the kernel distance are no larger than the samples allow. What cannot
be fixed is the draw of random rows: each package has random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lipgan._choices import PROTOCOLS as _NAMES
from lipgan._registry import lookup

__all__ = ["PROTOCOLS", "Protocol", "get", "names"]


@dataclass(frozen=True)
class Protocol:
    """The choices of one package; None where it does not have the metric.

    Attributes:
        name: of the package.
        preprocessing: of images for Inception, as in :class:`lipgan.metrics.features.InceptionFeatures`.
        ddof: covariances are scatter matrices over ``n - ddof``.
        splits: of the Inception Score.
        shuffled: whether its rows are shuffled first.
        score_ddof: the standard deviation of the Inception Score is over ``splits - score_ddof``.
        subsets, subset_size, degree: of the kernel distance.
        capped: where a side has fewer samples than ``subset_size``, whether subsets have as many; else it is an error.
        nearest_k, compare: of precision and recall.
        density: whether density and coverage belong to them.
        sigma, scale: of the CMMD.
    """

    name: str
    preprocessing: str
    ddof: int = 1
    splits: int | None = None
    shuffled: bool = True
    score_ddof: int = 0
    subsets: int | None = None
    subset_size: int = 1000
    capped: bool = False
    degree: int = 3
    nearest_k: int | None = None
    compare: str = "le"
    density: bool = False
    sigma: float | None = None
    scale: float = 1000.0

    def __str__(self) -> str:
        definitions = [f"{name} of {words}" for name in _METRICS if (words := self.definition(name)) is not None]
        return f"protocol {self.name}: {self.preprocessing} preprocessing for Inception, {'; '.join(definitions)}"

    def definition(self, metric: str, samples: int | None = None) -> str | None:
        """How "fid", "is", "kid", "prdc" or "cmmd" is defined, in words; None if the package does not have it.

        Args:
            metric: one of these.
            samples: of the smaller side, which the size of a subset may depend on.

        Raises:
            ValueError: another metric.
        """
        return lookup(_METRICS, metric, "metric")(self, samples)

    def neighbours(self) -> tuple[int, str]:
        """``nearest_k`` and ``compare`` of :func:`lipgan.metrics.prdc`; ValueError if the package does not have it."""
        self.require("prdc")
        assert self.nearest_k is not None
        return self.nearest_k, self.compare

    def select(self, values: dict[str, float]) -> dict[str, float]:
        """Those numbers of :func:`lipgan.metrics.prdc` that the package has."""
        return {key: value for key, value in values.items() if self.density or key not in ("density", "coverage")}

    def require(self, metric: str) -> None:
        """ValueError unless the package has "fid", "is", "kid", "prdc" or "cmmd"."""
        if self.definition(metric) is None:
            raise ValueError(f"protocol {self.name!r} has no {_TITLES[metric]}; choose another protocol")

    def size_of_subsets(self, samples: int | None) -> int:
        """Samples of each side in a subset of the kernel distance, where the smaller side has ``samples``."""
        # One sample has no kernel distance: the error is that of two.
        return max(2, min(self.subset_size, samples)) if self.capped and samples is not None else self.subset_size


def _fid(protocol: Protocol, samples: int | None) -> str:
    return f"covariance over n - {protocol.ddof}"


def _is(protocol: Protocol, samples: int | None) -> str | None:
    if protocol.splits is None:
        return None
    order = "shuffled" if protocol.shuffled else "in the order of the samples"
    words = f"{protocol.splits} splits, {order}"
    return words + (f", deviation over splits - {protocol.score_ddof}" if protocol.score_ddof else "")


def _kid(protocol: Protocol, samples: int | None) -> str | None:
    if protocol.subsets is None:
        return None
    size = protocol.size_of_subsets(samples)
    return f"{protocol.subsets} subsets of {size}, polynomial kernel of degree {protocol.degree}"


def _prdc(protocol: Protocol, samples: int | None) -> str | None:
    if protocol.nearest_k is None:
        return None
    return f"nearest_k {protocol.nearest_k}, {'open' if protocol.compare == 'lt' else 'closed'} balls"


def _cmmd(protocol: Protocol, samples: int | None) -> str | None:
    if protocol.sigma is None:
        return None
    return f"all pairs, Gaussian kernel of sigma {protocol.sigma:g}, times {protocol.scale:g}"


_METRICS: Mapping[str, Callable[[Protocol, int | None], str | None]] = MappingProxyType(
    {"fid": _fid, "is": _is, "kid": _kid, "prdc": _prdc, "cmmd": _cmmd}
)

_TITLES = {
    "fid": "Frechet distance",
    "is": "Inception Score",
    "kid": "kernel distance",
    "prdc": "precision and recall",
    "cmmd": "CMMD",
}

_CHOICES: Mapping[str, dict[str, Any]] = {
    "pytorch-fid": {"preprocessing": "pytorch"},
    "clean": {"preprocessing": "clean", "subsets": 100, "capped": True},
    "torch-fidelity": {"preprocessing": "tensorflow", "splits": 10, "subsets": 100, "nearest_k": 3},
    "torchmetrics": {"preprocessing": "torchmetrics", "splits": 10, "score_ddof": 1, "subsets": 100},
    "lipgan": {
        "preprocessing": "pytorch",
        "splits": 10,
        "shuffled": False,
        "subsets": 100,
        "capped": True,
        "nearest_k": 5,
        "compare": "lt",
        "density": True,
        "sigma": 10.0,
    },
}

#: By name.
PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({name: Protocol(name, **_CHOICES[name]) for name in _NAMES})


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return sorted(PROTOCOLS)


def get(name: str) -> Protocol:
    """The protocol called ``name``.

    Raises:
        ValueError: unknown name; the message holds the nearest ones.

    Example::

        >>> get("torch-fidelity").nearest_k
        3
    """
    return lookup(PROTOCOLS, name, "protocol")
