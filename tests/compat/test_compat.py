"""The signatures of other packages."""

import inspect

import numpy as np
import pytest
import scipy.linalg

from lipgan.compat.prdc import compute_prdc
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


# ---- prdc ----


def by_definition(real: np.ndarray, fake: np.ndarray, nearest_k: int) -> dict[str, float]:
    """With all distances in one matrix, as in section 3 of arXiv:2002.09797."""

    def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x[:, None] - y[None], axis=2)

    real_radii, fake_radii = (np.sort(distances(x, x), axis=1)[:, nearest_k] for x in (real, fake))
    between = distances(real, fake)
    return {
        "precision": float((between < real_radii[:, None]).any(0).mean()),
        "recall": float((between < fake_radii[None]).any(1).mean()),
        "density": float((between < real_radii[:, None]).sum(0).mean() / nearest_k),
        "coverage": float((between.min(1) < real_radii).mean()),
    }


def test_the_signature_is_that_of_prdc() -> None:
    assert list(inspect.signature(compute_prdc).parameters) == ["real_features", "fake_features", "nearest_k"]


@pytest.mark.parametrize("nearest_k", [1, 3, 5])
def test_prdc_is_its_definition(nearest_k: int) -> None:
    random = np.random.default_rng(nearest_k)
    real, fake = random.normal(size=(70, 4)), random.normal(0.7, 1.5, size=(60, 4))
    found = compute_prdc(real_features=real, fake_features=fake, nearest_k=nearest_k)
    assert list(found) == ["precision", "recall", "density", "coverage"]
    assert found == pytest.approx(by_definition(real, fake, nearest_k), rel=1e-12)
    assert 0 < found["precision"] < 1
    assert 0 < found["coverage"] < 1


def test_prdc_takes_lists_of_whole_numbers() -> None:
    real, fake = [[0], [1], [3], [7]], [[0], [2], [9]]
    assert compute_prdc(real, fake, 1) == pytest.approx(by_definition(np.array(real), np.array(fake), 1))
