"""CycleGAN (Zhu, Park, Isola and Efros 2017, arXiv:1703.10593), between the data and a transformation of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan import models
from lipgan._transfer import to_device
from lipgan.data import Dataset
from lipgan.recipe import Recipe
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["CycleGAN", "DomainCritics", "Translators", "transformed"]

# A mean over the few numbers of a vector pulls at each of them harder than one over the pixels of an image does; with
# the paper's weight nothing would leave its place.
_VECTORS = 1 / 30


class CycleGAN(GAN):
    """Two domains without pairs, a translator in each direction, and a critic for each domain.

    Domain A is the data. Domain B is `transformed` data: for images the outlines of what they show, for vectors a
    rotation with a shift. The samples of a batch of B are other ones than those of A, drawn independently, so that
    nothing tells which belongs to which. With G: A -> B and F: B -> A, and the adversarial losses of the recipe (in
    the paper least squares), the translators minimize::

        generator_loss(D_B(G(a))) + generator_loss(D_A(F(b)))
            + cycle * (|F(G(a)) - a| + |G(F(b)) - b|) + identity * (|G(b) - b| + |F(a) - a|)

    with means of absolute differences (the paper's eq. 3, and its section 5.2 for the last term), and the critics the
    sum of their two losses. Samples are translations G(a) of data, of which the generator holds some as inputs.

    What is simplified: a critic scores the whole image, as the paper's patches of 70 pixels do for images up to that
    size; the critics see the translations of the moment, not those of a history; the batch is not 1; the learning rates
    stay. Symmetric domains can be translated in more than one way that obeys the losses, the rings of 8 Gaussians in 16
    for example.

    Options:
        cycle: weight of cycle consistency. On vectors a thirtieth of it counts, and of the next.
        identity: weight of the last term, which the paper sets to half of ``cycle`` where it has it.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"cycle": 10.0, "identity": 0.0})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "conditioning", "batch_norm", "generator_objective", "penalty", "latent_dim")
        if self.loss.paired:
            raise ValueError(f"loss must be one that judges samples by themselves, got {self.recipe.loss!r}")
        factor = 1.0 if self.data.samples.ndim > 2 else _VECTORS
        self.cycle, self.identity = factor * self.option("cycle"), factor * self.option("identity")
        if isinstance(self.generator, Translators):
            self.generator.hold(self.data.samples)

    @classmethod
    def target_of(cls, data: Dataset) -> Dataset:
        """Domain B: the transformed data, and modes where the data have them."""
        modes = None if data.modes is None else transformed(data.modes)
        return Dataset(f"{data.name}, transformed", transformed(data.samples), data.labels, modes, data.mode_std)

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`."""
        return Translators(shape), DomainCritics(recipe, shape)

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The objectives of the two critics."""
        a, b = batch.real, self.others(batch)
        scores = [
            self.scores(a, self.generator(b, back=True), "a", batch),
            self.scores(b, self.generator(a), "b", batch),
        ]
        loss = torch.stack([self.loss.critic_loss(*pair) for pair in scores]).sum()
        with torch.no_grad():
            estimate = torch.stack([self.loss.estimate(*pair) for pair in scores]).mean()
        return LossOutput(self.averaged(loss, "critic"), {"critic_loss": loss, "estimate": estimate})

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The adversarial objectives, cycle consistency, and identity if it has a weight."""
        a, b = batch.real, self.others(batch)
        made_a, made_b = self.generator(b, back=True), self.generator(a)
        scores = self.critic(self.seen(made_a, batch), "a"), self.critic(self.seen(made_b, batch), "b")
        adversarial = torch.stack([self.loss.generator_loss(s) for s in scores]).sum()
        cycle = _distance(self.generator(made_b, back=True), a) + _distance(self.generator(made_a), b)
        terms = {"generator_loss": adversarial, "cycle": cycle}
        loss = adversarial + self.cycle * cycle
        if self.identity:
            terms["identity"] = _distance(self.generator(b), b) + _distance(self.generator(a, back=True), a)
            loss = loss + self.identity * terms["identity"]
        return LossOutput(self.averaged(loss, "generator"), terms)

    def others(self, batch: Batch) -> Tensor:
        """Samples of domain B, as many as those of A."""
        total = batch.before + len(batch.real) + batch.after
        drawn = torch.randint(len(self.data), (total,), generator=batch.random)
        mine = self.data.samples[drawn[batch.before : batch.before + len(batch.real)]]
        return transformed(to_device(mine, batch.real.device, batch.real.dtype))

    def scores(self, real: Tensor, fake: Tensor, domain: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """The scores of one domain's critic."""
        real, fake = self.seen(real, batch), self.seen(fake, batch)
        if not self.joined:
            return self.critic(real, domain), self.critic(fake, domain)
        real_scores, fake_scores = self.critic(torch.cat([real, fake]), domain).chunk(2)
        return real_scores, fake_scores


def transformed(samples: Tensor) -> Tensor:
    """Samples of domain A in domain B.

    Images ``[B, channels, h, w]``: the largest value of the 3 x 3 pixels around each one minus the smallest (the
    morphological gradient), from -1 where all are equal to 1: outlines, from which the way back has to fill the shapes.
    Vectors ``[B, d]``: the first two coordinates turned by 90 degrees, and the first then moved by 1.
    """
    if samples.ndim > 2:
        return F.max_pool2d(samples, 3, 1, 1) + F.max_pool2d(-samples, 3, 1, 1) - 1
    turned = samples.clone()
    if samples.shape[1] > 1:
        turned[:, 0], turned[:, 1] = -samples[:, 1], samples[:, 0]
    turned[:, 0] += 1
    return turned


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean()


class Translators(nn.Module):
    """The two translators, and samples of domain A for whoever wants translations.

    Args:
        shape: of a sample.
        width: channels of a translator at full resolution, for images.

    Attributes:
        latent_dim: the numbers of a sample, which is what the generator takes.
    """

    sources: Tensor

    def __init__(self, shape: tuple[int, ...], width: int = 32) -> None:
        super().__init__()
        self.latent_dim = math.prod(shape)
        self.there, self.back = _translator(shape, width), _translator(shape, width)
        # At most 4 MB in float32, unless 64 images are more.
        self.register_buffer("sources", torch.zeros(min(2048, max(64, 2**20 // self.latent_dim)), *shape))

    @torch.no_grad()
    def hold(self, samples: Tensor) -> None:
        """Take samples ``[n, *shape]`` as sources, evenly spread over all of them."""
        count = len(self.sources)
        self.sources.copy_(samples[torch.arange(count) * len(samples) // count])

    def latents(self, n: int, random: torch.Generator) -> Tensor:
        """``n`` samples of domain A, on the device of the module."""
        drawn = torch.randint(len(self.sources), (n,), generator=random)
        return self.sources[to_device(drawn, self.sources.device)]

    def forward(self, x: Tensor, *, back: bool = False) -> Tensor:
        """``x [B, *shape]`` of domain A -> B, or with ``back`` of domain B -> A."""
        translated: Tensor = self.back(x) if back else self.there(x)
        return translated


def _translator(shape: tuple[int, ...], width: int) -> nn.Module:
    """The appendix 7.2 in small for images: down, two residual blocks, up; around one perceptron for vectors."""
    if len(shape) == 1:
        return _Around(models.build("mlp", shape, latent_dim=shape[0])[0])
    channels = shape[0]
    return nn.Sequential(
        *_normalized(nn.Conv2d(channels, width, 3, padding=1), width),
        *_normalized(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), 2 * width),
        _block(2 * width),
        _block(2 * width),
        *_normalized(nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), width),
        nn.Conv2d(width, channels, 3, padding=1),
        nn.Tanh(),
    )


def _normalized(layer: nn.Module, channels: int) -> list[nn.Module]:
    return [layer, nn.InstanceNorm2d(channels, affine=True), nn.ReLU()]


def _block(channels: int) -> nn.Module:
    return _Around(
        nn.Sequential(
            *_normalized(nn.Conv2d(channels, channels, 3, padding=1), channels),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.InstanceNorm2d(channels, affine=True),
        )
    )


class _Around(nn.Module):
    """``x + body(x)``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.body(x)
        return x + changed


class DomainCritics(nn.Module):
    """A critic of the recipe's architecture for each domain.

    Args:
        recipe: of the architecture.
        shape: of a sample.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, ...]) -> None:
        super().__init__()
        architecture = models.serving(recipe.architecture, shape)
        self.a, self.b = (models.build(architecture, shape, minibatch=recipe.minibatch)[1] for _ in "ab")

    def forward(self, x: Tensor, domain: str = "b") -> Tensor:
        """``x [B, *shape]`` -> scores ``[B]``, high for samples of the domain, "a" or "b"."""
        scores: Tensor = self.a(x) if domain == "a" else self.b(x)
        return scores
