"""lipgan.metrics.features: what every extractor promises, and what each one computes."""

from typing import Any

import pytest
import torch
from devices import DEVICE
from safetensors.torch import load_file
from torch import nn

from lipgan import data
from lipgan.metrics import FrechetDistance
from lipgan.metrics import features as features_module
from lipgan.metrics.features import EXTRACTORS, FeatureExtractor, Pixels, names
from lipgan.metrics.features import digits as digits_module
from lipgan.metrics.features.digits import HELD_OUT, WEIGHTS

# Those that need no file of the user's.
SHIPPED = ["digits", "pixels", "random"]


def get(name: str, **options: Any) -> Any:
    """The extractor, on the device of the images."""
    return features_module.get(name, **options).to(DEVICE)


def images(n: int = 5, channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)


def unit_digits(size: int) -> torch.Tensor:
    return (data.load("digits", size).samples.to(DEVICE) + 1) / 2


def held_out_labels() -> torch.Tensor:
    labels = data.load("digits").labels
    assert labels is not None
    return labels[HELD_OUT].to(DEVICE)


# ---- every extractor ----


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 16, 16), (3, 13, 31), (1, 1, 1), (3, 5, 64)])
def test_features_are_rows_of_float32(name: str, channels: int, height: int, width: int) -> None:
    extractor = get(name)
    assert isinstance(extractor, FeatureExtractor)
    assert extractor.name == name
    for n in (0, 1, 5):
        features = extractor(images(n, channels, height, width))
        assert features.dtype == torch.float32
        assert features.shape == (n, extractor.dim or channels * height * width)
        assert features.isfinite().all()


@pytest.mark.parametrize("name", SHIPPED)
def test_bytes_and_fractions_are_the_same_images(name: str) -> None:
    extractor, bytes_ = get(name), images()
    expected = extractor(bytes_)
    assert torch.equal(extractor(bytes_.float() / 255), expected)
    torch.testing.assert_close(extractor(bytes_.double() / 255), expected)
    torch.testing.assert_close(extractor((bytes_.float() / 255).half()), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", SHIPPED)
def test_features_depend_on_the_image_alone(name: str) -> None:
    x = images(9)
    before = torch.get_rng_state()
    extractor = get(name)
    features = extractor(x)
    assert torch.equal(torch.get_rng_state(), before), "the extractor drew from the global generator"
    torch.manual_seed(1)
    assert torch.equal(get(name)(x), features)
    torch.testing.assert_close(torch.cat([extractor(part) for part in x.split(2)]), features)
    torch.testing.assert_close(extractor(x.to(memory_format=torch.channels_last)), features)
    torch.testing.assert_close(extractor(x.flip(0)), features.flip(0))
    assert not torch.equal(features[0], features[1])


@pytest.mark.parametrize("name", SHIPPED)
def test_extractors_are_frozen_and_differentiable_in_the_images(name: str) -> None:
    extractor = get(name)
    assert isinstance(extractor, nn.Module)
    x = images().float() / 255
    expected = extractor(x)
    nn.ModuleList([extractor]).train()
    assert torch.equal(extractor(x), expected), "train() changed the features"
    assert not expected.requires_grad
    extractor(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in extractor.parameters())


@pytest.mark.parametrize("name", SHIPPED)
def test_bad_images_are_refused(name: str) -> None:
    extractor = get(name)
    with pytest.raises(TypeError, match="images must be a tensor, got ndarray"):
        extractor(images().numpy(force=True))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"uint8 or a floating-point dtype, got torch\.int64"):
        extractor(images().long())
    for shape in [(3, 8, 8), (2, 4, 8, 8), (2, 2, 8, 8), (2, 8, 8, 3), (2, 3, 0, 8), (2, 3, 8, 0)]:
        with pytest.raises(ValueError, match=r"images must have shape \(n, 1 or 3, h, w\), got \("):
            extractor(torch.zeros(shape))
    for bad in (-0.5, 1.5, 255.0, float("nan"), float("inf")):
        x = torch.full((2, 3, 8, 8), 0.5)
        x[1, 2, 3, 4] = bad
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got"):
            extractor(x)


def test_names_are_looked_up() -> None:
    assert names() == sorted(EXTRACTORS)
    with pytest.raises(ValueError, match="unknown feature extractor 'pixel'; did you mean pixels"):
        get("pixel")
    with pytest.raises(TypeError, match="seeds"):
        get("random", seeds=1)


def test_a_metric_takes_an_extractor() -> None:
    metric = FrechetDistance(get("random"))
    for real in (True, False):
        metric.update(images(20), real=real)
    assert metric.compute() > 0


# ---- pixels, random ----


def test_pixels_are_the_pixels() -> None:
    x = images(2, 3, 4, 5)
    assert torch.equal(Pixels()(x), x.reshape(2, 60).float() / 255)


def test_random_features_of_the_seed() -> None:
    x = images()
    assert torch.equal(get("random", seed=0)(x), get("random")(x))
    assert not torch.allclose(get("random", seed=1)(x), get("random")(x))


@pytest.mark.parametrize("name", ["digits", "random"])
def test_grey_is_the_same_grey_in_colour(name: str) -> None:
    grey = images(channels=1)
    torch.testing.assert_close(get(name)(grey), get(name)(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_distance_grows_with_noise(name: str) -> None:
    real, fake = unit_digits(8)[::2], unit_digits(8)[1::2]
    metric = FrechetDistance(get(name), reset_real_features=False)
    metric.update(real, real=True)
    distances = []
    for noise in (0.0, 0.1, 0.2, 0.4):
        metric.reset()
        metric.update((fake + noise * torch.randn(fake.shape)).clamp(0, 1), real=False)
        distances.append(metric.compute().item())
    assert distances == sorted(distances)
    assert distances[-1] > 5 * distances[0]


# ---- digits ----


@pytest.mark.parametrize("size", [8, 12, 16, 28, 32])
def test_digits_not_trained_on_are_origin_accuracy(size: int) -> None:
    extractor = get("digits")
    assert isinstance(extractor, digits_module.DigitFeatures)
    probabilities = extractor.probabilities(unit_digits(size)[HELD_OUT])
    assert probabilities.shape == (359, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(359))
    assert (probabilities.argmax(1) == held_out_labels()).double().mean() > 0.97


def test_digit_features_carry_the_classes() -> None:
    extractor = get("digits")
    assert isinstance(extractor, digits_module.DigitFeatures)
    x = unit_digits(8)[HELD_OUT]
    logits = extractor.network.classes(extractor(x))
    torch.testing.assert_close(logits.softmax(1), extractor.probabilities(x))


def test_the_weights_are_small() -> None:
    path = digits_module.resources.files("lipgan.metrics.features").joinpath(WEIGHTS)
    assert len(path.read_bytes()) < 2**20
    weights = load_file(str(path))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())
