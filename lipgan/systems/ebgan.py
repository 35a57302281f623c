"""Energy-based GAN (Zhao, Mathieu and LeCun 2017, arXiv:1609.03126)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from lipgan.models import AutoencoderCritic
from lipgan.objectives import losses
from lipgan.objectives.regularizers import pulling_away
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["EBGAN"]


class EBGAN(GAN):
    """An autoencoder as critic, whose reconstruction error is an energy, and a term that keeps samples apart.

    With ``E(v)`` the error of the reconstruction of v (the paper's eq. 1, 2, and 4)::

        L_D = E(x) + max(0, m - E(G(z)))
        L_G = E(G(z)) + w PT(S),    PT(S) = mean over i != j of (S_i . S_j / |S_i| |S_j|)^2

    where S are the codes of a batch of samples: the repelling regularizer, logged as "pulling_away", which makes this
    the paper's EBGAN-PT. The score is minus the energy, so that the objective is `lipgan.losses.Energy`. The energy is
    the mean over the numbers of a sample, and the margin is in its units; the architecture is "autoencoder".

    Options:
        margin: m. An energy of 1 is that of a grey picture restored as all black.
        pulling_away: w; 0.1 in the paper, 0 is EBGAN without the regularizer.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"margin": 1.0, "pulling_away": 0.1})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "label_smoothing", "generator_objective")
        if self.recipe.loss != "energy":
            raise ValueError(f"loss must be 'energy' for EBGAN, got {self.recipe.loss!r}")
        if self.recipe.critic_norm == "gradient":
            raise ValueError("critic_norm must not be 'gradient' for EBGAN, whose scores are energies")
        if not isinstance(self.critic, AutoencoderCritic):
            raise ValueError(f"architecture must be 'autoencoder' for EBGAN, got {self.recipe.architecture!r}")
        self.weight = self.option("pulling_away")
        if self.weight < 0:
            raise ValueError(f"pulling_away must be at least 0, got {self.weight!r}")
        self.loss = losses.get("energy", margin=self.option("margin"))

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The energy of samples, and how much their codes are alike."""
        output = self.judge(self.seen(self.fake(batch), batch), batch.labels, full=True)
        loss = self.loss.generator_loss(output.scores)
        repelling = pulling_away(output.features)
        terms = {"generator_loss": loss, "pulling_away": repelling}
        loss = loss + self.weight * repelling
        if self.recipe.conditioning == "auxiliary":
            loss = loss + self.classification(output, batch)
        return LossOutput(self.averaged(loss, "generator"), terms)
