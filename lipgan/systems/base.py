"""What a training scheme is to the trainer: two losses, and the state that they keep between updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipgan import models
from lipgan._transfer import to_device
from lipgan.data import Dataset
from lipgan.recipe import Recipe

__all__ = ["Batch", "LossOutput", "System", "latents"]


@dataclass(frozen=True)
class Batch:
    """What one network is updated on: a part of the batch, or all of it.

    Attributes:
        real: ``[b, ...]``, on the device and of the type of the generator.
        labels: ``[b]``, int64, of the real samples, None for a data set without. Fake samples are asked for with the
            same labels, which have the frequencies of the data.
        z: noise for the generator, ``[b, latent_dim]`` or as its ``latents`` method draws it.
        random: for all other random numbers; the same stream in every process and part.
        before, after: samples of the whole batch that come before and after this part.
        whole: the real samples of the whole batch, None where this is all of it.
    """

    real: Tensor
    labels: Tensor | None
    z: Tensor
    random: torch.Generator
    before: int = 0
    after: int = 0
    whole: Tensor | None = None

    def __len__(self) -> int:
        return len(self.z)

    def randn(self, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape of ``like [b, ...]``: those of this part, drawn with all others'."""
        return self._drawn(torch.randn, like)

    def rand(self, like: Tensor) -> Tensor:
        """Likewise, uniform between 0 and 1."""
        return self._drawn(torch.rand, like)

    def _drawn(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        # Drawn on the CPU so that a seed means the same numbers on every device.
        total = self.before + len(like) + self.after
        drawn = draw(total, *like.shape[1:], generator=self.random)
        return to_device(drawn[self.before : self.before + len(like)], like.device, like.dtype)

    @contextmanager
    def drawing(self, numbers: int, dtype: torch.dtype) -> Iterator[None]:
        """For a callee that draws ``numbers`` uniform numbers for each sample of this part from ``random``.

        Skips those of the other parts, so that it sees what it would see in the whole batch.
        """
        torch.rand(self.before * numbers, generator=self.random, dtype=dtype)
        yield
        torch.rand(self.after * numbers, generator=self.random, dtype=dtype)


@dataclass(frozen=True)
class LossOutput:
    """What a network minimizes, 0-dim, and the 0-dim quantities that are logged under their names."""

    loss: Tensor
    terms: dict[str, Tensor]


class System:
    """Two losses of two networks. The trainer owns the loop, the optimizers and the random numbers.

    A subclass defines `critic_loss` and `generator_loss`; what it keeps between updates goes through `state_dict`.
    "Generator" and "critic" are the two modules whose parameters each of the two optimizers gets. Either may hold
    several networks (an encoder beside a decoder, one network per level of a pyramid), as long as ``generator(z)``
    gives samples.

    Args:
        recipe: whose options it reads with `option`.
        generator, critic: the networks, on their device, normalized as the recipe says.
        data: what they are trained on.
        penalty_engine: the ``engine`` of `lipgan.gradient_penalty`.
    """

    #: The constants of the system, by name, with their defaults.
    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({})
    #: Whether it depends on ``progress``.
    SCHEDULED: ClassVar[bool] = False
    #: What the critic scores.
    JUDGED: ClassVar[str] = "samples"

    def __init__(
        self, recipe: Recipe, generator: nn.Module, critic: nn.Module, data: Dataset, *, penalty_engine: str = "auto"
    ) -> None:
        self.recipe, self.generator, self.critic, self.data = recipe, generator, critic, data
        self.penalty_engine = penalty_engine
        #: The share of the recipe's steps that is done, 0 to 1, for schedules; the trainer moves it.
        self.progress = 0.0
        #: The mean of a tensor over the processes of the run; the trainer sets it.
        self.average: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """Fresh networks for samples of ``shape`` with labels 0 to ``classes - 1``, from torch's global generator.

        Raises:
            ValueError: the architecture does not serve the shape, or the recipe needs labels and there are none.
        """
        return models.build(
            models.serving(recipe.architecture, shape),
            shape,
            conditioning=recipe.conditioning,
            classes=classes,
            minibatch=recipe.minibatch,
            batch_norm=recipe.batch_norm,
            latent_dim=recipe.latent_dim,
        )

    @classmethod
    def target_of(cls, data: Dataset) -> Dataset:
        """What samples of a generator trained on ``data`` are to look like: these, unless the system says otherwise."""
        return data

    @cached_property
    def target(self) -> Dataset:
        """`target_of` its own data."""
        return self.target_of(self.data)

    @property
    def critic_labels(self) -> bool:
        """Whether the critic's scores are of samples with their labels, which it takes as its second argument."""
        return self.recipe.conditioning in ("concat", "projection")

    def option(self, name: str) -> float:
        """The recipe's value of an option, or the default."""
        return self.recipe.options.get(name, self.OPTIONS[name])

    def critic_loss(self, batch: Batch) -> LossOutput:
        """What the critic minimizes; the generator's parameters require no gradients meanwhile."""
        raise NotImplementedError

    def generator_loss(self, batch: Batch) -> LossOutput:
        """What the generator minimizes; the critic's parameters require no gradients meanwhile."""
        raise NotImplementedError

    def begin_step(self) -> None:
        """Called before the updates of a step, with ``progress`` at its new value."""

    def after_critic_update(self) -> None:
        """Called after each update of the critic."""

    def after_generator_update(self) -> None:
        """Called after each update of the generator."""

    def state_dict(self) -> dict[str, Any]:
        """What the losses depend on beside the networks: tensors, numbers, and dicts and lists of these."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""


def latents(generator: nn.Module, n: int, random: torch.Generator) -> Tensor:
    """``n`` inputs of the generator: ``generator.latents(n, random)`` where it has that method, on any device, else
    standard normal ``[n, latent_dim]`` on the CPU.

    Raises:
        ValueError: a generator without ``latent_dim``.
    """
    draw = getattr(generator, "latents", None)
    if draw is not None:
        drawn: Tensor = draw(n, random)
        return drawn
    latent_dim = getattr(generator, "latent_dim", None)
    if not isinstance(latent_dim, int) or latent_dim < 1:
        raise ValueError(f"the generator needs an attribute latent_dim, an integer >= 1, got {latent_dim!r}")
    return torch.randn(n, latent_dim, generator=random)
