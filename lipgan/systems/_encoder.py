"""From samples to codes, by the layers of a critic."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor, nn

from lipgan import models
from lipgan.recipe import Recipe
from lipgan.systems._readout import Readout, body_of

__all__ = ["Encoder", "EncoderDecoder", "NoisyEncoder", "beside", "coded", "critic_of"]


def coded(recipe: Recipe, shape: tuple[int, ...]) -> Recipe:
    """The recipe with codes of at most as many numbers as a sample has.

    Two coordinates of a point cannot fill 16 of its code.
    """
    return dataclasses.replace(recipe, latent_dim=min(recipe.latent_dim, math.prod(shape)))


def critic_of(recipe: Recipe, shape: tuple[int, ...]) -> nn.Module:
    """A fresh critic of the recipe's architecture."""
    return models.build(models.serving(recipe.architecture, shape), shape)[1]


class Encoder(nn.Module):
    """Samples ``[B, *shape]`` -> codes ``[B, latent_dim]``: a critic of the recipe's architecture with another
    last layer.

    A code is normally distributed about its mean, with standard deviations that depend on the sample as the mean does.

    Args:
        recipe: of the architecture and the length of a code.
        shape: of a sample.

    Raises:
        ValueError: an architecture whose critic does not end in a linear layer.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.readout = Readout(critic_of(recipe, shape), 2 * recipe.latent_dim)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Means for ``x [B, *shape]``, or with ``noise [B, latent_dim]``, standard normal, codes."""
        mean, log_std = self.readout(x).chunk(2, 1)
        return cast(Tensor, mean) if noise is None else mean + log_std.exp() * noise


def beside(recipe: Recipe, features: int, width: int, outputs: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Layers for a second input ``[B, latent_dim]``, and those for it and features, joined: ``[B, features + width]``.

    Args:
        recipe: of the length of the second input.
        features: of the first one.
        width: units of a layer.
        outputs: numbers of a result.
    """
    entry = nn.Sequential(nn.Linear(recipe.latent_dim, width), nn.LeakyReLU(0.2))
    return entry, nn.Sequential(
        nn.Linear(features + width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )


class NoisyEncoder(nn.Module):
    """Samples ``[B, *shape]`` -> codes ``[B, latent_dim]`` of any distribution: the noise goes through the network.

    The features that a critic of the recipe's architecture finds in the sample, beside the noise, go through two
    further layers. Codes can be drawn, but their density is known to nobody.

    Args:
        recipe: of the architecture and the length of a code, which is that of the noise too.
        shape: of a sample.
        width: units of the layers that see noise.

    Raises:
        ValueError: an architecture whose critic does not end in a linear layer.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, ...], width: int = 256) -> None:
        super().__init__()
        self.latent_dim = recipe.latent_dim
        self.body, features = body_of(critic_of(recipe, shape))
        self.noise, self.head = beside(recipe, features, width, recipe.latent_dim)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Codes of ``x [B, *shape]``, with ``noise [B, latent_dim]``, standard normal; without, those of noise 0.

        With ``noise [B, m, latent_dim]`` codes ``[B, m, latent_dim]``, m of each sample.
        """
        if noise is None:
            noise = x.new_zeros(len(x), self.latent_dim)
        features, entries = self.body(x).flatten(1), self.noise(noise)
        if noise.ndim == 3:
            features = features.unsqueeze(1).expand(-1, noise.shape[1], -1)
        codes: Tensor = self.head(torch.cat([features, entries], -1))
        return codes


class EncoderDecoder(nn.Module):
    """A decoder, which is the generator, and the encoder that answers it.

    Args:
        encoder: samples -> codes ``[B, latent_dim]``.
        decoder: noise ``[B, latent_dim]`` -> samples.
        latent_dim: numbers of a code.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.latent_dim = encoder, decoder, latent_dim

    def forward(self, x: Tensor, *, encode: bool = False, noise: Tensor | None = None) -> Tensor:
        """Codes -> samples, or with ``encode`` samples -> their codes by that noise.

        Without ``noise`` a Gaussian encoder gives the means of the codes.
        """
        return cast(Tensor, self.encoder(x, noise) if encode else self.decoder(x))
