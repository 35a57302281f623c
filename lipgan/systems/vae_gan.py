"""VAE/GAN (Larsen, Sonderby, Larochelle and Winther 2016, arXiv:1512.09300)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lipgan.objectives.divergences import widen
from lipgan.recipe import Recipe
from lipgan.systems._readout import Readout
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["VAEGAN", "Parts", "VariationalGenerator"]


class VAEGAN(GAN):
    """A variational autoencoder whose decoder is the generator, and whose likelihood is of the critic's features.

    ``L = L_prior + L_like + L_GAN`` with an encoder ``q(z|x) = N(mu(x), sigma(x)^2)`` and the prior ``N(0, 1)``::

        L_prior = KL(q(z|x) || p(z)) = 1/2 sum (mu^2 + sigma^2 - 1 - log sigma^2)
        L_like  = -E_q log N(D_l(x); D_l(G(z)), 1) = 1/2 sum (D_l(x) - D_l(G(z)))^2 + constant
        L_GAN   = log D(x) + log(1 - D(G(z)))

    where ``D_l`` are the critic's features. Each network minimizes its part (the paper's algorithm 1): the encoder
    ``L_prior + L_like``, the decoder ``gamma L_like - L_GAN``, the critic ``L_GAN``. As there, samples from the prior
    and reconstructions both count as fake, here with weight 1/2 each, so that they weigh as much as the real ones.

    The decoder's objective is the recipe's, the non-saturating one in place of ``-L_GAN``. The encoder has the layers
    of the critic, and the features are the critic's last ones, where the paper's are of a layer in its middle.

    Options:
        gamma: of the decoder's loss; the lectures' sum has 1.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"gamma": 1.0})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "generator_objective", "conditioning")
        self.gamma = self.option("gamma")
        if self.gamma <= 0:
            raise ValueError(f"gamma must be positive, got {self.gamma!r}")

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """The decoder with its encoder, and the critic."""
        generator, critic = super().build(recipe, shape, classes)
        _, encoder = super().build(recipe, shape, classes)
        return VariationalGenerator(generator, Readout(encoder, 2 * recipe.latent_dim)), critic

    def critic_loss(self, batch: Batch) -> LossOutput:
        """L_GAN, of samples and of reconstructions."""
        parts = self.generator(batch.z, batch.real, batch.randn(batch.z))
        real = self.seen(batch.real, batch)
        fake, restored = self.seen(parts.samples, batch), self.seen(parts.restored, batch)
        real_output, fake_output = self.judge_both(real, fake, batch)
        restored_output = self.judge(restored, None)
        scores = real_output.scores
        loss = (
            self.loss.critic_loss(scores, fake_output.scores) + self.loss.critic_loss(scores, restored_output.scores)
        ) / 2
        estimate = self.loss.estimate(scores.detach(), fake_output.scores.detach())
        terms = {"critic_loss": loss, "estimate": estimate}
        if self.recipe.penalty != "none":
            terms["penalty"] = self.penalty(real, fake, batch)
            loss = loss + terms["penalty"]
        return LossOutput(self.averaged(loss, "critic"), terms)

    def generator_loss(self, batch: Batch) -> LossOutput:
        """L_prior and L_like of the encoder, gamma L_like and the objective of the decoder."""
        parts = self.generator(batch.z, batch.real, batch.randn(batch.z), encoder_share=1 / self.gamma)
        mean, log_variance = widen(parts.mean), widen(parts.log_variance)
        prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        real_output, restored_output = self.judge_both(batch.real, parts.restored, batch, full=True)
        difference = widen(real_output.features.detach()) - widen(restored_output.features)
        likelihood = 0.5 * difference.square().sum(1).mean()
        real_scores = self.judge(self.seen(batch.real, batch), None).scores if self.loss.paired else None
        objectives = [
            self.loss.generator_loss(self.judge(self.seen(samples, batch), None).scores, real_scores)
            for samples in (parts.samples, parts.decoded)
        ]
        objective = (objectives[0] + objectives[1]) / 2
        loss = prior + self.gamma * likelihood + objective
        terms = {"generator_loss": objective, "prior": prior, "likelihood": likelihood}
        return LossOutput(self.averaged(loss, "generator"), terms)


class Parts(NamedTuple):
    """What a `VariationalGenerator` makes of noise and of real samples.

    Attributes:
        samples: ``[B, ...]``, of the noise.
        restored: ``[B, ...]``, of codes of the real samples, with a gradient to the encoder.
        decoded: the same numbers, without.
        mean, log_variance: ``[B, latent_dim]``, of the codes.
    """

    samples: Tensor
    restored: Tensor
    decoded: Tensor
    mean: Tensor
    log_variance: Tensor


class VariationalGenerator(nn.Module):
    """A generator and an encoder from samples to normal distributions of its noise.

    Args:
        generator: without labels.
        encoder: ``[B, ...]`` -> ``[B, 2 latent_dim]``, means and logarithms of variances.
    """

    def __init__(self, generator: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.generator, self.encoder = generator, encoder
        self.latent_dim = generator.latent_dim

    def forward(
        self, z: Tensor, real: Tensor | None = None, noise: Tensor | None = None, *, encoder_share: float = 1.0
    ) -> Tensor | Parts:
        """``z [B, latent_dim]`` -> samples ``[B, ...]``; with ``real`` and ``noise`` of the codes, `Parts`.

        ``encoder_share`` multiplies the gradient that goes through ``restored`` to the encoder.
        """
        samples: Tensor = self.generator(z)
        if real is None or noise is None:
            return samples
        mean, log_variance = self.encoder(real).chunk(2, 1)
        code = mean + (0.5 * log_variance).exp() * noise
        fixed = code.detach()
        restored = self.generator(fixed + encoder_share * (code - fixed))
        decoded = self.generator(fixed) if torch.is_grad_enabled() else restored
        return Parts(samples, restored, decoded, mean, log_variance)
