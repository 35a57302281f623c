"""Adversarial autoencoder (Makhzani, Shlens, Jaitly, Goodfellow and Frey 2015, arXiv:1511.05644)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from lipgan import models
from lipgan.recipe import Recipe
from lipgan.systems._encoder import Encoder, EncoderDecoder, coded
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["AAE"]


class AAE(GAN):
    """An autoencoder whose codes a critic makes look like noise, so that its decoder is a generator.

    The critic judges codes: ``z ~ N(0, I)`` are its real samples, ``E(x)`` its fake ones. The autoencoder minimizes::

        weight * E |x - G(E(x))|^2 / d + (generator's loss of the scores of E(x))

    with d the numbers of a sample: the paper's reconstruction and regularization phases (section 2), which stand for
    the reconstruction and the Kullback-Leibler term of a VAE. Samples are decoded noise.

    The estimate is what the critic sees between the distribution of the codes and the noise, for the loss of the
    recipe.

    The encoder is Gaussian, the second of the paper's three. Codes and noise of points of the plane have two numbers,
    whatever the recipe says.

    What is simplified: the two phases of the autoencoder are one update of the sum; the noise has standard deviation 1,
    where the paper's experiments take up to 5. The critic of codes is the architecture "mlp", the encoder the critic of
    the recipe's architecture with another last layer.

    Options:
        reconstruction: the weight.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"reconstruction": 10.0})
    JUDGED: ClassVar[str] = "codes"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "conditioning", "generator_objective")

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`; codes are not longer than samples."""
        recipe = coded(recipe, shape)
        decoder, _ = super().build(dataclasses.replace(recipe, minibatch="none"), shape, classes)
        encoder = Encoder(recipe, shape)
        _, critic = models.build("mlp", (recipe.latent_dim,), minibatch=recipe.minibatch)
        return EncoderDecoder(encoder, decoder, recipe.latent_dim), critic

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The objective of telling noise from codes, and the recipe's penalty."""
        real, fake = self.seen(batch.z, batch), self.seen(self.codes(batch), batch)
        real_output, fake_output = self.judge_both(real, fake, batch)
        loss = self.loss.critic_loss(real_output.scores, fake_output.scores)
        estimate = self.loss.estimate(real_output.scores.detach(), fake_output.scores.detach(), loss.detach())
        terms = {"critic_loss": loss, "estimate": estimate}
        if self.recipe.penalty != "none":
            terms["penalty"] = self.penalty(real, fake, batch)
            loss = loss + terms["penalty"]
        return LossOutput(self.averaged(loss, "critic"), terms)

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The reconstruction error, weighted, and the adversarial loss of the codes."""
        codes = self.codes(batch)
        error = (batch.real - self.generator(codes)).square().mean()
        seen = self.seen(codes, batch)
        if self.loss.paired:
            real_output, fake_output = self.judge_both(self.seen(batch.z, batch), seen, batch)
            adversarial = self.loss.generator_loss(fake_output.scores, real_output.scores)
        else:
            adversarial = self.loss.generator_loss(self.judge(seen, None).scores)
        loss = self.option("reconstruction") * error + adversarial
        return LossOutput(self.averaged(loss, "generator"), {"generator_loss": adversarial, "reconstruction": error})

    def codes(self, batch: Batch) -> Tensor:
        """The codes of the real samples."""
        codes: Tensor = self.generator(batch.real, encode=True, noise=batch.randn(batch.z))
        return codes
