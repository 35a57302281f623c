"""AlphaGAN (Rosca, Lakshminarayanan, Warde-Farley and Mohamed 2017, arXiv:1706.04987)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipgan import models
from lipgan._checks import check_choice
from lipgan.recipe import Recipe
from lipgan.systems._encoder import EncoderDecoder, NoisyEncoder, coded, critic_of
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["AlphaGAN", "SampleAndCodeCritics"]


# Those whose scores tell real from fake by their sign, so that minus a score is something to minimize.
LOSSES = ("non-saturating", "minimax", "hinge", "wasserstein")


class AlphaGAN(GAN):
    """An autoencoder with a critic of samples and a critic of codes: no likelihood, and a posterior without a density.

    Both densities that the lower bound of a variational autoencoder asks for become scores. The critic of samples D
    tells data from reconstructions and from samples, the critic of codes C the prior ``z ~ N(0, 1)`` from codes
    ``E(x)``. Where the scores are logarithms of ratios of densities, as for the losses with logarithms, ``-D(G(z))`` is
    the paper's ``R_D = -log D + log(1 - D)`` and ``-C(E(x))`` its ``R_C``, and its algorithm 1 is::

        encoder:  reconstruction * E |x - G(E(x))| - E C(E(x))
        decoder:  reconstruction * E |x - G(E(x))| - (E D(G(E(x))) + E D(G(z))) / 2
        critics:  the loss of the recipe, for D half against G(E(x)) and half against G(z), for C against E(x)

    with means of absolute differences. The encoder learns nothing from D, as there. Samples are decoded noise; the
    estimate is D's, between data and samples, for the loss of the recipe.

    What is changed: the two kinds of fake samples weigh as much as the real ones together, where the paper sums them;
    the paper's two critics and two updates of the autoencoder in turn are one update each. The encoder takes noise as
    an input. Codes and noise of points of the plane have two numbers, whatever the recipe says. The critic of codes is
    the architecture "mlp".

    Options:
        reconstruction: the weight; lambda of the paper.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"reconstruction": 10.0})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "conditioning", "minibatch", "generator_objective", "penalty")
        check_choice("loss", self.recipe.loss, LOSSES)
        if self.option("reconstruction") < 0:
            raise ValueError(f"reconstruction must be at least 0, got {self.option('reconstruction')!r}")

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`; codes are not longer than samples."""
        recipe = coded(recipe, shape)
        decoder, _ = super().build(dataclasses.replace(recipe, minibatch="none"), shape, classes)
        autoencoder = EncoderDecoder(NoisyEncoder(recipe, shape), decoder, recipe.latent_dim)
        return autoencoder, SampleAndCodeCritics(recipe, shape)

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The objectives of the two critics."""
        codes = self.codes(batch)
        fakes = self.generator(torch.cat([batch.z, codes])).to(batch.real.dtype).chunk(2)
        real, fake, restored = (self.seen(samples, batch) for samples in (batch.real, *fakes))
        if self.joined:
            scores, fake_scores, restored_scores = self.critic(torch.cat([real, fake, restored])).chunk(3)
        else:
            scores, fake_scores, restored_scores = (self.critic(samples) for samples in (real, fake, restored))
        loss = (self.loss.critic_loss(scores, fake_scores) + self.loss.critic_loss(scores, restored_scores)) / 2
        prior, ours = self.critic(torch.cat([batch.z, codes]), codes=True).chunk(2)
        of_codes = self.loss.critic_loss(prior, ours)
        estimate = self.loss.estimate(scores.detach(), fake_scores.detach())
        terms = {"critic_loss": loss, "estimate": estimate, "code_critic_loss": of_codes}
        return LossOutput(self.averaged(loss + of_codes, "critic"), terms)

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The reconstruction error, weighted, and minus the scores of samples, reconstructions and codes."""
        codes = self.codes(batch)
        error = (batch.real - self.generator(codes)).abs().mean()
        # The encoder is judged by the critic of codes alone.
        made = self.generator(torch.cat([batch.z, codes.detach()])).to(batch.real.dtype)
        adversarial = -self.critic(self.seen(made, batch)).mean()
        of_codes = -self.critic(codes, codes=True).mean()
        loss = self.option("reconstruction") * error + adversarial + of_codes
        terms = {"generator_loss": adversarial, "code_generator_loss": of_codes, "reconstruction": error}
        return LossOutput(self.averaged(loss, "generator"), terms)

    def codes(self, batch: Batch) -> Tensor:
        """The codes of the real samples, one each."""
        codes: Tensor = self.generator(batch.real, encode=True, noise=batch.randn(batch.z))
        return codes


class SampleAndCodeCritics(nn.Module):
    """A critic of samples, of the recipe's architecture, and a critic of codes.

    Args:
        recipe: of the architecture and the length of a code.
        shape: of a sample.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.samples = critic_of(recipe, shape)
        _, self.codes = models.build("mlp", (recipe.latent_dim,))

    def forward(self, x: Tensor, *, codes: bool = False) -> Tensor:
        """``x [B, *shape]``, or with ``codes`` ``[B, latent_dim]``, -> scores ``[B]``, high for data and the prior."""
        scores: Tensor = self.codes(x) if codes else self.samples(x)
        return scores
