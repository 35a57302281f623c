"""Adversarial variational Bayes (Mescheder, Nowozin and Geiger 2017, arXiv:1701.04722)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipgan._checks import as_whole, check_choice
from lipgan.objectives.divergences import widen
from lipgan.recipe import Recipe
from lipgan.systems._encoder import EncoderDecoder, NoisyEncoder, coded
from lipgan.systems._unused import refuse
from lipgan.systems.ali import JointCritic
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["AVB"]


# Those whose best scores are logarithms of a ratio of densities.
LOSSES = ("non-saturating", "minimax")


class AVB(GAN):
    """A variational autoencoder whose posterior can only be sampled: a critic tells how far it is from a Gaussian.

    The inference network takes noise as an input, ``z = E(x, eps)``, so that ``q(z|x)`` may be any distribution. Its
    density, which the evidence lower bound asks for, is in the scores of a critic of pairs: trained to tell ``(x, z)``
    with z of the posterior from ``(x, z)`` with z of a density r, its best scores are (the paper's eq. 3.3) ::

        T(x, z) = log q(z|x) - log r(z)

    Without contrast r is the prior ``p = N(0, 1)``. With it r is the Gaussian with the moments of the posterior (the
    paper's section 4): a critic cannot tell how far apart two distributions are that do not overlap, and posteriors
    lie far from the prior. The critic then sees z less the mean of the posterior, over its standard deviation, against
    standard normal numbers; mean and deviation are estimated from codes of the same x. Encoder and decoder maximize the
    lower bound of the log likelihood, in nats per sample ::

        ELBO = E_q [log p(x|z) - T(x, z) - log r(z) + log p(z)],    p(x|z) = N(x; G(z), s^2)

    in which neither T itself, at its best (proposition 2), nor r has a gradient. The mean of the last three terms is
    ``-KL(q(z|x) || p(z))``, whose critic's part is the estimate and all of which is logged as divergence. The ELBO that
    is logged is as good as the critic: one that underestimates the divergence shows it too large. Samples are decoded
    noise.

    What is simplified: the standard deviation of p(x|z) is given. Codes and noise of points of the plane have two
    numbers, whatever the recipe says.

    Options:
        std: s, of the likelihood.
        contrast: codes that the moments of each posterior are estimated from, at least 2; 0 for r = p.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"std": 0.5, "contrast": 16})
    JUDGED: ClassVar[str] = "pairs of a sample and a code"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "conditioning", "minibatch", "generator_objective", "penalty")
        # With one of these the scores are no logarithms of a ratio of densities.
        refuse(self.recipe, "label_smoothing", "instance_noise", "critic_norm", "weight_clip")
        check_choice("loss", self.recipe.loss, LOSSES)
        self.std = self.option("std")
        if self.std <= 0:
            raise ValueError(f"std must be positive, got {self.std!r}")
        self.contrast = as_whole("contrast", self.option("contrast"), 2) if self.option("contrast") else 0

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`; codes are not longer than samples."""
        recipe = coded(recipe, shape)
        decoder, _ = super().build(recipe, shape, classes)
        return EncoderDecoder(NoisyEncoder(recipe, shape), decoder, recipe.latent_dim), JointCritic(recipe, shape)

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The objective of telling codes of the data from Gaussian numbers, each beside the same data."""
        _, seen, _ = self.codes(batch)
        if self.joined:
            scores, prior = self.critic(torch.cat([batch.real, batch.real]), torch.cat([seen, batch.z])).chunk(2)
        else:
            scores, prior = self.critic(batch.real, seen), self.critic(batch.real, batch.z)
        loss = self.loss.critic_loss(scores, prior)
        estimate = widen(scores.detach()).mean()
        return LossOutput(self.averaged(loss, "critic"), {"critic_loss": loss, "estimate": estimate})

    def generator_loss(self, batch: Batch) -> LossOutput:
        """Minus the lower bound, but for the constant of the likelihood."""
        codes, seen, log_ratio = self.codes(batch)
        divergence = widen(self.critic(batch.real, seen)).mean() + log_ratio
        error = (widen(batch.real) - widen(self.generator(codes))).flatten(1).square().sum(1).mean()
        loss = divergence + error / (2 * self.std**2)
        constant = 0.5 * batch.real[0].numel() * math.log(2 * math.pi * self.std**2)
        terms = {"generator_loss": loss, "elbo": -loss.detach() - constant, "divergence": divergence.detach()}
        return LossOutput(self.averaged(loss, "generator"), terms)

    def codes(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of the data, what the critic sees of them, and the mean of ``log r - log p`` at them."""
        codes: Tensor = self.generator(batch.real, encode=True, noise=batch.randn(batch.z))
        if not self.contrast:
            return codes, codes, torch.zeros((), device=codes.device)
        with torch.no_grad():
            noise = batch.randn(batch.z.unsqueeze(1).expand(-1, self.contrast, -1))
            std, mean = torch.std_mean(widen(self.generator(batch.real, encode=True, noise=noise)), 1)
            std = std.clamp_min(1e-6)
        z = widen(codes)
        seen = (z - mean) / std
        log_ratio = 0.5 * (z.square() - seen.square()) - std.log()
        return codes, seen.to(codes.dtype), log_ratio.sum(1).mean()
