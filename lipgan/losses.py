"""Adversarial objectives, as pairs of functions of the critic's scores.

A loss knows nothing of networks: it maps scores to a 0-dim tensor that is minimized. Each is a row of
`LOSSES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from lipgan.registry import lookup

__all__ = ["LOSSES", "Hinge", "Loss", "Wasserstein", "get", "names"]


class Loss(Protocol):
    """What a trainer asks of an objective. Scores are ``[B]``, floating point; results are 0-dim."""

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """What the critic minimizes."""
        ...

    def generator_loss(self, fake_scores: Tensor) -> Tensor:
        """What the generator minimizes."""
        ...


@dataclass(frozen=True)
class Hinge:
    """The hinge loss of Lim and Ye (2017, arXiv:1705.02894), used by SN-GAN (Miyato et al. 2018, eq. 16, 17).

    ``critic = E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))`` and ``generator = -E D(G(z))``. A critic
    that cannot tell the two apart (all scores 0) has loss 2; one that separates them by a margin of 1 has 0.
    """

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> 0-dim."""
        return F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()

    def generator_loss(self, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of fake samples -> 0-dim."""
        return -fake_scores.mean()


@dataclass(frozen=True)
class Wasserstein:
    """The loss of WGAN (Arjovsky et al. 2017, arXiv:1701.07875, Algorithm 1), of a critic that is kept Lipschitz.

    ``critic = E D(G(z)) - E D(x)`` and ``generator = -E D(G(z))``. Minus the critic's loss estimates the Wasserstein-1
    distance between the two distributions, times the critic's Lipschitz constant, from below.
    """

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> 0-dim."""
        return fake_scores.mean() - real_scores.mean()

    def generator_loss(self, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of fake samples -> 0-dim."""
        return -fake_scores.mean()


LOSSES: Mapping[str, Loss] = MappingProxyType({"hinge": Hinge(), "wasserstein": Wasserstein()})


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return sorted(LOSSES)


def get(name: str) -> Loss:
    """The loss called ``name``.

    Raises:
        ValueError: unknown name; the message names the nearest ones.
    """
    return lookup(LOSSES, name, "loss")
