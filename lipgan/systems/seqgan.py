"""SeqGAN (Yu, Zhang, Wang and Yu 2017, arXiv:1609.05473): sequences of symbols, by policy gradient."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan._checks import as_whole, check_choice
from lipgan.objectives.divergences import widen
from lipgan.recipe import Recipe
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["SeqGAN", "SequenceCritic", "SequenceGenerator"]


# Those whose scores give a probability by the sigmoid, which is the reward.
LOSSES = ("non-saturating", "minimax")


class SeqGAN(GAN):
    """A generator that chooses symbols one after the other, and is rewarded for what the critic takes for real.

    A choice has no gradient, so the critic's cannot reach the generator. With the probability of being real that the
    critic gives to whole sequences, ``sigmoid(D)``, as reward, the gradient of its mean over the generator's sequences
    is that of ::

        sum_t Q_t log G(y_t | y_1 ... y_t-1),    Q_t = E [sigmoid(D(y)) | y_1 ... y_t]

    (the paper's eq. 6 and 7) with Q_t, the value of what is chosen so far, estimated by ``rollouts``: sequences that
    the generator completes from there (eq. 4). Here ``Q_t - Q_t-1`` stands for Q_t. The value before the choice does
    not depend on it, so that the mean of the gradient stays the same, and its variance is much smaller.

    As in the paper the generator first maximizes the likelihood of the data, for the share ``pretraining`` of the run's
    steps; the critic learns from the beginning on. "nll" is minus the log likelihood of real sequences in nats, the
    cross entropy, at least the entropy of their source; "reward" what the critic gives to generated ones; the
    generator's loss minus the reward, or in pretraining the cross entropy.

    Samples are sequences ``[length, symbols]``, one-hot. The generator is a GRU that also sees the place in the
    sequence. Its noise is a number between 0 and 1 for each symbol, which makes it a function: symbol k is chosen for
    numbers between the cumulated probabilities of the symbols before it and its own. The critic has convolutions over
    time, and then the largest value and the mean of each feature.

    What is simplified: rollouts are by the generator itself, not by a delayed copy.

    Options:
        pretraining: share of the steps, 0 to 1.
        rollouts: sequences that each Q_t is estimated from; 16 in the paper.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"pretraining": 0.7, "rollouts": 2})
    SCHEDULED: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "architecture", "latent_dim", "conditioning", "minibatch", "batch_norm", "penalty")
        refuse(self.recipe, "generator_objective", "instance_noise", "critic_norm", "generator_norm")
        check_choice("loss", self.recipe.loss, LOSSES)
        self.rollouts = as_whole("rollouts", self.option("rollouts"), 1)
        if not 0 <= self.option("pretraining") <= 1:
            raise ValueError(f"pretraining must lie in [0, 1], got {self.option('pretraining')!r}")
        samples = self.data.samples
        if not bool(((samples == 0) | (samples == 1)).all() and (samples.sum(-1) == 1).all()):
            raise ValueError(_needs(f"{self.data.name!r} has others"))

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`, for sequences of ``shape = (length, symbols)``."""
        if len(shape) != 2:
            raise ValueError(_needs(f"got samples of shape {shape}"))
        return SequenceGenerator(*shape), SequenceCritic(shape[1])

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The objective of telling data from the generator's sequences."""
        scores, fake_scores = self.critic(torch.cat([batch.real, self.fake(batch)])).chunk(2)
        loss = self.loss.critic_loss(scores, fake_scores)
        estimate = self.loss.estimate(scores.detach(), fake_scores.detach(), loss.detach())
        return LossOutput(self.averaged(loss, "critic"), {"critic_loss": loss, "estimate": estimate})

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The likelihood of the data, or what has the policy gradient."""
        generator = cast(SequenceGenerator, self.generator)
        fake = self.fake(batch)
        reward = self.rewards(fake)
        if self.progress < self.option("pretraining"):
            nll = -generator.log_probabilities(batch.real).sum(1).mean()
            loss, shown = nll, nll
        else:
            with torch.no_grad():
                nll = -generator.log_probabilities(batch.real).sum(1).mean()
            values = torch.cat([self.values(fake, batch), reward.unsqueeze(1)], 1)
            loss = -(values.diff(dim=1) * generator.log_probabilities(fake)).sum(1).mean()
            shown = -reward.mean()
        terms = {"generator_loss": shown, "nll": nll, "reward": reward.mean()}
        return LossOutput(self.averaged(loss, "generator"), terms)

    @torch.no_grad()
    def rewards(self, sequences: Tensor) -> Tensor:
        """The probability ``[...]`` that each of the sequences ``[..., length, symbols]`` is real, for the critic."""
        scores = self.critic(sequences.flatten(0, -3))
        return torch.sigmoid(widen(scores)).view(sequences.shape[:-2])

    @torch.no_grad()
    def values(self, sequences: Tensor, batch: Batch) -> Tensor:
        """Q of the beginnings of 0 to length - 1 symbols of sequences ``[b, length, symbols]``: ``[b, length]``."""
        length = sequences.shape[1]
        like = widen(sequences[:, :, :1]).expand(-1, -1, length)
        generator = cast(SequenceGenerator, self.generator)
        drawn = (generator.completed(sequences, batch.rand(like)) for _ in range(self.rollouts))
        return torch.stack([self.rewards(each) for each in drawn]).mean(0)


def _needs(what: str) -> str:
    return (
        "the system 'seqgan' needs sequences [length, symbols] with a 1 for the symbol and 0 for the others, such as "
        f"the data set 'chords'; {what}"
    )


class SequenceGenerator(nn.Module):
    """Numbers ``[B, length]`` between 0 and 1 to sequences ``[B, length, symbols]``, one-hot, without a gradient.

    Args:
        length, symbols: of the sequences.
        width: units of the GRU.

    Attributes:
        latent_dim: the length.
    """

    def __init__(self, length: int, symbols: int, width: int = 64) -> None:
        super().__init__()
        self.latent_dim, self.symbols = length, symbols
        self.start = nn.Parameter(torch.zeros(width))
        # Sequences have ends, and a GRU is slow to learn to count.
        self.place = nn.Parameter(torch.randn(length, symbols))
        self.gru = nn.GRU(symbols, width, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def latents(self, n: int, random: torch.Generator) -> Tensor:
        """``[n, length]``, uniform."""
        return torch.rand(n, self.latent_dim, generator=random)

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        """``z [B, length]`` -> ``[B, length, symbols]``."""
        state, drawn = self.start.expand(len(z), -1), []
        for t in range(self.latent_dim):
            drawn.append(self._chosen(state, z[:, t]))
            state = self._next(drawn[-1], state, t)
        return torch.stack(drawn, 1)

    def log_probabilities(self, sequences: Tensor) -> Tensor:
        """Of each symbol, given those before it: sequences ``[B, length, symbols]`` -> ``[B, length]``."""
        logits = widen(self.head(self._states(sequences)))
        return (logits.log_softmax(2) * sequences).sum(2)

    @torch.no_grad()
    def completed(self, sequences: Tensor, z: Tensor) -> Tensor:
        """Each beginning of sequences ``[B, length, symbols]``, of 0 to length - 1 symbols, with a new end.

        Args:
            sequences: one-hot.
            z: ``[B, length, length]``, uniform: for each beginning as many as `forward` takes, of which it needs those
                from its end on.

        Returns:
            ``[B, length, length, symbols]``.
        """
        length = self.latent_dim
        states = self._states(sequences)
        ends = sequences.unsqueeze(1).repeat(1, length, 1, 1)
        going = states[:, :0]
        for t in range(length):
            # The beginning of t symbols joins those that are under way.
            going = torch.cat([going, states[:, t : t + 1]], 1)
            chosen = self._chosen(going.flatten(0, 1), z[:, : t + 1, t].flatten())
            ends[:, : t + 1, t] = chosen.view(-1, t + 1, self.symbols)
            going = self._next(chosen, going.flatten(0, 1), t).view(going.shape)
        return ends

    def _states(self, sequences: Tensor) -> Tensor:
        """What the GRU knows before each symbol: ``[B, length, width]``."""
        first = self.start.expand(len(sequences), -1)
        states: Tensor = self.gru(sequences[:, :-1] + self.place[:-1], first.unsqueeze(0).contiguous())[0]
        return torch.cat([first.unsqueeze(1).to(states.dtype), states], 1)

    def _chosen(self, states: Tensor, z: Tensor) -> Tensor:
        """The symbols ``[B, symbols]`` of numbers ``z [B]``."""
        bounds = widen(self.head(states)).softmax(1).cumsum(1)
        symbol = (bounds <= z.unsqueeze(1)).sum(1).clamp(max=self.symbols - 1)
        return F.one_hot(symbol, self.symbols).to(self.start.dtype)

    def _next(self, symbols: Tensor, states: Tensor, t: int) -> Tensor:
        following: Tensor = self.gru((symbols + self.place[t]).unsqueeze(1), states.unsqueeze(0).contiguous())[1]
        return following.squeeze(0)


class SequenceCritic(nn.Module):
    """Sequences ``[B, length, symbols]`` -> scores ``[B]``.

    Args:
        symbols: how many.
        width: channels of the convolutions.
    """

    def __init__(self, symbols: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(symbols, width, 2), nn.LeakyReLU(0.2), nn.Conv1d(width, width, 3, padding=1), nn.LeakyReLU(0.2)
        )
        self.head = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, length, symbols]``."""
        # From before the first symbol to after the last: the zeros mark the ends.
        found = self.body(F.pad(x.transpose(1, 2), (1, 1)))
        scores: Tensor = self.head(torch.cat([found.amax(2), found.mean(2)], 1))
        return scores.squeeze(1)
