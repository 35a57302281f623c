"""Text to image by a matching-aware critic, GAN-CLS (Reed, Akata, Yan, Logeswaran, Schiele and Lee 2016,
arXiv:1605.05396)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.objectives.divergences import widen
from lipgan.recipe import Recipe
from lipgan.systems._unused import refuse
from lipgan.systems.ali import JointCritic
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["GANCLS", "MatchingCritic", "TextEncoder", "TextToImage"]

# Numbers that a sentence becomes.
_CODE = 32
_LONGEST = 64
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,-'"


class GANCLS(GAN):
    """A generator that is told in a sentence what to draw, and a critic that judges whether the image matches it.

    A critic that only sees real images with their own sentences and fake ones need not read: it has to tell real from
    fake, whatever the sentence. So it is shown a third kind of pairs, real images with sentences of other classes,
    which count as fake (the paper's algorithm 1). With an image x, its sentence t and another one t'::

        critic:     (critic_loss(D(x, t), D(x, t')) + critic_loss(D(x, t), D(G(z, t), t))) / 2
        generator:  generator_loss(D(G(z, t), t))

    for the losses of the recipe; the estimate is of the first against the third kind. "matching" is the mean of
    ``D(x, t) - D(x, t')``, which stays at 0 for a critic that does not read.

    The data set has captions, and the label of a sample is the number of its sentence; a checkpoint holds the
    sentences. Each network reads them, letter by letter, by a `TextEncoder` of its own that learns along.

    What is simplified: the paper's encoder of sentences is trained beforehand, and shared; its critic sees the text
    beside a feature map, here beside the features of the whole image; sentences are interpolated for pictures, not as a
    further term of the objective (GAN-INT).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "conditioning", "minibatch", "generator_objective", "penalty", "batch_norm")
        refuse(self.recipe, "critic_norm", "generator_norm")
        if self.loss.paired:
            raise ValueError(f"loss must be one that judges samples by themselves, got {self.recipe.loss!r}")
        if self.data.captions is None or self.data.classes < 2:
            raise ValueError(_needs(f"{self.data.name!r} has none"))
        for network in (self.generator, self.critic):
            if isinstance(network, TextToImage | MatchingCritic):
                network.text.hold(self.data.captions)

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`, for as many sentences as classes."""
        if classes < 2:
            raise ValueError(_needs("these data have no labels"))
        entries = dataclasses.replace(recipe, latent_dim=recipe.latent_dim + _CODE)
        generator, _ = super().build(entries, shape, classes)
        return TextToImage(generator, classes, recipe.latent_dim), MatchingCritic(recipe, shape, classes)

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The objective of telling right pairs from both kinds of wrong ones."""
        assert batch.labels is not None
        real, fake = self.seen(batch.real, batch), self.seen(self.fake(batch), batch)
        images, labels = [real, real, fake], [batch.labels, self.others(batch), batch.labels]
        if self.joined:
            right, wrong, made = self.critic(torch.cat(images), torch.cat(labels)).chunk(3)
        else:
            right, wrong, made = (self.critic(*pair) for pair in zip(images, labels, strict=True))
        loss = (self.loss.critic_loss(right, wrong) + self.loss.critic_loss(right, made)) / 2
        estimate = self.loss.estimate(right.detach(), made.detach())
        matching = (right.detach() - wrong.detach()).mean()
        terms = {"critic_loss": loss, "estimate": estimate, "matching": matching}
        return LossOutput(self.averaged(loss, "critic"), terms)

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The objective of images that look real and match."""
        loss = self.loss.generator_loss(self.critic(self.seen(self.fake(batch), batch), batch.labels))
        return LossOutput(self.averaged(loss, "generator"), {"generator_loss": loss})

    def fake(self, batch: Batch) -> Tensor:
        """Images for the sentences of the real ones."""
        samples: Tensor = self.generator(batch.z, batch.labels)
        return samples.to(batch.real.dtype)

    def others(self, batch: Batch) -> Tensor:
        """A sentence of another class for each sample, ``[b]``, all equally likely."""
        assert batch.labels is not None
        classes = self.data.classes
        further = 1 + (batch.rand(batch.z[:, 0].float()) * (classes - 1)).long().clamp(max=classes - 2)
        return (batch.labels + further) % classes


def _needs(what: str) -> str:
    return f"the system 'gan-cls' needs data with a sentence for each class, such as the data set 'sentences'; {what}"


class TextEncoder(nn.Module):
    """Sentences to 32 numbers each: convolutions over their letters, and the largest value over the sentence.

    Each number has mean 0 and variance 1 over all the sentences: a fresh encoder finds in most of them the same, and
    networks would take long to notice a single word that differs. The sentences lie in a buffer, so that the state of
    the module holds them. What is no letter of English, digit or usual mark is read as a space.

    Args:
        sentences: how many.
        width: channels of the convolutions.
    """

    letters: Tensor

    def __init__(self, sentences: int, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("letters", torch.zeros(sentences, _LONGEST, dtype=torch.int64))
        # 0 stands for what is after the end.
        self.embedding = nn.Embedding(1 + len(_ALPHABET), 16, padding_idx=0)
        self.body = nn.Sequential(
            nn.Conv1d(16, width, 5, padding=2), nn.LeakyReLU(0.2), nn.Conv1d(width, width, 5, padding=2)
        )
        self.head = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(width, _CODE))

    @torch.no_grad()
    def hold(self, captions: Sequence[str]) -> None:
        """Take one sentence for each label.

        Raises:
            ValueError: an empty one, or one of more than 64 letters.
        """
        rows = torch.zeros_like(self.letters, device="cpu")
        for row, caption in zip(rows, captions, strict=True):
            if not 0 < len(caption) <= _LONGEST:
                raise ValueError(f"captions must have 1 to {_LONGEST} letters, got {caption!r}")
            known = [_ALPHABET.find(letter) for letter in caption.lower()]
            row[: len(known)] = torch.tensor([1 + (_ALPHABET.index(" ") if k < 0 else k) for k in known])
        self.letters.copy_(rows)

    def captions(self) -> tuple[str, ...]:
        """The sentences, in small letters."""
        return tuple("".join(_ALPHABET[k - 1] for k in row if k) for row in self.letters.tolist())

    def forward(self, labels: Tensor) -> Tensor:
        """``labels [B]`` -> ``[B, 32]``."""
        # Each sentence once, however often it is asked for.
        letters = self.letters
        found = self.body(self.embedding(letters).transpose(1, 2))
        found = found.masked_fill((letters == 0).unsqueeze(1), -torch.inf).amax(2)
        codes: Tensor = self.head(found)
        variance, mean = torch.var_mean(widen(codes), 0, correction=0, keepdim=True)
        return F.embedding(labels, ((codes - mean) / (variance + 1e-8).sqrt()).to(codes.dtype))


class TextToImage(nn.Module):
    """Noise and sentences to samples.

    Args:
        generator: without labels, of noise and sentence together.
        sentences: how many; a sentence is asked for by its number.
        latent_dim: numbers of the noise.

    Attributes:
        latent_dim: as given.
        classes: the number of sentences.
    """

    def __init__(self, generator: nn.Module, sentences: int, latent_dim: int) -> None:
        super().__init__()
        self.generator, self.text = generator, TextEncoder(sentences)
        self.latent_dim, self.classes = latent_dim, sentences

    @property
    def captions(self) -> tuple[str, ...]:
        """What is asked for, by number."""
        return self.text.captions()

    def forward(self, z: Tensor, labels: Tensor, towards: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        """``z [B, latent_dim]`` and the numbers of sentences ``labels [B]`` -> samples ``[B, *shape]``.

        With ``towards [B]``, numbers of other sentences, and ``share [B]`` between 0 and 1, of what the encoder makes
        of both in that proportion.
        """
        text = self.text(labels)
        if towards is not None and share is not None:
            text = torch.lerp(text, self.text(towards), share.unsqueeze(1).to(text.dtype))
        samples: Tensor = self.generator(torch.cat([z, text.to(z.dtype)], 1))
        return samples


class MatchingCritic(nn.Module):
    """Samples ``[B, *shape]`` and the numbers of sentences ``[B]`` -> scores ``[B]``, high for real ones that match.

    Args:
        recipe: of the architecture.
        shape: of a sample.
        sentences: how many.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, ...], sentences: int) -> None:
        super().__init__()
        self.text = TextEncoder(sentences)
        self.joint = JointCritic(dataclasses.replace(recipe, latent_dim=_CODE), shape)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """``x [B, *shape]`` and ``labels [B]``."""
        scores: Tensor = self.joint(x, self.text(labels))
        return scores
