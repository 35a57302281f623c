"""Text to image by a matching-aware critic, GAN-CLS (Reed, Akata, Yan, Logeswaran, Schiele and Lee 2016,
arXiv:1605.05396)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan._checks import as_whole
from lipgan._transfer import to_device
from lipgan.data import BatchOrder
from lipgan.objectives.divergences import widen
from lipgan.recipe import Recipe
from lipgan.systems._encoder import beside, critic_of
from lipgan.systems._readout import Readout, body_of
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["GANCLS", "MatchingCritic", "Sentences", "TextEncoder", "TextToImage"]

# Numbers that a sentence becomes.
_CODE = 32
_LONGEST = 64
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,-'"
# Of Adam, for the encoder of sentences.
_RATE = 2e-3


class GANCLS(GAN):
    """A generator that is told in a sentence what to draw, and a critic that judges whether the image matches it.

    Before the first step an encoder of sentences learns to tell them apart by what they show (`TextEncoder`), for
    ``pretraining`` updates of its own. What it makes of each sentence then stays as it is, for both networks, as in the
    paper.

    A critic that only sees real images with their own sentences and fake ones need not read: it has to tell real from
    fake, whatever the sentence. So it is shown a third kind of pairs, real images with sentences of other classes,
    which count as fake (the paper's algorithm 1). With an image x, its sentence t and another one t'::

        critic:     (critic_loss(D(x, t), D(x, t')) + critic_loss(D(x, t), D(G(z, t), t))) / 2
        generator:  generator_loss(D(G(z, t), t))

    for the losses of the recipe; the estimate is of the first against the third kind. "matching" is the mean of
    ``D(x, t) - D(x, t')``, which stays at 0 for a critic that does not read.

    The data set has captions, and the label of a sample is the number of its sentence; a checkpoint holds the
    sentences and what the encoder made of them.

    What differs: the paper's critic sees the text beside a feature map, here beside the features of the whole image,
    and it adds the product of both (`MatchingCritic`); the encoder minimizes a cross entropy over all sentences in
    place of the margin between two (`TextEncoder`); sentences are interpolated for pictures, not as a further term of
    the objective (GAN-INT).

    Options:
        pretraining: updates of the encoder of sentences before the first step, at least 1.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"pretraining": 300})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "conditioning", "minibatch", "generator_objective", "penalty", "batch_norm")
        refuse(self.recipe, "critic_norm", "generator_norm")
        self.pretraining = as_whole("pretraining", self.option("pretraining"), 1)
        if self.loss.paired:
            raise ValueError(f"loss must be one that judges samples by themselves, got {self.recipe.loss!r}")
        if self.data.captions is None or self.data.classes < 2:
            raise ValueError(_needs(f"{self.data.name!r} has none"))
        for sentences in self._sentences():
            sentences.hold(self.data.captions)

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """As `System.build`, for as many sentences as classes."""
        if classes < 2:
            raise ValueError(_needs("these data have no labels"))
        entries = dataclasses.replace(recipe, latent_dim=recipe.latent_dim + _CODE)
        generator, _ = super().build(entries, shape, classes)
        return TextToImage(generator, classes, recipe.latent_dim), MatchingCritic(recipe, shape, classes)

    @property
    def critic_labels(self) -> bool:
        """Always: a label is the number of a sentence."""
        return True

    def begin_step(self) -> None:
        """The encoder's training, before the first step."""
        if self.progress == 0 and not all(bool(sentences.codes.any()) for sentences in self._sentences()):
            codes = self.learned_codes()
            for sentences in self._sentences():
                sentences.codes.copy_(codes)

    def learned_codes(self) -> Tensor:
        """What an encoder that is trained on the data makes of each sentence: ``[sentences, 32]``, without a gradient.

        Its batches and weights are drawn from torch's global generator, in every process of a run the same.
        """
        letters = self._sentences()[0].letters
        images = Readout(critic_of(self.recipe, self.data.shape), _CODE).to(letters.device)
        encoder = TextEncoder().to(letters.device)
        optimizer = torch.optim.Adam([*images.parameters(), *encoder.parameters()], lr=_RATE, fused=True)
        order = BatchOrder(len(self.data), int(torch.randint(2**31, ())))
        assert self.data.labels is not None
        for _ in range(self.pretraining):
            rows = order.next(self.recipe.batch_size)
            batch, labels = self.data.samples[rows], self.data.labels[rows]
            scores = images(to_device(batch, letters.device, torch.float32)) @ encoder(letters).T
            F.cross_entropy(scores, to_device(labels, letters.device)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return cast(Tensor, encoder(letters))

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The objective of telling right pairs from both kinds of wrong ones."""
        real, fake = self.seen(batch.real, batch), self.seen(self.fake(batch), batch)
        right, wrong = self.critic(real, batch.labels, self.others(batch))
        made = self.critic(fake, batch.labels)
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

    def _sentences(self) -> list[Sentences]:
        """Of both networks, where they are this module's."""
        networks = (self.generator, self.critic)
        return [network.text for network in networks if isinstance(network, TextToImage | MatchingCritic)]


def _needs(what: str) -> str:
    return f"the system 'gan-cls' needs data with a sentence for each class, such as the data set 'sentences'; {what}"


class TextEncoder(nn.Module):
    """Sentences to 32 numbers each: convolutions over their letters, and the largest value over the sentence.

    Each number has mean 0 and variance 1 over all the sentences: a fresh encoder finds in most of them the same, and
    it would take long to notice a single word that differs.

    It learns together with an encoder of images, so that the product of what both give tells which of all sentences an
    image belongs to: the structured joint embedding of Reed, Akata, Lee and Schiele (2016, arXiv:1605.05395), on which
    the paper relies, with the cross entropy over all sentences in place of a margin. Sentences whose images look alike
    get numbers that are alike.

    Args:
        width: channels of the convolutions.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        # 0 stands for what is after the end.
        self.embedding = nn.Embedding(1 + len(_ALPHABET), 16, padding_idx=0)
        self.body = nn.Sequential(
            nn.Conv1d(16, width, 5, padding=2), nn.LeakyReLU(0.2), nn.Conv1d(width, width, 5, padding=2)
        )
        self.head = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(width, _CODE))

    def forward(self, letters: Tensor) -> Tensor:
        """``letters [sentences, 64]`` as in `Sentences` -> ``[sentences, 32]``."""
        letters = letters[:, : int((letters != 0).sum(1).max())]
        found = self.body(self.embedding(letters).transpose(1, 2))
        found = found.masked_fill((letters == 0).unsqueeze(1), -torch.inf).amax(2)
        codes: Tensor = self.head(found)
        variance, mean = torch.var_mean(widen(codes), 0, correction=0, keepdim=True)
        return ((codes - mean) / (variance + 1e-8).sqrt()).to(codes.dtype)


class Sentences(nn.Module):
    """The numbers of sentences ``[B]`` to what an encoder has made of them, ``[B, 32]``.

    Sentences and codes lie in buffers, so that the state of the module holds them. What is no letter of English, digit
    or usual mark is read as a space.

    Args:
        sentences: how many.

    Attributes:
        letters: ``[sentences, 64]``, int64, 0 after the end of a sentence.
        codes: ``[sentences, 32]``, 0 before they are learned.
    """

    letters: Tensor
    codes: Tensor

    def __init__(self, sentences: int) -> None:
        super().__init__()
        self.register_buffer("letters", torch.zeros(sentences, _LONGEST, dtype=torch.int64))
        self.register_buffer("codes", torch.zeros(sentences, _CODE))

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
        return F.embedding(labels, self.codes)


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
        self.generator, self.text = generator, Sentences(sentences)
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

    The features that a critic of the recipe's architecture finds in the sample go through further layers beside what is
    known of the sentence, and a linear map of them is multiplied with the latter: that tells at once whether they match
    (the projection of Miyato and Koyama 2018, arXiv:1802.05637, with sentences as classes), which layers that see both
    side by side take long to find out.

    Args:
        recipe: of the architecture.
        shape: of a sample.
        sentences: how many.
        width: units of the layers that see sentences.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, ...], sentences: int, width: int = 256) -> None:
        super().__init__()
        self.text = Sentences(sentences)
        self.body, features = body_of(critic_of(recipe, shape))
        coded = dataclasses.replace(recipe, latent_dim=_CODE)
        self.entry, self.head = beside(coded, features, width, 1)
        self.projection = nn.Linear(features, _CODE, bias=False)

    def forward(self, x: Tensor, labels: Tensor, others: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``x [B, *shape]`` and ``labels [B]``; with ``others [B]``, the scores with those sentences as well."""
        features = self.body(x).flatten(1)
        scores = self._matched(features, labels)
        return scores if others is None else (scores, self._matched(features, others))

    def _matched(self, features: Tensor, labels: Tensor) -> Tensor:
        text = self.text(labels).to(features.dtype)
        scores: Tensor = self.head(torch.cat([features, self.entry(text)], 1)).squeeze(1)
        # By the square root of its length, as in attention: else it outweighs whether the image looks real, and of each
        # sentence the generator draws the one image that matches best.
        matched: Tensor = (self.projection(features) * text).sum(1) / _CODE**0.5
        return scores + matched
