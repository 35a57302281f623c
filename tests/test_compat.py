"""The signatures of other packages."""

import inspect

import numpy as np
import pytest
import scipy.linalg

from lipgan.compat.pytorch_fid import calculate_frechet_distance


def test_the_signature_is_that_of_pytorch_fid() -> None:
    parameters = inspect.signature(calculate_frechet_distance).parameters
    assert [(name, p.default) for name, p in parameters.items()] == [
        ("mu1", inspect.Parameter.empty),
        ("sigma1", inspect.Parameter.empty),
        ("mu2", inspect.Parameter.empty),
        ("sigma2", inspect.Parameter.empty),
        ("eps", 1e-6),
    ]


def test_the_value_is_that_of_its_formula() -> None:
    random = np.random.default_rng(0)
    (mu1, sigma1), (mu2, sigma2) = (
        (x.mean(0), np.cov(x, rowvar=False)) for x in (random.normal(size=(50, 7)), random.normal(1, 2, size=(60, 7)))
    )
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    expected = (mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real
    assert calculate_frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)
    assert calculate_frechet_distance(mu1, sigma1, mu1, sigma1, eps=1e-3) == pytest.approx(0, abs=1e-9)


def test_numbers_lists_and_whole_numbers_are_taken() -> None:
    assert calculate_frechet_distance(0, 1, 3, 4) == 10
    assert calculate_frechet_distance([0, 0], np.eye(2, dtype=int), [1, 1], 4 * np.eye(2)) == pytest.approx(4)
    with pytest.raises(ValueError, match="mu2"):
        calculate_frechet_distance([0, 0], np.eye(2), 1, 4)
