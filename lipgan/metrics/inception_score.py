r"""The Inception Score, from class probabilities.

``exp(mean_x KL(p(y | x) || p(y)))`` with ``p(y)`` the mean of ``p(y | x)``: the exponential of the entropy of the mean
less the mean of the entropies. It lies between 1 and the number of classes. One image per class, memorized, has the
highest score: it says nothing of variety within a class, nor of real images.

Source: Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved Techniques for Training GANs" (2016), sec. 4;
Barratt and Sharma, "A Note on the Inception Score" (2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import check_count, check_generator
from lipgan.metrics._inputs import Array, as_features, left_to
from lipgan.metrics.metric import Collection

__all__ = ["InceptionScore", "inception_score"]

# How far from 1 a row may sum: probabilities in bfloat16 are each off by up to 0.4 %, wherever they were summed later.
_TOLERANCE = 1e-2


def _check_probabilities(probs: Tensor) -> None:
    if bool((probs < 0).any()):
        raise ValueError(f"probs must not be negative, got {float(probs.min()):.3g}")
    off = (probs.sum(1, dtype=torch.float64) - 1).abs()
    if len(off) and float(off.max()) > _TOLERANCE:
        raise ValueError(f"every row of probs must sum to 1, got a sum that is off by {float(off.max()):.3g}")


def inception_score(
    probs: Array, splits: int = 10, *, generator: torch.Generator | None = None, protocol: str | None = None
) -> tuple[float, float]:
    """The Inception Score of images, from the class probabilities that a classifier gives them.

    Args:
        probs: ``[n, classes]``, ``n >= splits``; every row sums to 1. float64, float32 or a half type, computed in
            float64.
        splits: the score is that of each of so many runs of consecutive rows, on average. 10 is the usual number; the
            score depends on it, because few samples have a mean of less entropy.
        generator: shuffles the rows first. Without, and with images in the order of their classes, the splits differ;
            a protocol that shuffles has one that starts at 0.
        protocol: a name of :mod:`lipgan.metrics.protocols`: the score as that package computes it.

    Returns:
        Mean and standard deviation (over ``splits``, as numpy.std) of the scores.

    Raises:
        TypeError: ``probs`` is not an array or tensor of real floating-point numbers, ``splits`` is not an int.
        ValueError: another shape, fewer rows than splits, negative or not finite, or rows that do not sum to 1; an
            unknown protocol, one without this score, or one beside ``splits``.

    Example::

        >>> inception_score(torch.eye(4), splits=1)
        (4.0, 0.0)
    """
    score_ddof = 0
    if protocol is not None:
        package = left_to(protocol, "is", inception_score, splits=splits)
        assert package.splits is not None
        splits, score_ddof = package.splits, package.score_ddof
        if not package.shuffled:
            generator = None
        elif generator is None:
            generator = torch.Generator().manual_seed(0)
    check_generator(generator)
    check_count("splits", splits)
    rows = as_features("probs", probs)
    if len(rows) < splits:
        raise ValueError(f"probs must have at least one row for each of the {splits} splits, got {len(rows)}")
    _check_probabilities(rows)
    if generator is not None:
        rows = rows[torch.randperm(len(rows), generator=generator, device=generator.device).to(rows.device)]
    logs = []
    for k in range(splits):
        # The bounds of the original code, and so of most others.
        part = rows[k * len(rows) // splits : (k + 1) * len(rows) // splits].double()
        divergence = torch.special.entr(part.mean(0)).sum() - torch.special.entr(part).sum(1).mean()
        # By Jensen's inequality only rounding is negative.
        logs.append(divergence.clamp(min=0))
    scores = torch.stack(logs).exp()
    std = float(scores.std(correction=0))
    return float(scores.mean()), std * (splits / (splits - score_ddof)) ** 0.5 if score_ddof else std


class InceptionScore(Collection):
    """The Inception Score of images that come in batches, with ``update``, ``compute`` and ``reset``.

    It keeps the probabilities, ``[n, classes]``, because the splits depend on how many there will be.

    Args:
        classifier: takes a batch of images to class probabilities ``[n, classes]``, without gradient and as it is.
            None: ``update`` is given probabilities.
        splits, generator, protocol: as in :func:`inception_score`.

    Raises:
        TypeError, ValueError: ``classifier`` cannot be called; another argument is not such as :func:`inception_score`
            takes.

    Example::

        >>> metric = InceptionScore(splits=1)
        >>> metric.update(torch.eye(4))
        >>> mean, std = metric.compute()
    """

    def __init__(
        self,
        classifier: Callable[[Tensor], Tensor] | None = None,
        splits: int = 10,
        *,
        generator: torch.Generator | None = None,
        protocol: str | None = None,
    ) -> None:
        if classifier is not None and not callable(classifier):
            raise TypeError(f"classifier must be callable or None, got {type(classifier).__name__}")
        check_count("splits", splits)
        if protocol is not None:
            left_to(protocol, "is", inception_score, splits=splits)
        super().__init__("generated")
        self.classifier = classifier
        self.splits = splits
        self.generator = generator
        self.protocol = protocol

    def update(self, x: Array) -> None:
        """Add a batch: what ``classifier`` takes, or probabilities ``[n, classes]``.

        Raises:
            TypeError, ValueError: the probabilities are not such as :func:`inception_score` takes.
            RuntimeError: after :meth:`sync`.
        """
        with torch.no_grad():
            probs: Any = x if self.classifier is None else self.classifier(x)  # type: ignore[arg-type]
        rows = as_features("probs", probs, minimum=0)
        _check_probabilities(rows)
        self._append("generated", "probs", rows)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the splits, 0-dim, float64. ValueError with fewer samples than splits."""
        rows = self._rows("generated")
        mean, std = inception_score(rows, self.splits, generator=self.generator, protocol=self.protocol)
        return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
