"""What pytorch-fid's ``fid_score`` offers to other programs."""

import numpy as np
from numpy.typing import ArrayLike

from lipgan.compat._arrays import floating
from lipgan.metrics import frechet_distance

__all__ = ["calculate_frechet_distance"]


def calculate_frechet_distance(
    mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike, eps: float = 1e-6
) -> np.float64:
    """The squared Frechet distance of two Gaussians, as ``pytorch_fid.fid_score.calculate_frechet_distance``.

    Args:
        mu1, mu2: means, ``[d]``, or a number where ``d`` is 1.
        sigma1, sigma2: covariances, ``[d, d]``, or a number.
        eps: not used. pytorch-fid adds it to singular covariances, which need nothing added here: there the results
            differ, and this one is the distance of what was given.

    Raises:
        TypeError, ValueError: as :func:`lipgan.frechet_distance`.
    """
    result: np.float64 = frechet_distance(
        floating(np.atleast_1d(mu1)),
        floating(np.atleast_2d(sigma1)),
        floating(np.atleast_1d(mu2)),
        floating(np.atleast_2d(sigma2)),
    )
    return result
