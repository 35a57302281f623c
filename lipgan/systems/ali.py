"""Adversarially learned inference, BiGAN and VEEGAN: a critic of samples together with their codes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipgan._checks import check_choice
from lipgan.recipe import Recipe
from lipgan.systems._encoder import Encoder, EncoderDecoder, beside, coded, critic_of
from lipgan.systems._readout import body_of
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["ALI", "JointCritic"]


# Those in which the sign of the scores tells real from fake, so that -D is the critic of the encoder.
LOSSES = ("minimax", "non-saturating", "hinge", "wasserstein")


class ALI(GAN):
    """A generator and an encoder against one critic, which is shown pairs of a sample and a code.

    Its real pairs are ``(x, E(x))`` of data x, its fake ones ``(G(z), z)`` of noise z. Where it cannot tell them apart,
    their distributions are equal: samples are distributed like the data, codes like the noise, and E inverts G. With
    the losses of the recipe for scores of pairs::

        critic:     critic_loss(D(x, E(x)), D(G(z), z))
        generator:  generator_loss(D(G(z), z)) + generator_loss(-D(x, E(x))) + reconstruction * E |z - E(G(z))|^2 / d

    with d the numbers of z. Without the last term that is BiGAN (Donahue, Krahenbuhl and Darrell 2017,
    arXiv:1605.09782, with inverted labels for the generator) and ALI (Dumoulin et al. 2017, arXiv:1606.00704);
    with it VEEGAN (Srivastava et al. 2017, arXiv:1705.07761), whose encoder has to tell apart samples of different
    noise, so that dropping modes costs.

    The encoder is Gaussian, as ALI's and VEEGAN's; BiGAN's is deterministic. Codes and noise of points of the plane
    have two numbers, whatever the recipe says: codes that lie on a surface are told from noise without effort.

    What is simplified: VEEGAN's networks here have ALI's losses for the scores, where the paper's generator minimizes
    the score itself; the error of the restored noise is that of the mean of the codes.

    Options:
        reconstruction: the weight of the error of the restored noise; 0 for ALI, positive for VEEGAN.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"reconstruction": 0.0})
    JUDGED: ClassVar[str] = "pairs of a sample and a code"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "conditioning", "minibatch", "generator_objective", "penalty")
        if self.option("reconstruction") < 0:
            raise ValueError(f"reconstruction must be at least 0, got {self.option('reconstruction')!r}")
        check_choice("loss", self.recipe.loss, LOSSES)

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`; codes are not longer than samples."""
        recipe = coded(recipe, shape)
        decoder, _ = super().build(recipe, shape, classes)
        encoder = Encoder(recipe, shape)
        return EncoderDecoder(encoder, decoder, recipe.latent_dim), JointCritic(recipe, shape)

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The objective of telling data with their codes from samples with their noise."""
        real, fake = self.pairs(batch)
        real_scores, fake_scores = self.scores(real, fake)
        loss = self.loss.critic_loss(real_scores, fake_scores)
        estimate = self.loss.estimate(real_scores.detach(), fake_scores.detach(), loss.detach())
        return LossOutput(self.averaged(loss, "critic"), {"critic_loss": loss, "estimate": estimate})

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The objectives of generator and encoder, which are on one side, and the error of the restored noise."""
        real, fake = self.pairs(batch)
        real_scores, fake_scores = self.scores(real, fake)
        loss = self.loss.generator_loss(fake_scores) + self.loss.generator_loss(-real_scores)
        terms = {"generator_loss": loss}
        weight = self.option("reconstruction")
        if weight:
            samples, z = fake
            terms["reconstruction"] = (z - self.generator(samples, encode=True)).square().mean()
            loss = loss + weight * terms["reconstruction"]
        return LossOutput(self.averaged(loss, "generator"), terms)

    def pairs(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Data with their codes, and samples with their noise."""
        codes = self.generator(batch.real, encode=True, noise=batch.randn(batch.z))
        return (self.seen(batch.real, batch), codes), (self.seen(self.generator(batch.z), batch), batch.z)

    def scores(self, real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The critic's scores of both kinds of pairs."""
        if not self.joined:
            return self.critic(*real), self.critic(*fake)
        samples, codes = (torch.cat(both) for both in zip(real, fake, strict=True))
        real_scores, fake_scores = self.critic(samples, codes).chunk(2)
        return real_scores, fake_scores


class JointCritic(nn.Module):
    """Samples ``[B, *shape]`` and codes ``[B, latent_dim]`` -> scores ``[B]``.

    The features that a critic of the recipe's architecture finds in the sample, beside those of the code, go through
    two further layers.

    Args:
        recipe: of the architecture and the length of a code.
        shape: of a sample.
        width: units of the layers that see codes.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, ...], width: int = 256) -> None:
        super().__init__()
        self.body, features = body_of(critic_of(recipe, shape))
        self.codes, self.head = beside(recipe, features, width, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """``x [B, *shape]`` and ``codes [B, latent_dim]``."""
        scores: Tensor = self.head(torch.cat([self.body(x).flatten(1), self.codes(codes)], 1))
        return scores.squeeze(1)
