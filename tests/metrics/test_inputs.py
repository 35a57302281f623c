"""What the metrics take from NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lipgan import metrics
from lipgan.compat import prdc as compat_prdc
from lipgan.compat import pytorch_fid
from lipgan.metrics import FeatureStats, FrechetDistance, KernelDistance, frechet_distance

X = np.random.default_rng(0).normal(size=(20, 3))
HIDDEN = np.ma.masked_array(X, mask=X > 1)
ALL_HIDDEN = np.ma.masked_array(X, mask=True)
COV = np.ma.masked_array(np.eye(3), mask=np.eye(3) > 0)

ENTRIES: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "FeatureStats": (lambda x: FeatureStats(3).update(x), HIDDEN),
    "FrechetDistance": (lambda x: FrechetDistance().update(x, real=True), HIDDEN),
    "KernelDistance": (lambda x: KernelDistance().update(x, real=True), HIDDEN),
    "frechet_distance, mean": (
        lambda x: frechet_distance(x[0], np.eye(3), X[0], np.eye(3)),
        ALL_HIDDEN,
    ),
    "frechet_distance, covariance": (lambda x: frechet_distance(X[0], np.eye(3), X[0], x), COV),
    "kernel_distance": (lambda x: metrics.kernel_distance(X, x, subset_size=None), HIDDEN),
    "prdc": (lambda x: metrics.prdc(x, X), HIDDEN),
    "inception_score": (lambda x: metrics.inception_score(abs(x) / abs(x).sum(1)[:, None], splits=1), HIDDEN),
    "wasserstein_distance": (lambda x: metrics.wasserstein_distance(X, x), HIDDEN),
    "compat.prdc": (lambda x: compat_prdc.compute_prdc(x, X, 3), HIDDEN),
    "compat.pytorch_fid": (lambda x: pytorch_fid.calculate_frechet_distance(X[0], np.eye(3), X[0], x), COV),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_masked_values_are_refused(entry: str) -> None:
    call, masked = ENTRIES[entry]
    with pytest.raises(ValueError, match=r"must hold no masked values, got \d+: leave their samples out"):
        call(masked)


def test_an_array_of_which_nothing_is_masked_is_an_array() -> None:
    expected = FeatureStats(3).update(X)
    for mask in (False, np.zeros_like(X, dtype=bool)):
        stats = FeatureStats(3).update(np.ma.masked_array(X, mask=mask))
        assert np.array_equal(stats.mean, expected.mean)
        assert np.array_equal(stats.cov, expected.cov)
