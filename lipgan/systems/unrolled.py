"""Unrolled GAN (Metz, Poole, Pfau and Sohl-Dickstein 2017, arXiv:1611.02163)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from lipgan._checks import as_whole
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["Unrolled"]

# As in torch.optim.
_EPSILON = 1e-8


class Unrolled(GAN):
    """A generator that sees how the critic will answer.

    With ``f(G, D)`` the value that the critic maximizes, the generator minimizes ``f(G, D_k)`` (the paper's eq. 9),
    where ``D_k`` is the critic after k steps of ascent, ``D_{i+1} = D_i + eta df(G, D_i) / dD_i`` (eq. 7, 8). The
    gradient goes through these steps too, to G in each of them: the second term of eq. 11, which makes the generator
    lower what the critic could gain by moving against it, such as by leaving all samples at one mode. The looked-ahead
    critic is thrown away, and the critic's own update is the ordinary one.

    As in the paper all steps see the batch of the update, and f is the whole value, so that its real part counts: the
    recipe's loss gives it as minus ``critic_loss``, which with "minimax" is the paper's f. "critic_gain" is what the
    critic gains by the look-ahead.

    The learning rate eta of a weight is that of the critic's optimizer: its learning rate, divided, but for "sgd", by
    the root of a running mean of the weight's squared gradients, which is a constant for the gradient and goes on
    through the look-ahead. What is simplified: the steps have no momentum; penalties and the loss of an auxiliary
    classifier are left out of f; with accumulation, or in several processes, each part of a batch looks ahead on its
    own samples.

    Options:
        unrolled_steps: k; 0 is the ordinary training scheme, with the generator's loss of the recipe.
        unrolled_rate: a factor of eta.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"unrolled_steps": 5, "unrolled_rate": 1.0})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        steps, self.rate = self.option("unrolled_steps"), self.option("unrolled_rate")
        steps = as_whole("unrolled_steps", steps, 0)
        if self.rate <= 0:
            raise ValueError(f"unrolled_rate must be positive, got {self.rate!r}")
        refuse(self.recipe, "generator_objective")
        self.steps = int(steps)
        # The running means, their age, and the squares that the parts of the update under way have measured.
        self.means = [torch.zeros_like(p) for p in self.critic.parameters()]
        self.updates = 0
        self._measured: list[list[Tensor]] = []

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The value of the objective with the critic of ``unrolled_steps`` steps ahead."""
        if self.steps == 0:
            return super().generator_loss(batch)
        real, fake = self.seen(batch.real, batch), self.seen(self.fake(batch), batch)
        # Buffers, such as the vectors of spectral normalization, are copied so that the look-ahead leaves no trace.
        buffers = {name: buffer.clone() for name, buffer in self.critic.named_buffers()}
        weights = {name: p.detach().clone().requires_grad_() for name, p in self.critic.named_parameters()}
        loss = now = self.objective(weights, buffers, real, fake, batch)
        means = self.means
        for step in range(self.steps):
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
            squares = [gradient.detach().square() for gradient in gradients]
            means = self.mixed(means, squares)
            if step == 0:
                self._measured.append(squares)
            rates = self.rates(means, self.updates + step + 1)
            weights = {
                name: weight - rate * gradient
                for (name, weight), rate, gradient in zip(weights.items(), rates, gradients, strict=True)
            }
            loss = self.objective(weights, buffers, real, fake, batch)
        terms = {"generator_loss": -loss, "critic_gain": (now - loss).detach()}
        return LossOutput(self.averaged(-loss, "generator"), terms)

    def objective(
        self, weights: dict[str, Tensor], buffers: dict[str, Tensor], real: Tensor, fake: Tensor, batch: Batch
    ) -> Tensor:
        """The critic's objective if these were its weights."""
        arguments = () if self.recipe.conditioning == "none" else (batch.labels,)
        if not self.joined:
            scores = [functional_call(self.critic, weights | buffers, (x, *arguments)) for x in (real, fake)]
        else:
            labels = () if not arguments or batch.labels is None else (torch.cat([batch.labels, batch.labels]),)
            scores = list(functional_call(self.critic, weights | buffers, (torch.cat([real, fake]), *labels)).chunk(2))
        return self.loss.critic_loss(*scores)

    def mixed(self, means: Sequence[Tensor], squares: Sequence[Tensor]) -> list[Tensor]:
        """The running means after one more update with these squared gradients."""
        kept = self.recipe.betas[1]
        return [torch.lerp(new, old, kept) for old, new in zip(means, squares, strict=True)]

    def rates(self, means: Sequence[Tensor], age: int) -> list[Tensor | float]:
        """The learning rate of each weight, for running means of so many updates."""
        recipe = self.recipe
        rate = self.rate * recipe.critic_lr * (1 - self.progress if recipe.lr_decay == "linear" else 1)
        if recipe.optimizer == "sgd":
            return [rate] * len(means)
        share = 1 - recipe.betas[1] ** age
        return [rate / ((mean / share).sqrt() + _EPSILON) for mean in means]

    def after_generator_update(self) -> None:
        """Moves the running means on."""
        super().after_generator_update()
        if not self._measured:
            return
        parts = zip(*self._measured, strict=True)
        self.means = self.mixed(self.means, [self.average(torch.stack(part).mean(0)) for part in parts])
        self.updates += 1
        self._measured.clear()

    def state_dict(self) -> dict[str, Any]:
        """The running means, beside what `GAN` keeps."""
        return {**super().state_dict(), "means": self.means, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict(state)
        self.means = [new.to(old) for old, new in zip(self.means, state["means"], strict=True)]
        self.updates = state["updates"]
