"""How packages compute metrics that go by one name, so that a number can be compared with theirs.

`get` returns a `Protocol`, whose methods are the metrics as that package defines them at its defaults. "clean" is
clean-fid; "lipgan" is what the functions of :mod:`lipgan.metrics` do at their defaults, but the subsets of the kernel
distance are no larger than the samples allow. The functions and classes take such a name as ``protocol``. What cannot
be fixed is the draw of random rows: each package has random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from lipgan._registry import lookup
from lipgan.metrics import features
from lipgan.metrics._inputs import Array, as_pair
from lipgan.metrics.features import FeatureExtractor
from lipgan.metrics.frechet import frechet_distance_from_features
from lipgan.metrics.inception_score import inception_score
from lipgan.metrics.kernel_distance import kernel_distance
from lipgan.metrics.prdc import prdc

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

    def __str__(self) -> str:
        definitions = [f"{name} of {words}" for name in _METRICS if (words := self.definition(name)) is not None]
        return f"protocol {self.name}: {self.preprocessing} preprocessing for Inception, {'; '.join(definitions)}"

    def definition(self, metric: str, samples: int | None = None) -> str | None:
        """How "fid", "is", "kid" or "prdc" is defined, in words; None if the package does not have it.

        Args:
            metric: one of these.
            samples: of the smaller side, which the size of a subset may depend on.

        Raises:
            ValueError: another metric.
        """
        return lookup(_METRICS, metric, "metric")(self, samples)

    def extractor(self, **options: Any) -> FeatureExtractor:
        """Inception with the preprocessing of this protocol; ``options`` and errors as those of its class."""
        return features.get("inception", preprocessing=self.preprocessing, **options)

    def frechet_distance(self, real: Array, fake: Array) -> float:
        """As :func:`lipgan.metrics.frechet_distance_from_features`, and its errors."""
        return float(frechet_distance_from_features(real, fake, ddof=self.ddof))

    def inception_score(self, probs: Array, *, generator: torch.Generator | None = None) -> tuple[float, float]:
        """Mean and standard deviation, as :func:`lipgan.metrics.inception_score`, and its errors.

        Args:
            probs: ``[n, classes]``.
            generator: shuffles the rows, where this package does; None for one that starts at 0.

        Raises:
            ValueError: the package does not have the metric.
        """
        self.require("is")
        assert self.splits is not None
        if not self.shuffled:
            generator = None
        elif generator is None:
            generator = torch.Generator().manual_seed(0)
        mean, std = inception_score(probs, self.splits, generator=generator)
        return mean, std * (self.splits / (self.splits - self.score_ddof)) ** 0.5

    def kernel_distance(
        self, real: Array, fake: Array, *, generator: torch.Generator | None = None
    ) -> tuple[float, float]:
        """Mean and standard deviation, as :func:`lipgan.metrics.kernel_distance`, and its errors.

        Args:
            real, fake: features; at least ``subset_size`` of either, unless ``capped``.
            generator: draws the subsets.

        Raises:
            ValueError: the package does not have the metric.
        """
        self.require("kid")
        assert self.subsets is not None
        x, y = as_pair("real", real, "fake", fake)
        size = self._size_of_subsets(min(len(x), len(y)))
        return kernel_distance(x, y, self.subsets, size, degree=self.degree, generator=generator)

    def prdc(self, real: Array, fake: Array) -> dict[str, float]:
        """Those numbers of :func:`lipgan.metrics.prdc` that the package has, by name, and its errors.

        Raises:
            ValueError: the package does not have the metric.
        """
        return prdc(real, fake, protocol=self.name)

    def neighbours(self) -> tuple[int, str]:
        """``nearest_k`` and ``compare`` of :func:`lipgan.metrics.prdc`; ValueError if the package does not have it."""
        self.require("prdc")
        assert self.nearest_k is not None
        return self.nearest_k, self.compare

    def kept(self, values: dict[str, float]) -> dict[str, float]:
        """Those numbers of :func:`lipgan.metrics.prdc` that the package has."""
        return {key: value for key, value in values.items() if self.density or key not in ("density", "coverage")}

    def require(self, metric: str) -> None:
        """ValueError unless the package has "fid", "is", "kid" or "prdc"."""
        if self.definition(metric) is None:
            raise ValueError(f"protocol {self.name!r} has no {_TITLES[metric]}; choose another protocol")

    def _size_of_subsets(self, samples: int | None) -> int:
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
    size = protocol._size_of_subsets(samples)
    return f"{protocol.subsets} subsets of {size}, polynomial kernel of degree {protocol.degree}"


def _prdc(protocol: Protocol, samples: int | None) -> str | None:
    if protocol.nearest_k is None:
        return None
    return f"nearest_k {protocol.nearest_k}, {'open' if protocol.compare == 'lt' else 'closed'} balls"


_METRICS: Mapping[str, Callable[[Protocol, int | None], str | None]] = MappingProxyType(
    {"fid": _fid, "is": _is, "kid": _kid, "prdc": _prdc}
)

_TITLES = {"fid": "Frechet distance", "is": "Inception Score", "kid": "kernel distance", "prdc": "precision and recall"}

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol("pytorch-fid", "pytorch"),
            Protocol("clean", "clean", subsets=100, capped=True),
            Protocol("torch-fidelity", "tensorflow", splits=10, subsets=100, nearest_k=3),
            Protocol("torchmetrics", "tensorflow", splits=10, score_ddof=1, subsets=100),
            Protocol(
                "lipgan",
                "pytorch",
                splits=10,
                shuffled=False,
                subsets=100,
                capped=True,
                nearest_k=5,
                compare="lt",
                density=True,
            ),
        )
    }
)


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
