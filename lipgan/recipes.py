"""Every named system, as one row of one table.

A recipe says what a paper fixes: the objective, how the critic is kept Lipschitz, the optimizer's constants.
It holds plain values only, so that it can be printed, compared, and stored in a checkpoint without pickling
code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lipgan import losses, models
from lipgan.penalties.gradient_penalty import KINDS as _PENALTIES
from lipgan.registry import lookup

__all__ = ["RECIPES", "Recipe", "get", "names"]

CRITIC_NORMS = ("none", "spectral")
PENALTIES = ("none", *_PENALTIES)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train and how; change a field with `dataclasses.replace`, which checks it again.

    Attributes:
        name: the key in the table.
        paper: the source.
        architecture: a name of `lipgan.models.names`.
        loss: a name of `lipgan.losses.names`.
        critic_norm: "spectral" normalizes every weight of the critic, "none" leaves it alone.
        penalty: a kind of `lipgan.gradient_penalty` that is added to the critic's loss, or "none".
        penalty_weight, penalty_target: its factor and the norm that it aims at.
        generator_lr, critic_lr: Adam's step sizes.
        betas: Adam's decay rates.
        n_critic: critic updates per generator update, that is per step.
        batch_size: samples per update.
        ema_decay: the generator that is sampled is ``ema_decay * average + (1 - ema_decay) * generator``.
        steps: a length after which samples are worth looking at.

    Raises:
        ValueError: a field out of its range, or an unknown loss, architecture or norm.
    """

    name: str
    paper: str
    architecture: str = "conv"
    loss: str = "hinge"
    critic_norm: str = "none"
    penalty: str = "none"
    penalty_weight: float = 10.0
    penalty_target: float = 1.0
    generator_lr: float = 2e-4
    critic_lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.9)
    n_critic: int = 1
    batch_size: int = 64
    ema_decay: float = 0.999
    steps: int = 2000

    def __post_init__(self) -> None:
        losses.get(self.loss)
        lookup(models.ARCHITECTURES, self.architecture, "architecture")
        if self.critic_norm not in CRITIC_NORMS:
            raise ValueError(f"critic_norm must be one of {', '.join(CRITIC_NORMS)}, got {self.critic_norm!r}")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}, got {self.penalty!r}")
        for field in ("penalty_weight", "penalty_target"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field} must be finite and >= 0, got {value!r}")
        for field in ("n_critic", "batch_size", "steps"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")
        for field in ("generator_lr", "critic_lr"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field} must be positive and finite, got {value!r}")
        for field, value in (
            ("betas", self.betas[0]),
            ("betas", self.betas[1]),
            ("ema_decay", self.ema_decay),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"{field} must lie in [0, 1), got {value!r}")


def _table(*rows: Recipe) -> Mapping[str, Recipe]:
    return MappingProxyType({row.name: row for row in rows})


RECIPES = _table(
    Recipe(
        name="sngan",
        paper="Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks, 1802.05957",
        loss="hinge",
        critic_norm="spectral",
    ),
    Recipe(
        name="wgan-gp",
        paper="Gulrajani et al. 2017, Improved Training of Wasserstein GANs, 1704.00028",
        loss="wasserstein",
        penalty="wgan-gp",
        generator_lr=1e-4,
        critic_lr=1e-4,
        n_critic=5,
    ),
)


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return sorted(RECIPES)


def get(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        ValueError: unknown name; the message names the nearest ones.
    """
    return lookup(RECIPES, name, "recipe")
