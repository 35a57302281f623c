"""What the lectures say of the metrics, on the bundled digits: what each sees, and what it is blind to."""

import itertools
from collections.abc import Callable

import pytest
import torch
from devices import DEVICE
from torch import Tensor
from torch.nn import functional as F

from lipgan import data
from lipgan.metrics import (
    frechet_distance_from_features,
    inception_score,
    kernel_distance,
    prdc,
    sliced_wasserstein_distance,
)
from lipgan.metrics.features import DigitFeatures, get

pytestmark = pytest.mark.usefixtures("single_thread")


class Digits:
    """Two halves of the digits in [0, 1], as real and as perfectly generated images."""

    def __init__(self) -> None:
        samples, labels = data.digits(8).samples.to(DEVICE), data.digits(8).labels.to(DEVICE)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
        images = (samples[order] + 1) / 2
        self.real, self.fake = images[:900], images[900:]
        self.real_labels, self.fake_labels = labels[order][:900], labels[order][900:]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def pixel_distance(real: Tensor, fake: Tensor) -> float:
    return float(frechet_distance_from_features(real.flatten(1), fake.flatten(1)))


def digit_distance(real: Tensor, fake: Tensor) -> float:
    features = get("digits").to(real.device)
    return float(frechet_distance_from_features(features(real), features(fake)))


def pixel_kernel(real: Tensor, fake: Tensor) -> float:
    return kernel_distance(real.flatten(1), fake.flatten(1), subset_size=None)[0]


def pixel_sliced(real: Tensor, fake: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    return sliced_wasserstein_distance(real.flatten(1), fake.flatten(1), generator=generator)


DISTANCES = [pixel_distance, digit_distance, pixel_kernel, pixel_sliced]

Distance = Callable[[Tensor, Tensor], float]


def grows(values: list[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_grow_with_noise(distance: Distance, digits: Digits) -> None:
    noise = torch.randn(digits.fake.shape, generator=torch.Generator().manual_seed(1))
    fakes = [(digits.fake + level * noise).clamp(0, 1) for level in (0.0, 0.1, 0.2, 0.4, 0.8)]
    assert grows([distance(digits.real, fake) for fake in fakes])


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_grow_with_blur(distance: Distance, digits: Digits) -> None:
    blurred = F.avg_pool2d(digits.fake, 5, 1, 2, count_include_pad=False)
    fakes = [torch.lerp(digits.fake, blurred, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert grows([distance(digits.real, fake) for fake in fakes])


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_grow_as_modes_are_dropped(distance: Distance, digits: Digits) -> None:
    fakes = [digits.fake[digits.fake_labels < kept] for kept in (10, 8, 6, 4, 2, 1)]
    assert grows([distance(digits.real, fake) for fake in fakes])


def test_the_inception_score_is_blind_to_one_image_per_class(digits: Digits) -> None:
    classifier = DigitFeatures().to(digits.real.device)
    real = classifier.probabilities(digits.real)
    # Of every class the one image that the classifier is surest of, over and over.
    surest = torch.stack([digits.real[real[:, label].argmax()] for label in range(10)]).repeat(90, 1, 1, 1)
    assert inception_score(classifier.probabilities(surest), 1)[0] > inception_score(real, 1)[0] > 5
    # The distance sees it.
    assert pixel_distance(digits.real, surest) > 10 * pixel_distance(digits.real, digits.fake)


def test_the_inception_score_sees_dropped_classes(digits: Digits) -> None:
    classifier = DigitFeatures().to(digits.real.device)
    kept = [digits.fake[digits.fake_labels < classes] for classes in (1, 2, 6, 10)]
    assert grows([inception_score(classifier.probabilities(images), 1)[0] for images in kept])


def test_recall_falls_and_precision_does_not_as_modes_are_dropped(digits: Digits) -> None:
    kept = [digits.fake[digits.fake_labels < classes] for classes in (10, 8, 6, 4, 2, 1)]
    values = [prdc(digits.real.flatten(1), images.flatten(1)) for images in kept]
    for name in ("recall", "coverage"):
        assert grows([value[name] for value in values[::-1]])
    assert min(value["precision"] for value in values) > values[0]["precision"] - 0.05


def test_precision_falls_with_noise(digits: Digits) -> None:
    noise = torch.randn(digits.fake.shape, generator=torch.Generator().manual_seed(1))
    values = [prdc(digits.real.flatten(1), (digits.fake + level * noise).flatten(1)) for level in (0.4, 0.2, 0.1, 0.0)]
    for name in ("precision", "density", "coverage"):
        assert grows([value[name] for value in values])


def test_the_bias_of_the_frechet_distance_falls_as_samples_grow() -> None:
    # Two samples of one distribution, whose distance is 0. The kernel distance has no such bias.
    generator = torch.Generator().manual_seed(0)
    frechet, kernel = [], []
    for n in (100, 200, 400, 800):
        pairs = [torch.randn(2, n, 16, generator=generator) for _ in range(5)]
        frechet.append(sum(float(frechet_distance_from_features(*pair)) for pair in pairs) / 5)
        kernel.append(sum(kernel_distance(*pair, subset_size=None)[0] for pair in pairs) / 5)
    assert grows(frechet[::-1])
    # As 1 / n.
    assert frechet[0] / frechet[-1] == pytest.approx(8, rel=0.3)
    assert max(map(abs, kernel)) < 0.1 * frechet[0]
