"""Laplacian-pyramid GAN (Denton, Chintala, Szlam and Fergus 2015, arXiv:1506.05751)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan import models
from lipgan.recipe import Recipe
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["LAPGAN", "Level", "PyramidCritic", "PyramidGenerator", "pyramid"]

# The coarsest images have at least so many pixels a side, as in the paper.
_COARSEST = 8


class LAPGAN(GAN):
    """One generator and one critic for each level of a Laplacian pyramid, coarse to fine.

    A level holds images ``I_k`` and their blurred copy ``l_k = u(d(I_k))``, downsampled and upsampled again; the
    pyramid is the differences ``h_k = I_k - l_k``, and the coarsest image itself. The generator of a level makes
    ``h_k`` of noise and ``l_k``; its critic is shown ``l_k`` and the sum of both, of real and of made differences.
    Sampling begins with the coarsest generator, which has only noise, and adds the levels one after the other, each
    conditioned on what those before have made (the paper's eq. 3 to 5). In training every level is conditioned on the
    real images, so that each is a conditional GAN of its own; the losses are the sums over the levels, the estimate is
    their mean.

    What is simplified: all levels are trained at once, not one after the other; d is the mean over squares of 2 x 2
    pixels, and u repeats pixels, without the paper's Gaussian blur; the recipe's optimizer replaces SGD. As in the
    paper the noise of a finer level is one plane of numbers beside the image, and the coarsest level is fully
    connected. Images of fewer than 16 pixels a side, odd sides, and vectors have one level.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(
            self.recipe,
            "architecture",
            "conditioning",
            "minibatch",
            "batch_norm",
            "generator_objective",
            "instance_noise",
            "penalty",
            "critic_norm",
        )

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`."""
        return PyramidGenerator(shape, recipe.latent_dim), PyramidCritic(shape)

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The sum of the levels' objectives."""
        levels = self.generator(batch.z, real=batch.real)
        real, fake = self.critic(batch.real, pyramid(batch.real, len(levels))), self.critic(levels[-1].images, levels)
        losses = [self.loss.critic_loss(*scores) for scores in zip(real, fake, strict=True)]
        with torch.no_grad():
            estimates = [self.loss.estimate(*scores) for scores in zip(real, fake, strict=True)]
        loss = torch.stack(losses).sum()
        terms = {"critic_loss": loss, "estimate": torch.stack(estimates).mean()}
        terms |= {f"critic_loss_{k}": value for k, value in enumerate(losses) if len(losses) > 1}
        return LossOutput(self.averaged(loss, "critic"), terms)

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The sum of the levels' objectives."""
        levels = self.generator(batch.z, real=batch.real)
        fake = self.critic(levels[-1].images, levels)
        real = self.critic(batch.real, pyramid(batch.real, len(levels))) if self.loss.paired else fake
        pairs = zip(fake, real, strict=True)
        loss = torch.stack([self.loss.generator_loss(*scores) for scores in pairs]).sum()
        return LossOutput(self.averaged(loss, "generator"), {"generator_loss": loss})


class Level(NamedTuple):
    """Images of one level of a pyramid.

    Attributes:
        images: ``[B, channels, side, side]``, or ``[B, *shape]`` of a pyramid with one level.
        low: what they look like without their finest detail, of the same shape; None for the coarsest level.
    """

    images: Tensor
    low: Tensor | None


def pyramid(images: Tensor, levels: int) -> list[Level]:
    """The levels of images, coarsest first."""
    found = []
    for _ in range(levels - 1):
        coarse = F.avg_pool2d(images, 2)
        found.append(Level(images, _doubled(coarse)))
        images = coarse
    return [Level(images, None), *reversed(found)]


def _doubled(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=2, mode="nearest")


def _sides(shape: tuple[int, ...]) -> list[int]:
    """The sides of the levels, coarsest first; one entry for vectors."""
    if len(shape) == 1:
        return [1]
    sides = [shape[-1]]
    while sides[0] % 2 == 0 and sides[0] // 2 >= _COARSEST:
        sides.insert(0, sides[0] // 2)
    return sides


def _coarsest(shape: tuple[int, ...], sides: list[int]) -> tuple[int, ...]:
    return shape if len(shape) == 1 else (shape[0], sides[0], sides[0])


def _details(channels: int, width: int) -> nn.Sequential:
    """From the blurred image and a plane of noise to the difference."""
    return nn.Sequential(
        nn.Conv2d(channels + 1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, channels, 3, padding=1),
    )


def _judge(channels: int, side: int, width: int) -> nn.Sequential:
    """From the image and its blurred copy to a score."""
    pixels = math.ceil(math.ceil(side / 2) / 2) ** 2
    return nn.Sequential(
        nn.Conv2d(2 * channels, width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(width * pixels, 1),
    )


class PyramidGenerator(nn.Module):
    """Noise ``[B, latent_dim]`` of all levels -> samples ``[B, *shape]``, images in [-1, 1].

    Args:
        shape: ``(channels, size, size)``, or ``(d,)``.
        latent_dim: numbers of noise for the coarsest level; finer ones have a plane each.
        width: channels of the layers of the finer levels.

    Attributes:
        latent_dim: numbers of noise for all levels.
    """

    def __init__(self, shape: tuple[int, ...], latent_dim: int = 64, width: int = 32) -> None:
        super().__init__()
        self.sides = _sides(shape)
        self.coarsest = models.build("mlp", _coarsest(shape, self.sides), latent_dim=latent_dim)[0]
        self.details = nn.ModuleList(_details(shape[0], width) for _ in self.sides[1:])
        self.splits = [latent_dim, *(side**2 for side in self.sides[1:])]
        self.latent_dim = sum(self.splits)

    def forward(self, z: Tensor, *, real: Tensor | None = None) -> Tensor | list[Level]:
        """``z [B, latent_dim]`` -> samples, each level conditioned on what the one before made.

        With ``real [B, *shape]`` the levels apart, coarsest first, each conditioned on the real images.
        """
        noise = torch.split(z, self.splits, 1)
        lows = [None] * len(self.sides) if real is None else [level.low for level in pyramid(real, len(self.sides))]
        images: Tensor = self.coarsest(noise[0])
        levels = [Level(images, None)]
        for details, numbers, side, given in zip(self.details, noise[1:], self.sides[1:], lows[1:], strict=True):
            low = _doubled(images) if given is None else given
            images = low + details(torch.cat([low, numbers.view(-1, 1, side, side)], 1))
            levels.append(Level(images, low))
        if real is not None:
            return levels
        # The sum of a level leaves the range of images; only the finest shows.
        return images.clamp(-1, 1) if self.details else images


class PyramidCritic(nn.Module):
    """Samples ``[B, *shape]`` -> the sum of the scores of their levels, ``[B]``, or with the levels ``[levels, B]``.

    Args:
        shape, width: as of `PyramidGenerator`.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 32) -> None:
        super().__init__()
        self.sides = _sides(shape)
        self.coarsest = models.build("mlp", _coarsest(shape, self.sides))[1]
        self.details = nn.ModuleList(_judge(shape[0], side, width) for side in self.sides[1:])

    def forward(self, x: Tensor, levels: list[Level] | None = None) -> Tensor:
        """``x [B, *shape]``; ``levels``, coarsest first, take the place of those of ``x`` and are scored apart."""
        seen = pyramid(x, len(self.sides)) if levels is None else levels
        scores = [self.coarsest(seen[0].images)]
        for judge, (images, low) in zip(self.details, seen[1:], strict=True):
            assert low is not None, "only the coarsest level has none"
            scores.append(judge(torch.cat([images, low], 1)).squeeze(1))
        stacked = torch.stack(scores)
        return stacked.sum(0) if levels is None else stacked
