"""Boundary equilibrium GAN (Berthelot, Schumm and Metz 2017, arXiv:1703.10717)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipgan.models import AutoencoderCritic, Output
from lipgan.recipe import Recipe
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["BEGAN"]


class BEGAN(GAN):
    """An autoencoder as critic, and a weight that keeps the two networks in balance.

    With ``L(v)`` the error of the critic's reconstruction of v, the paper's objective is::

        L_D = L(x) - k_t L(G(z))
        L_G = L(G(z))
        k_{t+1} = k_t + lambda_k (gamma L(x) - L(G(z))),    kept within 0 and 1, k_0 = 0
        M = L(x) + |gamma L(x) - L(G(z))|

    k moves until the error of fake samples is gamma times that of real ones: a smaller gamma makes sharper samples of
    less variety. M, logged as "estimate", is the paper's measure of convergence; k is logged as "balance". A critic's
    score is ``-L``.

    As in the paper, L is the mean absolute error (its eta = 1), codes have as many numbers as the noise, and the
    generator has the layers of the critic's decoder, without batch norm.

    What is simplified: the layers are those of the architecture "autoencoder"; the learning rate does not fall when M
    stalls; k moves on the samples of the critic's update, where the paper takes the second term from the generator's.

    Options:
        gamma: the wanted ratio of the errors, 0 to 1; the paper has 0.3 to 0.7.
        lambda_k: the learning rate of k.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"gamma": 0.5, "lambda_k": 0.001})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(
            self.recipe,
            "loss",
            "label_smoothing",
            "conditioning",
            "minibatch",
            "batch_norm",
            "generator_objective",
            "penalty",
            "critic_norm",
        )
        gamma, lambda_k = self.option("gamma"), self.option("lambda_k")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {gamma!r}")
        if lambda_k < 0:
            raise ValueError(f"lambda_k must be at least 0, got {lambda_k!r}")
        self.loss = self.equilibrium = Equilibrium(gamma, lambda_k)

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`."""
        if recipe.architecture != "autoencoder":
            raise ValueError(
                f"architecture must be 'autoencoder' for the system {recipe.system!r}, got {recipe.architecture!r}"
            )
        return Decoder(shape, recipe.latent_dim), AutoencoderCritic(shape, code=recipe.latent_dim)

    def judge(self, samples: Tensor, labels: Tensor | None, *, full: bool = False) -> Output:
        """The scores ``-L(v)`` of samples v."""
        error = (samples - self.critic(samples, reconstruct=True)).abs().flatten(1).mean(1)
        return Output(-error, samples, None)

    def critic_loss(self, batch: Batch) -> LossOutput:
        """L_D, with M and k among the terms."""
        outcome = super().critic_loss(batch)
        outcome.terms["balance"] = self.equilibrium.k.to(outcome.loss)
        return outcome

    def after_critic_update(self) -> None:
        """Moves k on."""
        super().after_critic_update()
        self.equilibrium.move(self.average)

    def state_dict(self) -> dict[str, Any]:
        """k, beside what `GAN` keeps."""
        return {**super().state_dict(), "k": self.equilibrium.k}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict(state)
        self.equilibrium.k = state["k"].clone()


class Decoder(nn.Module):
    """Noise ``[B, latent_dim]`` -> samples ``[B, *shape]``, by the layers of an autoencoder's decoder."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.body = AutoencoderCritic(shape, code=latent_dim).decoder
        self.bounded = len(shape) > 1

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, latent_dim]``; images lie in [-1, 1]."""
        samples: Tensor = self.body(z)
        return samples.tanh() if self.bounded else samples


class Equilibrium:
    """The losses of BEGAN as a `lipgan.losses.Loss`, of scores that are minus reconstruction errors.

    ``k`` is float64 on the CPU until it first meets an error, and then where that is.
    """

    paired = False

    def __init__(self, gamma: float, lambda_k: float) -> None:
        self.gamma, self.lambda_k = gamma, lambda_k
        self.k = torch.zeros((), dtype=torch.float64)
        self._differences: list[Tensor] = []

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """``L(x) - k L(G(z))``; `move` will see the errors."""
        real, fake = -real_scores.mean(), -fake_scores.mean()
        self._differences.append((self.gamma * real - fake).detach().double())
        return real - self.k.to(fake) * fake

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """``L(G(z))``."""
        return -fake_scores.mean()

    def estimate(self, real_scores: Tensor, fake_scores: Tensor, critic_loss: Tensor | None = None) -> Tensor:
        """M, the measure of convergence."""
        real, fake = -real_scores.mean(), -fake_scores.mean()
        return real + (self.gamma * real - fake).abs()

    def move(self, average: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """One step of k, by the errors of all parts of the batch since the last; ``average`` is over processes."""
        difference = average(torch.stack(self._differences).mean())
        self._differences.clear()
        self.k = (self.k.to(difference) + self.lambda_k * difference).clamp(0, 1)
