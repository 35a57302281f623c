"""What the package prdc offers."""

from numpy.typing import ArrayLike

from lipgan import metrics
from lipgan.compat._arrays import floating

__all__ = ["compute_prdc"]


def compute_prdc(real_features: ArrayLike, fake_features: ArrayLike, nearest_k: int) -> dict[str, float]:
    """Precision, recall, density and coverage, as ``prdc.compute_prdc``; it prints nothing.

    Args:
        real_features, fake_features: ``[n, d]`` and ``[m, d]``.
        nearest_k: which neighbour the balls reach to.

    Returns:
        ``{"precision", "recall", "density", "coverage"}``.

    Raises:
        TypeError, ValueError: as :func:`lipgan.metrics.prdc`.
    """
    found = metrics.prdc(floating(real_features), floating(fake_features), nearest_k)
    return {name: found[name] for name in ("precision", "recall", "density", "coverage")}
