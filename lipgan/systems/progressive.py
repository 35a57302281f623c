"""Progressive growing of GANs (Karras, Aila, Laine and Lehtinen 2018, arXiv:1710.10196)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.models.sizes import sides, square
from lipgan.nn import MinibatchStdDev
from lipgan.objectives.losses import Loss
from lipgan.recipe import Recipe
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["GrowingCritic", "GrowingGenerator", "Progressive"]

# Parts that the fading in of one resolution has: buffers of whole numbers are not averaged over time.
_PARTS = 1 << 16


class Progressive(GAN):
    """Training begins with small images, and both networks grow with the progress of the run.

    With resolutions 0, ..., n - 1 the run has ``2n - 1`` phases of equal length: resolution 0 is trained, then each
    further one is faded in and trained. While resolution s is faded in, the output of the generator is
    ``alpha`` times what its new layers make and ``1 - alpha`` times the upsampled output of the layers before them,
    alpha from 0 to 1 (the paper's figure 2). The critic mixes likewise, and so do the real images: with their own copy
    at the resolution before.

    The networks are small forms of the paper's table 2: equalized learning rates (weights from N(0, 1), scaled where
    they are used), pixelwise normalization in the generator, the minibatch standard deviation before the last layers of
    the critic. The recipe has the losses of the paper's appendix A.1: WGAN-GP, with ``drift`` times the mean square of
    the real scores, and n_critic = 1.

    What is simplified: phases are shares of the run, not numbers of images; both networks have 64 channels at every
    resolution; tanh ends the generator; when a resolution is added, the optimizers are not reset and the batch does not
    shrink. On vectors nothing grows: both networks are three such layers and one more.

    Options:
        drift: weight of the mean square of the real scores.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"drift": 0.001})
    SCHEDULED = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "architecture", "conditioning", "minibatch", "batch_norm", "critic_norm")
        self.loss = _Drifting(self.loss, self.option("drift"))

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`."""
        if len(shape) == 1:
            return VectorGenerator(shape[0], recipe.latent_dim), VectorCritic(shape[0])
        size, channels = square("progressive", shape)
        return GrowingGenerator(size, channels, recipe.latent_dim), GrowingCritic(size, channels)

    def begin_step(self) -> None:
        """Lets both networks grow to what the progress of the run asks for."""
        for network in (self.generator, self.critic):
            if isinstance(network, _Growing):
                network.grow(growth(self.progress, len(network.sides)))

    def critic_loss(self, batch: Batch) -> LossOutput:
        """As `GAN`, on real samples as far as the networks have grown; "growth" among the terms says how far."""
        outcome = super().critic_loss(self.faded(batch))
        if isinstance(self.critic, GrowingCritic):
            outcome.terms["growth"] = self.critic.growth.to(outcome.loss) / _PARTS
        return outcome

    def generator_loss(self, batch: Batch) -> LossOutput:
        """As `GAN`."""
        return super().generator_loss(self.faded(batch))

    def fake(self, batch: Batch) -> Tensor:
        """Samples at the resolution of the moment."""
        if not isinstance(self.generator, GrowingGenerator):
            return super().fake(batch)
        samples: Tensor = self.generator(batch.z, full=False)
        return samples

    def faded(self, batch: Batch) -> Batch:
        """The batch with real samples at the resolution of the moment, mixed as the generator mixes its own."""
        if not isinstance(self.critic, GrowingCritic):
            return batch
        return dataclasses.replace(batch, real=self.critic.faded(batch.real))


class _Drifting:
    """A loss whose critic keeps the real scores near 0, which the Wasserstein loss leaves free to drift."""

    def __init__(self, loss: Loss, weight: float) -> None:
        self.loss, self.weight = loss, weight
        self.paired, self.generator_loss, self.estimate = loss.paired, loss.generator_loss, loss.estimate

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """The critic's loss and ``weight`` times the mean square of the real scores."""
        return self.loss.critic_loss(real_scores, fake_scores) + self.weight * real_scores.square().mean()


def growth(progress: float, resolutions: int) -> float:
    """How far networks of so many resolutions have grown after a share of the run: s when resolution s is trained
    alone, between s and s + 1 while s + 1 is faded in."""
    phase = progress * (2 * resolutions - 1)
    stage = min(math.floor(phase / 2), resolutions - 1)
    return min(stage + max(phase - 2 * stage - 1, 0.0), resolutions - 1.0)


class _Growing(nn.Module):
    """What the two networks share: the sides of the resolutions, and how far the network has grown."""

    growth: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.sides = sides(size, channels)
        # A network by itself is full grown.
        self.register_buffer("growth", torch.tensor((len(self.sides) - 1) * _PARTS))

    def grow(self, growth: float) -> None:
        """To a value of `growth`."""
        self.growth.fill_(round(growth * _PARTS))

    def stage(self) -> tuple[int, float]:
        """The index of the resolution of the moment, and alpha."""
        whole, part = divmod(int(self.growth), _PARTS)
        return (whole, 1.0) if part == 0 else (whole + 1, part / _PARTS)


class GrowingGenerator(_Growing):
    """Noise ``[B, latent_dim]`` -> images ``[B, channels, size, size]`` in [-1, 1], or smaller ones.

    Args:
        size: pixels a side, a multiple of 4 from 8 to 128.
        channels: 1 or 3.
        latent_dim: length of one noise vector.
        width: channels of all layers.
    """

    def __init__(self, size: int, channels: int, latent_dim: int = 64, width: int = 64) -> None:
        super().__init__(size, channels)
        self.latent_dim = latent_dim
        first = self.sides[0]
        self.start = nn.Sequential(
            _PixelNorm(),
            EqualizedLinear(latent_dim, width * first**2, gain=math.sqrt(2) / 4),
            nn.Unflatten(1, (width, first, first)),
            nn.LeakyReLU(0.2),
            _PixelNorm(),
            *_convolution(width, width, normalized=True),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(side),
                *_convolution(width, width, normalized=True),
                *_convolution(width, width, normalized=True),
            )
            for side in self.sides[1:]
        )
        self.outputs = nn.ModuleList(EqualizedConv2d(width, channels, 1, gain=1.0) for _ in self.sides)

    def forward(self, z: Tensor, *, full: bool = True) -> Tensor:
        """``z [B, latent_dim]`` -> images, those of the moment's resolution upsampled to all pixels, or with
        ``full=False`` as they are."""
        stage, alpha = self.stage()
        h: Tensor = self.start(z)
        before = h
        for block in self.blocks[:stage]:
            before, h = h, block(h)
        images: Tensor = self.outputs[stage](h).tanh()
        if alpha < 1:
            coarse = _resized(self.outputs[stage - 1](before).tanh(), self.sides[stage])
            images = torch.lerp(coarse, images, alpha)
        return _resized(images, self.sides[-1]) if full else images


class GrowingCritic(_Growing):
    """Images of the moment's resolution, or of more pixels -> scores ``[B]``.

    Args:
        size, channels, width: as of `GrowingGenerator`.
    """

    def __init__(self, size: int, channels: int, width: int = 64) -> None:
        super().__init__(size, channels)
        first = self.sides[0]
        self.inputs = nn.ModuleList(
            nn.Sequential(EqualizedConv2d(channels, width, 1), nn.LeakyReLU(0.2)) for _ in self.sides
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*_convolution(width, width), *_convolution(width, width), _Pool(before))
            for before, _ in pairwise(self.sides)
        )
        self.end = nn.Sequential(
            MinibatchStdDev(),
            *_convolution(width + 1, width),
            nn.Flatten(),
            EqualizedLinear(width * first**2, width),
            nn.LeakyReLU(0.2),
            EqualizedLinear(width, 1, gain=1.0),
        )

    def faded(self, images: Tensor) -> Tensor:
        """Images of all pixels at the resolution of the moment, mixed with their copy at the one before."""
        stage, alpha = self.stage()
        fine = _pooled(images, self.sides[stage])
        if alpha == 1:
            return fine
        coarse = _resized(_pooled(images, self.sides[stage - 1]), self.sides[stage])
        return torch.lerp(coarse, fine, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, channels, side, side]`` -> scores ``[B]``; images of more pixels are pooled first."""
        stage, alpha = self.stage()
        x = _pooled(x, self.sides[stage])
        h: Tensor = self.inputs[stage](x)
        for k in reversed(range(stage)):
            h = self.blocks[k](h)
            if alpha < 1 and k == stage - 1:
                h = torch.lerp(self.inputs[k](_pooled(x, self.sides[k])), h, alpha)
        scores: Tensor = self.end(h)
        return scores.squeeze(1)


class VectorGenerator(nn.Module):
    """Noise ``[B, latent_dim]`` -> vectors ``[B, d]``, by the layers of `GrowingGenerator` without pixels."""

    def __init__(self, d: int, latent_dim: int, width: int = 128) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.body = nn.Sequential(*_perceptron(latent_dim, width), EqualizedLinear(width, d, gain=1.0))

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, latent_dim]``."""
        return cast(Tensor, self.body(z))


class VectorCritic(nn.Module):
    """Vectors ``[B, d]`` -> scores ``[B]``, by the layers of `GrowingCritic` without pixels."""

    def __init__(self, d: int, width: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_perceptron(d, width), MinibatchStdDev(), EqualizedLinear(width + 1, 1, gain=1.0), nn.Flatten(0)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, d]``."""
        return cast(Tensor, self.body(x))


def _perceptron(entries: int, width: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [EqualizedLinear(entries, width), nn.LeakyReLU(0.2)]
        entries = width
    return layers


class EqualizedConv2d(nn.Conv2d):
    """A convolution that keeps the resolution, with weights of variance 1 that are scaled where they are used: by
    ``gain / sqrt(entries of one output)``. All layers then learn at one pace (the paper's section 4.1)."""

    def __init__(self, channels: int, out_channels: int, kernel: int, gain: float = math.sqrt(2)) -> None:
        super().__init__(channels, out_channels, kernel, padding=kernel // 2)
        self.scale = gain / math.sqrt(channels * kernel**2)
        _unit(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class EqualizedLinear(nn.Linear):
    """The like of `EqualizedConv2d`."""

    def __init__(self, entries: int, results: int, gain: float = math.sqrt(2)) -> None:
        super().__init__(entries, results)
        self.scale = gain / math.sqrt(entries)
        _unit(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


def _unit(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.normal_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def _convolution(channels: int, out_channels: int, *, normalized: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = [EqualizedConv2d(channels, out_channels, 3), nn.LeakyReLU(0.2)]
    return [*layers, _PixelNorm()] if normalized else layers


class _PixelNorm(nn.Module):
    """``x / sqrt(mean of x^2 over channels + 1e-8)``, the paper's section 4.2."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class _Pool(nn.Module):
    """The mean over squares of pixels, down to a given side."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return _pooled(x, self.side)


def _pooled(x: Tensor, side: int) -> Tensor:
    if x.shape[-1] == side:
        return x
    if x.shape[-1] % side == 0:
        return F.avg_pool2d(x, x.shape[-1] // side)
    return F.adaptive_avg_pool2d(x, side)


def _resized(x: Tensor, side: int) -> Tensor:
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="nearest")
