"""The Inception Score against its definition in NumPy, closed forms, and what the lectures say of it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipgan.metrics import InceptionScore, inception_score


def softmax(n: int, classes: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, classes, dtype=torch.float64, generator=generator)).softmax(1)


def definition(probs: np.ndarray, splits: int) -> tuple[float, float]:
    scores = []
    for k in range(splits):
        part = probs[k * len(probs) // splits : (k + 1) * len(probs) // splits]
        mean = part.mean(0, keepdims=True)
        scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(mean)), 1))))
    return float(np.mean(scores)), float(np.std(scores))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 11), st.integers(0, 100))
def test_the_definition(n: int, classes: int, splits: int, seed: int) -> None:
    splits = min(n, splits)
    probs = softmax(n, classes, seed)
    value = inception_score(probs, splits)
    assert value == pytest.approx(definition(probs.numpy(force=True), splits), rel=1e-12, abs=1e-12)
    assert inception_score(probs.numpy(force=True), splits) == value
    assert 1 <= value[0] <= classes * (1 + 1e-12)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_narrow_dtypes_are_summed_in_float64(dtype: torch.dtype, error: float) -> None:
    probs = softmax(2000, 10, scale=1.0)
    narrow = probs.to(dtype)
    assert inception_score(narrow) == inception_score(narrow.double())
    assert inception_score(narrow)[0] == pytest.approx(inception_score(probs)[0], rel=error)


def test_closed_forms() -> None:
    assert inception_score(torch.full((50, 7), 1 / 7), 5) == pytest.approx((1, 0), abs=1e-12)
    assert inception_score(torch.eye(7).repeat(10, 1), 10) == pytest.approx((7, 0), abs=1e-12)
    # Sure of one of two classes by 3 : 1, both as often: H(y) = log 2, H(y | x) = H(1/4).
    entropy = math.log(4) - 0.75 * math.log(3)
    assert inception_score(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), 1)[0] == pytest.approx(2 / math.exp(entropy))
    # Sorted by class, every split sees one class only.
    assert inception_score(torch.eye(10).repeat_interleave(10, 0), 10)[0] == pytest.approx(1)


def test_it_is_blind_to_one_image_per_class() -> None:
    # One memorized image of each class scores at least as well as varied images of all of them.
    varied = softmax(1000, 10, scale=4.0)
    memorized = torch.eye(10, dtype=torch.float64).repeat(100, 1)
    assert inception_score(memorized, 10)[0] == pytest.approx(10)
    assert inception_score(memorized, 10)[0] > inception_score(varied, 10)[0]


def test_the_generator_shuffles() -> None:
    probs = torch.eye(10).repeat_interleave(100, 0)
    first, again = (inception_score(probs, 10, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert first == again
    assert first[0] > 9
    assert inception_score(probs, 10)[0] == pytest.approx(1)
    assert inception_score(probs, 1) == pytest.approx(inception_score(probs, 1, generator=torch.Generator()))


def test_batches_and_reset() -> None:
    probs = softmax(103, 5).float()
    metric = InceptionScore(splits=4)
    for batch in (probs[:0], *probs.split(17)):
        metric.update(batch)
    assert tuple(map(float, metric.compute())) == inception_score(probs, 4)
    metric.reset()
    with pytest.raises(ValueError, match="needs at least 1 sample, got 0"):
        metric.compute()
    metric.update(probs.numpy(force=True))
    assert tuple(map(float, metric.compute())) == inception_score(probs, 4)


def test_a_batch_is_copied_and_a_classifier_is_called_without_gradient() -> None:
    layer = torch.nn.Linear(3, 4)
    metric = InceptionScore(lambda x: layer(x).softmax(1), splits=1)
    x = torch.randn(10, 3)
    expected = inception_score(layer(x).softmax(1), 1)
    metric.update(x)
    x.zero_()
    assert tuple(map(float, metric.compute())) == expected
    probs = softmax(10, 4)
    metric = InceptionScore(splits=1)
    metric.update(probs)
    expected = inception_score(probs, 1)
    probs.fill_(0.25)
    assert tuple(map(float, metric.compute())) == expected


@pytest.mark.parametrize(
    ("probs", "splits", "error", "message"),
    [
        ([[1.0]], 1, TypeError, "probs must be a NumPy array or a tensor, got list"),
        (torch.ones(3, 1, dtype=torch.int64), 1, TypeError, "probs must have a real floating-point dtype"),
        (torch.ones(3), 1, ValueError, r"probs must have shape \(n, d\), got \(3,\)"),
        (torch.ones(3, 1), 4, ValueError, "probs must have at least one row for each of the 4 splits, got 3"),
        (torch.ones(3, 1), 0, ValueError, "splits must be at least 1, got 0"),
        (torch.ones(3, 1), 1.0, TypeError, "splits must be an int, got 1.0"),
        (torch.tensor([[1.5, -0.5]]), 1, ValueError, "probs must not be negative, got -0.5"),
        (torch.tensor([[1.5, 0.5]]), 1, ValueError, "every row of probs must sum to 1, got a sum that is off by 1"),
        (torch.tensor([[torch.nan, 1.0]]), 1, ValueError, "probs must be finite, got 1 entries"),
    ],
)
def test_bad_input(probs: object, splits: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inception_score(probs, splits)  # type: ignore[arg-type]


def test_bad_input_of_the_class() -> None:
    with pytest.raises(TypeError, match="classifier must be callable or None, got int"):
        InceptionScore(3)  # type: ignore[arg-type]
    metric = InceptionScore()
    metric.update(softmax(3, 4))
    with pytest.raises(ValueError, match=r"probs must have shape \(n, 4\), got \(3, 5\)"):
        metric.update(softmax(3, 5))
    with pytest.raises(ValueError, match="every row of probs must sum to 1"):
        metric.update(torch.ones(3, 4))
    with pytest.raises(ValueError, match="at least one row for each of the 10 splits, got 3"):
        metric.compute()
