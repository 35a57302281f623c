"""Precision, recall, density and coverage of generated features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lipgan._checks import check_choice, check_count
from lipgan.metrics._inputs import Array, as_pair, left_to
from lipgan.metrics.metric import TwoSides
from lipgan.metrics.protocols import Protocol
from lipgan.ops import _backend
from lipgan.ops.nearest_neighbours import ball_counts, nearest_neighbours

__all__ = ["PRDC", "f1_score", "prdc"]

_COMPARISONS = ("lt", "le")


def f1_score(precision: float, recall: float) -> float:
    """The harmonic mean of precision and recall; 0 if both are 0.

    Raises:
        ValueError: one of them is not between 0 and 1.
    """
    for name, value in (("precision", precision), ("recall", recall)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _check_neighbours(nearest_k: int, compare: str) -> None:
    check_count("nearest_k", nearest_k)
    check_choice("compare", compare, _COMPARISONS)


def prdc(
    real: Array,
    fake: Array,
    nearest_k: int = 5,
    compare: str = "lt",
    *,
    backend: str | None = None,
    protocol: str | None = None,
) -> dict[str, float]:
    """Precision, recall, density and coverage of generated features, and the F1 score of the first two.

    Around every point of a set lies a ball that reaches to its ``nearest_k``-th neighbour in the set:

    - precision: the share of generated points in the ball of a real point;
    - recall: the share of real points in the ball of a generated point;
    - density: the number of real balls that a generated point is in, on average, over ``nearest_k``; it may exceed 1;
    - coverage: the share of real balls with a generated point in them.

    The definitions, and at ``compare="lt"`` the treatment of borders, are those of the package prdc. It takes distances
    as ``|x|^2 + |y|^2 - 2 <x, y>``, whose rounding puts a copy of a neighbour inside its ball or outside, and rounds
    those of float32 features to float32; here every comparison is that of the sums of squared differences in float64.
    Memory grows with the number of points, not with its square.

    Args:
        real: features ``[n, d]``, float64, float32 or a half type, NumPy or torch.
        fake: features ``[m, d]``; two dtypes meet in the wider one.
        nearest_k: at least 1; less than the number of points on either side.
        compare: "lt", a ball is open, as in prdc; or "le", it holds its border.
        backend: "reference" or "native"; None for the best available.
        protocol: a name of :mod:`lipgan.metrics.protocols`: the numbers as that package computes them.

    Returns:
        ``{"precision", "recall", "density", "coverage", "f1"}``; by a protocol those of them that its package has.

    Raises:
        TypeError: an argument is neither an array nor a tensor, or not of a real floating-point dtype.
        ValueError: another shape, too few samples, a NaN or an infinity, two devices, an unknown comparison or backend;
            an unknown protocol, one without these numbers, or one beside ``nearest_k`` or ``compare``.
        UnavailableError: the backend asked for cannot serve here.

    Example::

        >>> real = torch.arange(10.0)[:, None]
        >>> prdc(real, real[:5] + 0.5, nearest_k=1)["coverage"]
        0.6

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019), eq. 1-2;
    Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models" (2020), eq. 3-4.
    """
    if protocol is not None:
        chosen = left_to(protocol, "prdc", prdc, nearest_k=nearest_k, compare=compare)
        values = prdc(real, fake, *chosen.neighbours(), backend=backend)
        return chosen.select(values)
    _check_neighbours(nearest_k, compare)
    _backend.check(backend)
    x, y = as_pair("real", real, "fake", fake)
    return _prdc(("real", x), ("fake", y), nearest_k, compare, backend)


def _prdc(
    real: tuple[str, Tensor], fake: tuple[str, Tensor], nearest_k: int, compare: str, backend: str | None
) -> dict[str, float]:
    """:func:`prdc` of features that are known to be good, each with the name that an error gives it."""
    for name, points in (real, fake):
        if len(points) <= nearest_k:
            raise ValueError(f"{name} must have more than nearest_k = {nearest_k} samples, got {len(points)}")
    dtype = torch.promote_types(real[1].dtype, fake[1].dtype)
    x, y = real[1].to(dtype), fake[1].to(dtype)
    x_radii, y_radii = (nearest_neighbours(z, k=nearest_k, backend=backend)[0][:, -1].contiguous() for z in (x, y))
    of_real, of_fake = ball_counts(x, y, x_radii, y_radii, closed=compare == "le", backend=backend)
    precision = (of_fake[1] > 0).double().mean().item()
    recall = (of_real[1] > 0).double().mean().item()
    return {
        "precision": precision,
        "recall": recall,
        "density": of_fake[1].double().mean().item() / nearest_k,
        "coverage": (of_real[0] > 0).double().mean().item(),
        "f1": f1_score(precision, recall),
    }


class PRDC(TwoSides):
    """Precision, recall, density and coverage of features in batches, with ``update``, ``compute`` and ``reset``.

    It keeps the features of both sides.

    Args:
        features: takes a batch of images to features ``[n, d]``, without gradient and as it is: put a network into eval
            mode first. None: ``update`` is given features.
        reset_real_features: whether :meth:`reset` forgets the real features too.
        nearest_k, compare, protocol: as in :func:`prdc`.

    Raises:
        TypeError, ValueError: ``features`` cannot be called; another argument is not such as :func:`prdc` takes.

    Example::

        >>> metric = PRDC(torch.nn.Flatten())
        >>> metric.update(torch.rand(10, 1, 2, 2), real=True)
        >>> metric.update(torch.rand(10, 1, 2, 2), real=False)
        >>> coverage = metric.compute()["coverage"]
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor] | None = None,
        reset_real_features: bool = True,
        *,
        nearest_k: int = 5,
        compare: str = "lt",
        protocol: str | None = None,
    ) -> None:
        self.protocol: Protocol | None = None
        if protocol is not None:
            self.protocol = left_to(protocol, "prdc", prdc, nearest_k=nearest_k, compare=compare)
            nearest_k, compare = self.protocol.neighbours()
        _check_neighbours(nearest_k, compare)
        super().__init__(features, reset_real_features)
        self.nearest_k = nearest_k
        self.compare = compare

    def compute(self) -> dict[str, float]:
        """What :func:`prdc` returns for all samples so far. ValueError unless both sides have enough."""
        real, fake = self._rows("real"), self._rows("generated")
        values = _prdc(("the real side", real), ("the generated side", fake), self.nearest_k, self.compare, None)
        return values if self.protocol is None else self.protocol.select(values)
