"""How other packages compute metrics that go by one name, so that a number can be compared with theirs.

`get` returns a `Protocol`, whose methods are the metrics as that package defines them at its defaults. What cannot be
fixed is the draw of random rows: each package has random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from lipgan.metrics import features
from lipgan.metrics._inputs import Array
from lipgan.metrics.features import FeatureExtractor
from lipgan.metrics.frechet import frechet_distance_from_features
from lipgan.metrics.inception_score import inception_score
from lipgan.metrics.kernel_distance import kernel_distance
from lipgan.metrics.prdc import prdc
from lipgan.registry import lookup

__all__ = ["PROTOCOLS", "Protocol", "get", "names"]


@dataclass(frozen=True)
class Protocol:
    """The choices of one package; None where it does not have the metric.

    Attributes:
        name: of the package.
        preprocessing: of images for Inception, as in :class:`lipgan.metrics.features.InceptionFeatures`.
        ddof: covariances are scatter matrices over ``n - ddof``.
        splits: of the Inception Score, whose rows are shuffled first.
        score_ddof: the standard deviation of the Inception Score is over ``splits - score_ddof``.
        subsets, subset_size, degree: of the kernel distance.
        nearest_k, compare: of precision and recall.
    """

    name: str
    preprocessing: str
    ddof: int = 1
    splits: int | None = None
    score_ddof: int = 0
    subsets: int | None = None
    subset_size: int = 1000
    degree: int = 3
    nearest_k: int | None = None
    compare: str = "le"

    def __str__(self) -> str:
        words = [f"protocol {self.name}", f"{self.preprocessing} preprocessing for Inception"]
        words.append(f"covariance over n - {self.ddof}")
        if self.splits is not None:
            words.append(f"{self.splits} shuffled splits, deviation over splits - {self.score_ddof}")
        if self.subsets is not None:
            words.append(f"{self.subsets} subsets of {self.subset_size}, kernel of degree {self.degree}")
        if self.nearest_k is not None:
            words.append(f"{self.nearest_k} nearest neighbours, compared by {self.compare}")
        return ", ".join(words)

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
            generator: shuffles the rows; None for one that starts at 0.

        Raises:
            ValueError: the package does not have the metric.
        """
        if self.splits is None:
            raise self._lacks("Inception Score")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        mean, std = inception_score(probs, self.splits, generator=generator)
        return mean, std * (self.splits / (self.splits - self.score_ddof)) ** 0.5

    def kernel_distance(
        self, real: Array, fake: Array, *, generator: torch.Generator | None = None
    ) -> tuple[float, float]:
        """Mean and standard deviation, as :func:`lipgan.metrics.kernel_distance`, and its errors.

        Args:
            real, fake: features, at least ``subset_size`` of either.
            generator: draws the subsets.

        Raises:
            ValueError: the package does not have the metric.
        """
        if self.subsets is None:
            raise self._lacks("kernel distance")
        return kernel_distance(real, fake, self.subsets, self.subset_size, degree=self.degree, generator=generator)

    def precision_recall(self, real: Array, fake: Array) -> dict[str, float]:
        """``{"precision", "recall", "f1"}`` of :func:`lipgan.metrics.prdc`, and its errors.

        Raises:
            ValueError: the package does not have the metric.
        """
        if self.nearest_k is None:
            raise self._lacks("precision and recall")
        values = prdc(real, fake, self.nearest_k, self.compare)
        return {key: values[key] for key in ("precision", "recall", "f1")}

    def _lacks(self, metric: str) -> ValueError:
        return ValueError(f"protocol {self.name!r} has no {metric}; choose another protocol")


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol("pytorch-fid", "pytorch"),
            Protocol("torch-fidelity", "tensorflow", splits=10, subsets=100, nearest_k=3),
            Protocol("torchmetrics", "tensorflow", splits=10, score_ddof=1, subsets=100),
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
