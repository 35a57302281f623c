"""How good the samples are while training goes on, in a second or two."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lipgan.data import Dataset
from lipgan.data.chords import legal, log_likelihood
from lipgan.data.sentences import counted, cut, ink
from lipgan.metrics import FeatureStats, frechet_distance, mode_coverage, sliced_wasserstein_distance
from lipgan.metrics.features import DigitFeatures, get
from lipgan.training.trainer import Trainer

__all__ = ["SAMPLES", "Evaluation"]

#: How many samples are drawn.
SAMPLES = 2000
# A sample counts as classified with confidence if one class is more probable than this.
_CONFIDENCE = 0.9
_BATCH = 250


class Evaluation:
    """Judges the averaged generator of a trainer by 2,000 samples, the same latent points every time.

    Images: ``fid``, the Frechet distance of features, those of the classifier of digits for the data set "digits" and
    random convolutional ones for all others; good for comparing the steps of one run, not for publication (`lipgan
    eval` has the inception features). For "digits" also ``confident``, the share of the samples to which the classifier
    gives one digit with a probability above 0.9, and ``classes``, how many of the ten digits it finds so.

    Of the data set "sentences", what the sentences ask for: ``digits_as_asked``, the share of digits, cut out where the
    sentence has them, that the classifier of digits finds to be of its class (of the data 0.94), and the shares of
    samples with as many digits, ``count_as_asked``, and with strokes as thick, ``stroke_as_asked`` (of the data above
    0.99).

    Phrases of the data set "chords": ``legal``, the share of chords that the grammar allows where they stand,
    ``grammar_nll``, minus the log likelihood of a phrase under the grammar in nats (`lipgan.data.chords`; of the data
    18.4 on average), and ``phrases``, the share of phrases that are different ones.

    Vectors: ``sliced_wasserstein``, and for mixtures ``modes``, the number of modes covered, and ``high_quality``, the
    share of samples near one.

    Args:
        data: what the samples are compared with.
    """

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self._features: Callable[[Tensor], Tensor] | None = None
        if data.is_image:
            self._features = get("digits" if data.name == "digits" else "random")
            self._real = self._statistics(data.samples[: 10 * SAMPLES])
        self._told = _Told(data) if data.name == "sentences" else None

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """The metrics by name."""
        samples = trainer.sample(SAMPLES)
        if self._features is not None:
            fake = self._statistics(samples)
            distance = float(frechet_distance(self._real.mean, self._real.cov, fake.mean, fake.cov))
            told = {} if self._told is None else self._told(samples)
            return {"fid": distance, **self._classified(samples), **told}
        if self._data.name == "chords":
            return _judged_by_the_grammar(samples)
        real = self._data.samples[:SAMPLES]
        random = torch.Generator().manual_seed(trainer.seed)
        metrics = {"sliced_wasserstein": float(sliced_wasserstein_distance(samples, real, generator=random))}
        if self._data.modes is not None and self._data.mode_std is not None:
            coverage = mode_coverage(samples, self._data.modes, self._data.mode_std)
            metrics |= {"modes": float(coverage.covered), "high_quality": coverage.high_quality}
        return metrics

    def _classified(self, images: Tensor) -> dict[str, float]:
        if not isinstance(self._features, DigitFeatures):
            return {}
        probabilities = torch.cat([self._features.probabilities(_unit(batch)) for batch in torch.split(images, _BATCH)])
        highest, digit = probabilities.max(1)
        confident = highest > _CONFIDENCE
        return {
            "confident": float(confident.double().mean()),
            "classes": float(digit[confident].bincount().count_nonzero()),
        }

    def _statistics(self, images: Tensor) -> FeatureStats:
        assert self._features is not None
        stats: FeatureStats | None = None
        for batch in torch.split(images, _BATCH):
            features = self._features(_unit(batch))
            stats = stats or FeatureStats(features.shape[1])
            stats.update(features)
        assert stats is not None
        return stats


class _Told:
    """Whether images show what their sentences say; they are asked for the sentences in turn."""

    def __init__(self, data: Dataset) -> None:
        self._classifier = DigitFeatures()
        assert data.labels is not None
        inked = self._per_digit(data.samples, data.labels)
        thick, digit = data.labels // 10 % 2 == 1, data.labels % 10
        #: The brightness between thin and thick digits of each class.
        self._between = torch.stack(
            [(inked[thick & (digit == k)].mean() + inked[~thick & (digit == k)].mean()) / 2 for k in range(10)]
        )

    def __call__(self, images: Tensor) -> dict[str, float]:
        labels = torch.arange(len(images)) % 60
        digits, owners = cut(images, labels)
        batches = torch.split(digits, 3 * _BATCH)
        found = torch.cat([self._classifier.probabilities(_unit(batch)).argmax(1) for batch in batches])
        thick = self._per_digit(images, labels) > self._between[labels % 10]
        shares = {
            "digits_as_asked": found == labels[owners] % 10,
            "count_as_asked": counted(images) == labels // 20 + 1,
            "stroke_as_asked": thick == (labels // 10 % 2 == 1),
        }
        return {name: float(right.double().mean()) for name, right in shares.items()}

    @staticmethod
    def _per_digit(images: Tensor, labels: Tensor) -> Tensor:
        return ink(images) / (labels // 20 + 1)


def _judged_by_the_grammar(phrases: Tensor) -> dict[str, float]:
    different = len(torch.unique(phrases.argmax(2), dim=0))
    return {
        "grammar_nll": -float(log_likelihood(phrases).mean()),
        "legal": float(legal(phrases).double().mean()),
        "phrases": different / len(phrases),
    }


def _unit(samples: Tensor) -> Tensor:
    """Samples in [-1, 1] as the extractors take them, in [0, 1]."""
    return ((samples + 1) / 2).clamp(0, 1)
