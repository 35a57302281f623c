"""The training scheme of Goodfellow et al. (2014, arXiv:1406.2661): one generator against one critic, with every
objective, constraint and technique that leaves it so."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.models import MLPCritic, Output
from lipgan.objectives import losses
from lipgan.objectives.regularizers import HistoricalAverage, clip_weights, feature_matching
from lipgan.penalties import critic_loss, gradient_penalty
from lipgan.penalties.points import AT_SAMPLES
from lipgan.systems.base import Batch, LossOutput, System

__all__ = ["GAN"]


# Penalties at points between a real and a fake sample each.
_BETWEEN_SAMPLES = ("wgan-gp", "lp", "max")
# What a critic consists of that scores samples and those points by one pass, and better so: see `lipgan.critic_loss`.
_OF_PERCEPTRONS = (MLPCritic, nn.Sequential, nn.Flatten, nn.Linear, nn.LeakyReLU)


class GAN(System):
    """Objective, penalty, conditioning and techniques as the recipe names them.

    Real and fake samples go through the critic as one batch, one normalization of its weights in place of two, unless
    it has layers that mix the samples of a batch: those see real and fake apart.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        recipe = self.recipe
        smoothing = {"label_smoothing": recipe.label_smoothing} if recipe.label_smoothing else {}
        self.loss = losses.get(recipe.loss, **smoothing)
        self.penalized_with_scores = recipe.penalty in _BETWEEN_SAMPLES and all(
            type(module) in _OF_PERCEPTRONS for module in self.critic.modules()
        )
        self.joined = not any(mixes_samples(module) for module in self.critic.modules())
        if recipe.critic_norm == "gradient" and not self.joined:
            raise ValueError(
                "critic_norm must not be 'gradient' for a critic whose layers mix the samples of a batch, such as "
                "batch norm: its gradient is taken for each sample"
            )
        self.averages = (
            {"critic": HistoricalAverage(self.critic), "generator": HistoricalAverage(self.generator)}
            if recipe.historical_averaging
            else {}
        )

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The objective, the penalty and whatever the recipe adds to them."""
        recipe = self.recipe
        real, fake = self.seen(batch.real, batch), self.seen(self.fake(batch), batch)
        if recipe.conditioning == "none" and (recipe.penalty in AT_SAMPLES or self.penalized_with_scores):
            return self._penalized_with_scores(real, fake, batch)
        real_output, fake_output = self.judge_both(real, fake, batch)
        loss = self.loss.critic_loss(real_output.scores, fake_output.scores)
        estimate = self.loss.estimate(real_output.scores, fake_output.scores, loss.detach())
        terms = {"critic_loss": loss, "estimate": estimate}
        if recipe.conditioning == "auxiliary":
            terms["classification"] = self.classification(real_output, batch) + self.classification(fake_output, batch)
            loss = loss + terms["classification"]
        if recipe.penalty != "none":
            terms["penalty"] = self.penalty(real, fake, batch)
            loss = loss + terms["penalty"]
        return LossOutput(self.averaged(loss, "critic"), terms)

    def _penalized_with_scores(self, real: Tensor, fake: Tensor, batch: Batch) -> LossOutput:
        """`critic_loss` with a penalty that is taken along with the scores."""
        recipe = self.recipe
        with _drawing(batch, recipe.penalty, real):
            step = critic_loss(
                self.critic,
                real,
                fake,
                self.loss.critic_loss,
                kind=recipe.penalty,
                weight=recipe.penalty_weight,
                target=recipe.penalty_target,
                engine=self.penalty_engine,
                generator=batch.random,
            )
        estimate = self.loss.estimate(step.real_scores, step.fake_scores, step.loss)
        terms = {"critic_loss": step.loss, "estimate": estimate, "penalty": step.penalty}
        return LossOutput(self.averaged(step.total, "critic"), terms)

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The objective, or feature matching in its place, and the auxiliary classifier's loss."""
        recipe = self.recipe
        fake = self.seen(self.fake(batch), batch)
        if recipe.generator_objective == "feature-matching":
            real_output, fake_output = self.judge_both(self.seen(batch.real, batch), fake, batch, full=True)
            loss = feature_matching(real_output.features, fake_output.features)
        elif self.loss.paired:
            real_output, fake_output = self.judge_both(self.seen(batch.real, batch), fake, batch)
            loss = self.loss.generator_loss(fake_output.scores, real_output.scores)
        else:
            fake_output = self.judge(fake, batch.labels)
            loss = self.loss.generator_loss(fake_output.scores)
        terms = {"generator_loss": loss}
        if recipe.conditioning == "auxiliary":
            loss = loss + self.classification(fake_output, batch)
        return LossOutput(self.averaged(loss, "generator"), terms)

    def after_critic_update(self) -> None:
        """Clips the weights, and moves the average over time on."""
        if self.recipe.weight_clip:
            clip_weights(self.critic, self.recipe.weight_clip)
        if self.averages:
            self.averages["critic"].update()

    def after_generator_update(self) -> None:
        """Moves the average over time on."""
        if self.averages:
            self.averages["generator"].update()

    def state_dict(self) -> dict[str, Any]:
        """The averages of the parameters over time."""
        return {name: average.state_dict() for name, average in self.averages.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, average in self.averages.items():
            average.load_state_dict(state[name])

    # ---- pieces that other systems share ----

    def fake(self, batch: Batch) -> Tensor:
        """What the generator makes of the batch's noise, asked for with its labels if the recipe has conditions."""
        if self.recipe.conditioning == "none":
            samples: Tensor = self.generator(batch.z)
        else:
            samples = self.generator(batch.z, batch.labels)
        # Of half a precision where the recipe runs in that; real samples are not.
        return samples.to(batch.real.dtype)

    def seen(self, samples: Tensor, batch: Batch) -> Tensor:
        """The samples as the critic gets them: with the instance noise of the moment."""
        std = self.recipe.instance_noise * (1 - self.progress)
        return samples + std * batch.randn(samples) if std > 0 else samples

    def judge(self, samples: Tensor, labels: Tensor | None, *, full: bool = False) -> Output:
        """The critic's output; features and logits are there when the recipe or ``full`` asks for them."""
        conditioning = self.recipe.conditioning
        if full or conditioning == "auxiliary":
            output: Output = self.critic(samples, None if conditioning == "none" else labels, full=True)
            return output
        arguments = (labels,) if self.critic_labels else ()
        return Output(self.critic(samples, *arguments), samples, None)

    def judge_both(self, real: Tensor, fake: Tensor, batch: Batch, *, full: bool = False) -> tuple[Output, Output]:
        """`judge` of real and of fake samples."""
        if not self.joined:
            return self.judge(real, batch.labels, full=full), self.judge(fake, batch.labels, full=full)
        labels = None
        if self.recipe.conditioning != "none" and batch.labels is not None:
            labels = torch.cat([batch.labels, batch.labels])
        return _halves(self.judge(torch.cat([real, fake]), labels, full=full))

    def classification(self, output: Output, batch: Batch) -> Tensor:
        """Cross entropy of the labels that were asked for."""
        assert output.logits is not None, "the recipe asks for an auxiliary classifier"
        assert batch.labels is not None
        return F.cross_entropy(output.logits, batch.labels)

    def penalty(
        self, real: Tensor, fake: Tensor, batch: Batch, *, critic_args: tuple[Any, ...] | None = None
    ) -> Tensor:
        """The recipe's gradient penalty, of ``critic(x, *critic_args)``; by default those are the labels, if any."""
        recipe = self.recipe
        if critic_args is None:
            critic_args = (batch.labels,) if self.critic_labels else ()
        kind = recipe.penalty
        if kind == "dragan":
            # As wide as the whole batch, of which this may be a part. Points mixed with themselves stay what they are.
            whole = batch.real if batch.whole is None else batch.whole
            fake = real = real + 0.5 * whole.std(correction=0) * batch.rand(real)
            kind = "wgan-gp"
        with _drawing(batch, kind, real):
            return gradient_penalty(
                self.critic,
                real,
                fake,
                kind=kind,
                weight=recipe.penalty_weight,
                target=recipe.penalty_target,
                engine=self.penalty_engine,
                generator=batch.random,
                critic_args=critic_args,
            )

    def averaged(self, loss: Tensor, network: str) -> Tensor:
        """The loss with the historical averaging of the recipe."""
        if not self.averages:
            return loss
        return loss + self.recipe.historical_averaging * self.averages[network].penalty()


def mixes_samples(module: nn.Module) -> bool:
    """Whether the output of a layer for one sample depends on the others of its batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "mixes_samples", False)


def _drawing(batch: Batch, kind: str, real: Tensor) -> AbstractContextManager[None]:
    """Within it a penalty draws what it draws of the whole batch, of which this may be a part."""
    if kind not in _BETWEEN_SAMPLES:
        return nullcontext()
    return batch.drawing(1, torch.float64 if real.dtype == torch.float64 else torch.float32)


def _halves(output: Output) -> tuple[Output, Output]:
    scores, features = output.scores.chunk(2), output.features.chunk(2)
    logits = (None, None) if output.logits is None else output.logits.chunk(2)
    real, fake = (Output(*parts) for parts in zip(scores, features, logits, strict=True))
    return real, fake
