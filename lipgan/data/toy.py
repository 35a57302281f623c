"""Toy data in the plane, whose distribution is known in closed form.

Each is drawn once, from a seed of its own: it is the same data set in every process. Mixtures have equally many samples
of each mode, with the mode as label, in the order 0, 1, ..., k - 1, 0, 1, ...
"""

import math

import torch
from torch import Tensor

from lipgan._checks import check_count
from lipgan.data.dataset import Dataset

__all__ = ["SAMPLES", "grid", "ring", "segments", "swiss_roll", "two_gaussians"]

SAMPLES = 10_000


def ring() -> Dataset:
    """Eight Gaussians, evenly spaced on a circle of radius 2, with standard deviation 0.02.

    Source: Metz, Poole, Pfau, Sohl-Dickstein, "Unrolled Generative Adversarial Networks" (2017), appendix A.

    Returns:
        samples ``[10000, 2]``, float32; labels 0..7 counter-clockwise from (2, 0); modes ``[8, 2]``.
    """
    angles = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    return _mixture("ring", 2 * torch.stack([angles.cos(), angles.sin()], 1), 0.02, seed=1)


def grid() -> Dataset:
    """Twenty-five Gaussians at the points of {-4, -2, 0, 2, 4} x {-4, -2, 0, 2, 4}, with standard deviation 0.05.

    Source: Srivastava et al., "VEEGAN" (2017), sec. 4.1; the spacing and the variance 0.0025 as in Lin, Khetan, Fanti,
        Oh, "PacGAN" (2018), sec. 4.1.

    Returns:
        samples ``[10000, 2]``, float32; labels 0..24, five for each x in rising order; modes ``[25, 2]``.
    """
    ticks = torch.arange(-4, 5, 2, dtype=torch.float64)
    return _mixture("grid", torch.cartesian_prod(ticks, ticks), 0.05, seed=2)


def two_gaussians() -> Dataset:
    """Two Gaussians around (-2, 0) and (2, 0), with standard deviation 0.5: eight deviations apart.

    Returns:
        samples ``[10000, 2]``, float32; labels 0 (left) and 1; modes ``[2, 2]``.
    """
    return _mixture("two-gaussians", torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64), 0.5, seed=3)


def swiss_roll() -> Dataset:
    """A spiral: (t cos t, t sin t) / 7.5 for t = 1.5 pi (1 + 2 u), u uniform on [0, 1], plus noise.

    Source: Marsland, "Machine Learning: An Algorithmic Perspective" (2009), ch. 10, as scikit-learn's make_swiss_roll
        has it, without the coordinate across; the noise of 0.25 before the division by 7.5 as in the experiments of
        Gulrajani et al., "Improved Training of Wasserstein GANs" (2017), sec. 3.2.

    Returns:
        samples ``[10000, 2]``, float32, no labels.
    """
    random = torch.Generator().manual_seed(4)
    t = 1.5 * math.pi * (1 + 2 * torch.rand(SAMPLES, generator=random, dtype=torch.float64))
    noise = 0.25 * torch.randn(SAMPLES, 2, generator=random, dtype=torch.float64)
    spiral = t[:, None] * torch.stack([t.cos(), t.sin()], 1)
    return Dataset("swiss-roll", ((spiral + noise) / 7.5).float())


def segments(theta: float = 0.0, n: int = SAMPLES, *, seed: int = 5) -> Dataset:
    """The vertical segment of length one at ``theta``: points (theta, u), u uniform on [0, 1].

    Two such segments are the textbook's case of distributions without overlap: their Kullback-Leibler divergence is
    infinite and their Jensen-Shannon divergence log 2, however near they are, while their Wasserstein distance is the
    distance of their thetas. It is so for the samples too when both are drawn from the same seed.

    Source: Arjovsky, Chintala, Bottou, "Wasserstein GAN" (2017), example 1.

    Args:
        theta: the first coordinate of every sample.
        n: how many samples, at least 1.
        seed: of u.

    Returns:
        samples ``[n, 2]``, float32, no labels, named "segments:THETA".

    Raises:
        ValueError: ``theta`` is not finite as float32, or ``n`` below 1.
    """
    check_count("n", n)
    if not abs(theta) <= torch.finfo(torch.float32).max:
        raise ValueError(f"theta must be a finite number in float32, got {theta}")
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return Dataset(f"segments:{float(theta)}", torch.stack([torch.full((n,), float(theta)), u], 1))


def _mixture(name: str, modes: Tensor, std: float, *, seed: int) -> Dataset:
    labels = torch.arange(SAMPLES) % len(modes)
    noise = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    samples = modes[labels] + std * noise
    return Dataset(name, samples.float(), labels, modes.float(), std)
