"""What every generator and critic shares: labels, minibatch layers, the head of the critic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan._checks import check_choice, check_count
from lipgan._choices import BATCH_NORMS, CONDITIONINGS, MINIBATCHES
from lipgan.nn.conditional_batch_norm import ConditionalBatchNorm1d, ConditionalBatchNorm2d
from lipgan.nn.minibatch import MinibatchDiscrimination, MinibatchStdDev
from lipgan.nn.virtual_batch_norm import VirtualBatchNorm

__all__ = ["Critic", "Generator", "Layers", "Norm", "Output", "Residual"]

# Samples of the reference batch of virtual batch norm.
_REFERENCE = 32

# The normalization that follows a layer of so many channels.
Norm = Callable[[int], nn.Module]


class Output(NamedTuple):
    """All that a critic says of samples.

    Attributes:
        scores: ``[B]``, higher for real ones.
        features: ``[B, d]``, what the scores are made of; those of a sample, without those of a minibatch layer.
        logits: ``[B, classes]`` of an auxiliary classifier, None without one.
    """

    scores: Tensor
    features: Tensor
    logits: Tensor | None


class Layers(nn.Sequential):
    """`torch.nn.Sequential` that hands the labels to those of its layers that take them.

    These are class-conditional batch norms, and `Layers` and `Residual` within.
    """

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """``x [B, ...]`` and ``labels [B]`` or None."""
        for layer in self:
            takes_labels = isinstance(layer, (Layers, Residual, ConditionalBatchNorm1d, ConditionalBatchNorm2d))
            x = layer(x, labels) if takes_labels else layer(x)
        return x


class Residual(nn.Module):
    """``main(x) + shortcut(x)``; the main path gets the labels."""

    def __init__(self, main: Layers, shortcut: nn.Module) -> None:
        super().__init__()
        self.main, self.shortcut = main, shortcut

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """``x [B, c, h, w]`` and ``labels [B]`` or None."""
        y: Tensor = self.main(x, labels) + self.shortcut(x)
        return y


class Generator(nn.Module):
    """Noise, and labels if it has classes, to samples.

    A subclass, or the caller, gives the body::

        def body(entries, norm):
            return nn.Sequential(nn.Linear(entries, 64), nn.ReLU(), nn.Linear(64, 2))

        generator = Generator((2,), body, latent_dim=8, conditioning="concat", classes=10)

    Args:
        shape: of a sample, ``(channels, size, size)`` or ``(d,)``.
        body: ``(entries, norm)`` -> the module from ``[B, entries]`` to ``[B, *shape]``. ``norm(channels)`` makes the
            normalization of images that the options ask for; a body may do without. One that uses it is a `Layers`.
        latent_dim: length of one noise vector.
        conditioning: how labels come in: "concat" and "auxiliary" append the one-hot vector of the label to the noise
            (Mirza and Osindero 2014, arXiv:1411.1784; Odena et al. 2016, arXiv:1610.09585), "projection" makes the
            batch norms class-conditional (Miyato and Koyama 2018, arXiv:1802.05637).
        classes: labels are 0 to classes - 1; not used for conditioning "none".
        batch_norm: "virtual" replaces batch norm by :class:`lipgan.nn.VirtualBatchNorm`. The noise of its reference
            batch, 32 standard normal vectors with random labels, is drawn here and kept in buffers; it runs through the
            body in front of each batch.

    Attributes:
        shape, latent_dim, conditioning: as given.
        classes: 0 for conditioning "none".

    Raises:
        ValueError: an unknown option, classes missing, or a body without the batch norm that an option needs.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        body: Callable[[int, Norm], nn.Module],
        latent_dim: int = 64,
        *,
        conditioning: str = "none",
        classes: int = 0,
        batch_norm: str = "batch",
    ) -> None:
        super().__init__()
        check_choice("batch_norm", batch_norm, BATCH_NORMS)
        check_count("latent_dim", latent_dim)
        self.shape, self.latent_dim, self.conditioning = tuple(shape), latent_dim, conditioning
        self.classes = _classes(conditioning, classes)
        if conditioning == "projection" and batch_norm == "virtual":
            raise ValueError("batch_norm must be 'batch' for conditioning 'projection', which needs it per class")
        self._appends = conditioning in ("concat", "auxiliary")
        norm: Norm = nn.BatchNorm2d
        if conditioning == "projection":
            norm = partial(ConditionalBatchNorm2d, classes=classes)
        elif batch_norm == "virtual":
            norm = partial(VirtualBatchNorm, reference=_REFERENCE)
        self.body = body(latent_dim + (classes if self._appends else 0), norm)
        for option, value, kinds in (
            ("batch_norm", "virtual", (VirtualBatchNorm,)),
            ("conditioning", "projection", (ConditionalBatchNorm1d, ConditionalBatchNorm2d)),
        ):
            wanted = value in (batch_norm, conditioning)
            if wanted and not any(isinstance(module, kinds) for module in self.body.modules()):
                raise ValueError(f"{option} must not be {value!r} for {type(self).__name__}, which has no batch norm")
        virtual = batch_norm == "virtual"
        self._reference: Tensor | None
        self._reference_labels: Tensor | None
        self.register_buffer("_reference", torch.randn(_REFERENCE, latent_dim) if virtual else None)
        labelled = virtual and self._appends
        self.register_buffer("_reference_labels", torch.randint(classes, (_REFERENCE,)) if labelled else None)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """``z [B, latent_dim]`` and, with classes, ``labels [B]`` int64 -> samples ``[B, *shape]``.

        Raises:
            TypeError: labels that are not int64.
            ValueError: noise of another shape; labels that are missing, not wanted, of another shape or out of range.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must be [B, {self.latent_dim}], got shape {tuple(z.shape)}")
        labels = _checked(labels, z, self.conditioning, self.classes, needed=self.conditioning != "none")
        reference = self._reference
        if reference is not None:
            z = torch.cat([reference.to(z.dtype), z])
            if labels is not None and self._reference_labels is not None:
                labels = torch.cat([self._reference_labels, labels])
        if self._appends:
            assert labels is not None
            z = torch.cat([z, F.one_hot(labels, self.classes).to(z.dtype)], 1)
            labels = None
        samples: Tensor = self.body(z) if labels is None else self.body(z, labels)
        return samples if reference is None else samples[len(reference) :]


class Critic(nn.Module):
    """Samples, and labels if it has classes, to scores.

    A subclass, or the caller, gives the body::

        def body(shape):
            return nn.Sequential(nn.Linear(*shape, 64), nn.ReLU())

        critic = Critic((2,), body, 64, conditioning="projection", classes=10)

    Args:
        shape: of a sample, ``(channels, size, size)`` or ``(d,)``.
        body: the shape that the body sees -> the module from ``[B, *that shape]`` to features, flattened afterwards.
        features: how many features one sample has.
        conditioning: "concat" appends the one-hot vector of the label to the sample, for images as constant planes
            (Mirza and Osindero 2014, arXiv:1411.1784); "projection" adds ``<embedding(y), features>`` to the scores
            (Miyato and Koyama 2018, arXiv:1802.05637); with "auxiliary" the scores see no labels, which a linear
            classifier reads from the features (Odena et al. 2016, arXiv:1610.09585).
        classes: labels are 0 to classes - 1; not used for conditioning "none".
        minibatch: the layer between the features and the score: "discrimination"
            (:class:`lipgan.nn.MinibatchDiscrimination`), "stddev" (:class:`lipgan.nn.MinibatchStdDev`), or "none".

    Attributes:
        shape, conditioning: as given.
        classes: 0 for conditioning "none".

    Raises:
        ValueError: an unknown option, or classes missing.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        body: Callable[[tuple[int, ...]], nn.Module],
        features: int,
        *,
        conditioning: str = "none",
        classes: int = 0,
        minibatch: str = "none",
    ) -> None:
        super().__init__()
        check_choice("minibatch", minibatch, MINIBATCHES)
        self.shape, self.conditioning = tuple(shape), conditioning
        self.classes = _classes(conditioning, classes)
        planes = classes if conditioning == "concat" else 0
        self.body = body((shape[0] + planes, *shape[1:]))
        self.minibatch: nn.Module | None = None
        entries = features
        if minibatch == "discrimination":
            self.minibatch = MinibatchDiscrimination(features)
            entries = self.minibatch.out_features
        elif minibatch == "stddev":
            self.minibatch, entries = MinibatchStdDev(), features + 1
        self.head: nn.Module = nn.Linear(entries, 1)
        self.classifier = nn.Linear(features, classes) if conditioning == "auxiliary" else None
        self.embedding = nn.Embedding(classes, features) if conditioning == "projection" else None
        if self.embedding is not None:
            nn.init.xavier_uniform_(self.embedding.weight)

    def forward(self, x: Tensor, labels: Tensor | None = None, *, full: bool = False) -> Tensor | Output:
        """``x [B, *shape]`` and, with classes, ``labels [B]`` int64 -> scores ``[B]``, or with ``full`` an `Output`.

        For conditioning "auxiliary" labels may be left out; they change nothing.

        Raises:
            TypeError: labels that are not int64.
            ValueError: samples of another shape; labels that are missing, not wanted, of another shape or out of range.
        """
        x, labels = self._seen(x, labels)
        features: Tensor = self.body(x).flatten(1)
        judged = features if self.minibatch is None else self.minibatch(features)
        scores: Tensor = self.head(judged).squeeze(1)
        if self.embedding is not None:
            scores = scores + (self.embedding(labels) * features).sum(1)
        return self._output(scores, features) if full else scores

    def _seen(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the body sees of samples, and the labels, checked."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must be [B, {', '.join(map(str, self.shape))}], got shape {tuple(x.shape)}")
        needed = self.conditioning in ("concat", "projection")
        labels = _checked(labels, x, self.conditioning, self.classes, needed)
        if self.conditioning == "concat":
            assert labels is not None
            planes = F.one_hot(labels, self.classes).to(x.dtype)
            planes = planes.view(*planes.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
            x = torch.cat([x, planes], 1)
        return x, labels

    def _output(self, scores: Tensor, features: Tensor) -> Output:
        return Output(scores, features, None if self.classifier is None else self.classifier(features))


def _classes(conditioning: str, classes: int) -> int:
    """The number of classes that a player has."""
    check_choice("conditioning", conditioning, CONDITIONINGS)
    if conditioning == "none":
        return 0
    if classes < 1:
        raise ValueError(f"classes must be at least 1 for conditioning {conditioning!r}, got {classes}")
    return classes


def _checked(labels: Tensor | None, samples: Tensor, conditioning: str, classes: int, needed: bool) -> Tensor | None:
    """The labels of ``samples [B, ...]``, if they are as the conditioning needs them."""
    if labels is None:
        if not needed:
            return None
        raise ValueError(f"labels must be given for conditioning {conditioning!r}, got None")
    if conditioning == "none":
        raise ValueError("labels must be None for conditioning 'none'")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor, got {given}")
    if labels.shape != samples.shape[:1]:
        raise ValueError(f"labels must be one for each of {len(samples)} samples, got shape {tuple(labels.shape)}")
    # On the CPU only: elsewhere it would wait for the device.
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        least, most = (int(bound) for bound in torch.aminmax(labels))
        if least < 0 or most >= classes:
            raise ValueError(f"labels must lie in 0 to {classes - 1}, got {least if least < 0 else most}")
    return labels
