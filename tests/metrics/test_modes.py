"""Modes covered by samples, against a loop over samples and the chi distribution."""

import math
import sys

import pytest
import scipy.stats
import torch
from torch import Tensor

from lipgan.metrics import ModeCoverage, mode_coverage


def ring(k: int = 8) -> Tensor:
    angles = 2 * math.pi * torch.arange(k, dtype=torch.float64) / k
    return 2 * torch.stack([angles.cos(), angles.sin()], 1)


def mixture(n: int, modes: Tensor, std: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = modes[torch.randint(0, len(modes), (n,), generator=generator)]
    return centres + std * torch.randn(centres.shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_one_by_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lipgan.metrics.modes"], "_CHUNK_ENTRIES", chunk)
    modes, samples = ring(5), mixture(60, ring(5), 0.4)
    expected = [0] * 5
    for sample in samples.tolist():
        distances = [math.dist(sample, mode) for mode in modes.tolist()]
        if min(distances) <= 2 * 0.2:
            expected[distances.index(min(distances))] += 1
    for x, centres in (
        (samples, modes),
        (samples.numpy(force=True), modes.numpy(force=True)),
        (samples.T.contiguous().T, modes),
    ):
        found = mode_coverage(x, centres, 0.2, radius=2, min_samples=3)
        assert found.counts.tolist() == expected
        assert found.covered == sum(count >= 3 for count in expected)
        assert found.high_quality == sum(expected) / 60


def test_samples_of_the_mixture() -> None:
    found = mode_coverage(mixture(20_000, ring(), 0.05), ring(), 0.05)
    assert found.covered == 8
    assert found.high_quality == pytest.approx(scipy.stats.chi(2).cdf(3), abs=0.003)


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_dropped_modes_are_missed(kept: int) -> None:
    found = mode_coverage(mixture(2000, ring()[:kept], 0.01), ring(), 0.01)
    assert found.covered == kept
    assert (found.counts > 0).tolist() == [k < kept for k in range(8)]


def test_between_modes() -> None:
    found = mode_coverage(torch.zeros(5, 2), ring().float(), 0.1)
    assert (found.covered, found.high_quality) == (0, 0.0)
    assert isinstance(found, ModeCoverage)


def test_far_from_the_origin() -> None:
    samples, modes = mixture(500, ring(), 0.05), ring()
    near, far = mode_coverage(samples, modes, 0.05), mode_coverage(samples + 1e8, modes + 1e8, 0.05)
    assert abs(near.high_quality - far.high_quality) <= 0.01
    assert far.covered == 8


@pytest.mark.parametrize(
    ("samples", "std", "options", "error", "message"),
    [
        (torch.ones(3), 1.0, {}, ValueError, r"samples must have shape \(n, d\), got \(3,\)"),
        (torch.ones(3, 3), 1.0, {}, ValueError, "modes must have 3 features like samples, got 2"),
        (torch.ones(0, 2), 1.0, {}, ValueError, "samples must have at least 1 sample, got 0"),
        (torch.ones(3, 2) / 0, 1.0, {}, ValueError, "samples must be finite, got 6 entries"),
        (torch.ones(3, 2), 0.0, {}, ValueError, "std must be positive and finite, got 0.0"),
        (torch.ones(3, 2), 1.0, {"radius": math.nan}, ValueError, "radius must be positive and finite, got nan"),
        (torch.ones(3, 2), 1.0, {"min_samples": 0}, ValueError, "min_samples must be at least 1, got 0"),
        ([[1.0, 2.0]], 1.0, {}, TypeError, "samples must be a NumPy array or a tensor, got list"),
    ],
)
def test_bad_input(
    samples: object, std: float, options: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mode_coverage(samples, ring(), std, **options)  # type: ignore[arg-type]
