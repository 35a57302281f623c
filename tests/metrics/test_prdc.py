"""Precision, recall, density and coverage: equal to the N x N definition, and what they say of known samples."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import pairwise_distances
from torch import Tensor

from lipgan.metrics import PRDC, f1_score, prdc


def _by_definition(real: Tensor, fake: Tensor, nearest_k: int, closed: bool = False) -> dict[str, float]:
    """The definitions on matrices of squared distances, each from its differences."""

    def squared(x: Tensor, y: Tensor) -> Tensor:
        return (x.double()[:, None] - y.double()).square().sum(-1)

    # The nearest of all points is the point itself.
    of_real = squared(real, real).sort(1)[0][:, nearest_k]
    of_fake = squared(fake, fake).sort(1)[0][:, nearest_k]
    cross = squared(real, fake)
    inside = torch.le if closed else torch.lt
    in_real, in_fake = inside(cross, of_real[:, None]), inside(cross, of_fake)
    return {
        "precision": in_real.any(0).double().mean().item(),
        "recall": in_fake.any(1).double().mean().item(),
        "density": in_real.sum(0).double().mean().item() / nearest_k,
        "coverage": inside(cross.min(1)[0], of_real).double().mean().item(),
    }


def _as_the_package(real: np.ndarray[Any, Any], fake: np.ndarray[Any, Any], nearest_k: int) -> dict[str, float]:
    """As the package prdc computes them."""

    def radii(x: np.ndarray[Any, Any]) -> Any:
        distances = pairwise_distances(x, x, metric="euclidean")
        nearest = np.argpartition(distances, nearest_k + 1, axis=-1)[..., : nearest_k + 1]
        return np.take_along_axis(distances, nearest, axis=-1).max(axis=-1)

    of_real, of_fake = radii(real), radii(fake)
    cross = pairwise_distances(real, fake, metric="euclidean")
    return {
        "precision": (cross < of_real[:, None]).any(axis=0).mean(),
        "recall": (cross < of_fake[None, :]).any(axis=1).mean(),
        "density": (1.0 / nearest_k) * (cross < of_real[:, None]).sum(axis=0).mean(),
        "coverage": (cross.min(axis=1) < of_real).mean(),
    }


def _assert_same(value: dict[str, float], truth: dict[str, float]) -> None:
    for name, number in truth.items():
        if name == "density":  # two orders of a mean and a division
            assert value[name] == pytest.approx(number, rel=1e-15)
        else:
            assert value[name] == number, name


def _samples(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    real, fake = torch.randn(150, 20, dtype=torch.float64), 0.8 * torch.randn(130, 20, dtype=torch.float64) + 0.1
    if kind == "copies":
        fake[:50] = real[:50]
        real[50:60] = real[60:70]
        fake[100:120] = fake[0]
    if kind == "integers":
        real, fake = real.round(), fake.round()
    if kind == "offset":
        real, fake = real + 1000, fake + 1000
    return real.to(dtype), fake.to(dtype)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("kind", ["plain", "copies", "integers", "offset"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_to_the_definition(kind: str, dtype: torch.dtype, backend: str) -> None:
    real, fake = _samples(kind, dtype)
    for nearest_k in (1, 5):
        for compare in ("lt", "le"):
            value = prdc(real, fake, nearest_k, compare, backend=backend)
            _assert_same(value, _by_definition(real, fake, nearest_k, compare == "le"))


@pytest.mark.parametrize("nearest_k", [1, 3, 5, 10])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_equal_to_the_package_where_no_distances_are_equal(nearest_k: int, dtype: type) -> None:
    rng = np.random.default_rng(nearest_k)
    real = rng.normal(size=(300, 32)).astype(dtype)
    fake = (0.9 * rng.normal(size=(200, 32)) + 0.1).astype(dtype)
    # In float64, since scikit-learn rounds the distances of float32 features to float32.
    _assert_same(prdc(real, fake, nearest_k), _as_the_package(real.astype(float), fake.astype(float), nearest_k))


def test_copies_of_the_real_points() -> None:
    real = torch.randn(100, 8)
    for compare in ("lt", "le"):
        value = prdc(real, real.clone(), compare=compare)
        assert [value[key] for key in ("precision", "recall", "coverage", "f1")] == [1.0] * 4
    # Each point is in its own ball, and in those of the points whose k-th neighbour or a nearer one it is: k of them on
    # average, and with the border one more.
    assert prdc(real, real, 5)["density"] == 1.0
    assert prdc(real, real, 5, "le")["density"] == pytest.approx(6 / 5)


def test_sets_far_apart() -> None:
    value = prdc(torch.randn(50, 4), torch.randn(50, 4) + 1000)
    assert set(value.values()) == {0.0}


def test_dropped_modes_cost_recall_and_no_precision() -> None:
    centres = 20 * torch.eye(8)
    labels = torch.arange(400) % 8
    real = centres[labels] + torch.randn(400, 8)
    generated = centres[labels] + torch.randn(400, 8)
    values = [prdc(real, generated[labels < kept]) for kept in (8, 4, 2)]
    recall = [value["recall"] for value in values]
    coverage = [value["coverage"] for value in values]
    assert recall[0] > 0.8
    assert recall[0] > recall[1] > recall[2] > 0
    assert coverage[0] > coverage[1] > coverage[2] > 0
    assert all(value["precision"] > 0.8 for value in values)


def test_noise_costs_precision() -> None:
    real = torch.randn(300, 8)
    values = [prdc(real, torch.randn(300, 8) * scale)["precision"] for scale in (1.0, 1.5, 3.0)]
    assert values[0] > values[1] > values[2]


def test_f1() -> None:
    assert f1_score(0.5, 1.0) == pytest.approx(2 / 3)
    assert f1_score(0.0, 0.0) == 0.0
    with pytest.raises(ValueError, match=r"recall must be between 0 and 1, got 2"):
        f1_score(0.5, 2)
    real, fake = _samples("plain", torch.float64)
    value = prdc(real, fake)
    assert value["f1"] == f1_score(value["precision"], value["recall"])


def test_two_dtypes_meet_in_the_wider() -> None:
    real, fake = _samples("plain", torch.float64)
    assert prdc(real, fake.float()) == prdc(real, fake.float().double())
    assert prdc(real.half(), fake.bfloat16()) == prdc(real.half().float(), fake.bfloat16().float())


def test_metric_in_batches() -> None:
    real, fake = (samples.cpu() for samples in _samples("plain", torch.float32))  # where arrays are
    metric = PRDC(nearest_k=3, compare="le", reset_real_features=False)
    for part in real.split(40):
        metric.update(part, real=True)
    for part in fake.split(33):
        metric.update(part.numpy(), real=False)
    expected = prdc(real, fake, 3, "le")
    assert metric.compute() == expected
    assert metric.compute() == expected
    metric.reset()
    metric.update(fake[:2], real=False)
    with pytest.raises(ValueError, match="the generated side must have more than nearest_k = 3 samples, got 2"):
        metric.compute()
    metric.update(fake[2:], real=False)
    assert metric.compute() == expected


def test_metric_keeps_copies_and_takes_a_network() -> None:
    images = torch.randn(20, 1, 3, 3)
    metric = PRDC(torch.nn.Flatten())
    metric.update(images, real=True)
    metric.update(images + 0.1, real=False)
    expected = prdc(images.flatten(1), (images + 0.1).flatten(1))
    images.zero_()
    assert metric.compute() == expected
    metric.reset()
    with pytest.raises(ValueError, match="the real side needs at least 1 sample, got 0"):
        metric.compute()


def test_bad_arguments_are_named() -> None:
    x = torch.randn(10, 3)
    metric = PRDC()
    metric.update(x, real=True)
    calls: list[Any] = [
        (TypeError, "real must be a NumPy array or a tensor, got list", lambda: prdc([[1.0]], x)),
        (TypeError, "fake must have a real floating-point dtype", lambda: prdc(x, x.long())),
        (ValueError, "real must have more than nearest_k = 5 samples, got 5", lambda: prdc(x[:5], x)),
        (ValueError, "fake must have 3 features like real, got 2", lambda: prdc(x, x[:, :2])),
        (ValueError, "fake must be finite", lambda: prdc(x, x / 0)),
        (ValueError, "compare must be one of lt, le, got 'gt'", lambda: prdc(x, x, compare="gt")),
        (ValueError, "nearest_k", lambda: prdc(x, x, 0)),
        (ValueError, "backend must be one of", lambda: prdc(x, x, backend="fast")),
        (TypeError, "features must be callable or None, got int", lambda: PRDC(3)),
        (TypeError, "real must be a bool, got 1", lambda: metric.update(x, real=1)),
        (ValueError, r"features must have shape \(n, 3\), got \(10, 2\)", lambda: metric.update(x[:, :2], real=False)),
    ]
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()
