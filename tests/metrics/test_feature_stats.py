"""Streaming mean and covariance against exact arithmetic, numpy.cov, and files of other programs."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate, max_error
from torch import Tensor

from lipgan.metrics import FeatureStats, feature_stats

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("single_thread")


def grid(n: int, d: int, steps: int = 2000, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features that are multiples of 1/1024 with correlations, and their mean and covariance, from integers.

    All sums are exact in int64, so the truth is off by the few roundings of its last divisions.
    """
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(-steps, steps + 1, (n, d), generator=generator)
    k = k + k[:, :1] // 2
    total = k.sum(0)
    scatter = n * (k.T @ k) - torch.outer(total, total)
    return k.double() / 1024, total.double() / n / 1024, scatter.double() / (n * (n - 1)) / 1024**2


def roundings(n: int) -> float:
    # Each entry is a sum of n products, whose roundings add up like a random walk: sqrt(n); 4 for the few more of the
    # centring and the joining, and for the luck of the largest of d^2 entries.
    return 4 * n**0.5


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e9])
@pytest.mark.parametrize("sizes", [[700], [1, 1, 698], [300, 0, 400], [650, 50], [100] * 7])
def test_covariance_under_a_common_offset(sizes: list[int], offset: float) -> None:
    x, mean, cov = grid(700, 13)
    stats = FeatureStats(13)
    for part in (x + offset).split(sizes):
        assert stats.update(part) is stats
    assert stats.count == 700
    # numpy.cov of the features without the offset: a common offset costs nothing.
    peer = torch.as_tensor(np.cov(x.numpy(force=True), rowvar=False))
    assert_as_accurate(stats.cov, peer, cov, roundings=roundings(700))
    assert torch.equal(stats.cov, stats.cov.T)
    assert max_error(stats.mean, mean + offset) <= 2 * np.spacing(abs(offset) + 2)


def test_the_naive_formula_fails_under_this_offset() -> None:
    # What the test above is for: E[x x^T] - E[x] E[x]^T has no correct digit at 1e9.
    x, _, cov = grid(700, 13)
    wide = x - 1e9
    naive = (wide.T @ wide - 700 * torch.outer(wide.mean(0), wide.mean(0))) / 699
    assert (naive - cov).abs().max() > cov.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_widened_before_it_is_summed(dtype: torch.dtype) -> None:
    # 64 steps of 1/16 lie on the grid of bfloat16, whose own sums would be off by percents.
    k, mean, cov = grid(600, 5, steps=8)
    x = (k * 64).to(dtype)
    assert torch.equal(x.double(), k * 64)
    stats = FeatureStats(5).update(x)
    assert_as_accurate(stats.cov, cov * 64**2, cov * 64**2, roundings=roundings(600))
    assert_as_accurate(stats.mean, mean * 64, mean * 64, roundings=4, scale=1.0)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("d", [1, 2, 3, 5, 6, 7, 11, 12, 13, 17])
def test_blocks_and_chunks(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_stats, "_BLOCK", 6)
    monkeypatch.setattr(feature_stats, "_SMALL_BLOCK", 2)
    monkeypatch.setattr(feature_stats, "_CHUNK_ENTRIES", 50)
    x, mean, cov = grid(101, d)
    stats = FeatureStats(d).update(x[:30]).update(x[30:])
    assert stats.cov.shape == (d, d)
    assert_as_accurate(stats.cov, cov, cov, roundings=roundings(101))
    assert_as_accurate(stats.mean, mean, mean, roundings=8, scale=2.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 2),
    st.integers(1, 6),
    st.sampled_from([0.0, 1e6]),
    st.integers(0, 2**31),
    st.data(),
)
def test_any_split_and_any_tree_of_merges(
    sizes: list[int], d: int, offset: float, seed: int, data: st.DataObject
) -> None:
    n = sum(sizes)
    x, mean, cov = grid(n, d, seed=seed)
    parts = [FeatureStats(d).update(part + offset) for part in x.split(sizes)]
    while len(parts) > 1:
        k = data.draw(st.integers(0, len(parts) - 2))
        right = parts.pop(k + 1)
        before = (right.count, right._mean.clone(), right._scatter.clone())
        assert parts[k].merge(right) is parts[k]
        assert right.count == before[0]
        assert torch.equal(right._mean, before[1])
        assert torch.equal(right._scatter, before[2])
    stats = parts[0]
    assert stats.count == n
    # The scale is that of the features, 4: where few samples lie close together the variance is smaller.
    assert_as_accurate(stats.cov, cov, cov, roundings=roundings(n), scale=16.0)
    assert max_error(stats.mean, mean + offset) <= 2 * np.spacing(offset + 4)


def test_merging_with_itself_doubles_the_samples() -> None:
    x, _, _ = grid(20, 3)
    stats = FeatureStats(3).update(x)
    stats.merge(stats)
    twice = FeatureStats(3).update(x).update(x)
    assert stats.count == 40
    assert_as_accurate(stats.cov, twice.cov, twice.cov, roundings=roundings(40))


def test_a_batch_far_from_the_others() -> None:
    # A shift taken from the first sample would lose (1e8)^2 eps = 2 of every later variance.
    x, _, cov = grid(500, 4)
    far = torch.full((1, 4), 1e8, dtype=torch.float64)
    stats = FeatureStats(4).update(far).update(x)
    both = torch.cat([far, x]).numpy(force=True)
    assert_as_accurate(stats.cov, torch.as_tensor(np.cov(both.T)), torch.as_tensor(np.cov(both.T)), roundings=100)
    rest = FeatureStats(4).update(x).update(far)
    assert_as_accurate(rest.cov, stats.cov, stats.cov, roundings=100)
    assert cov.abs().max() < 10


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: x.numpy(force=True),
    "read-only": lambda x: read_only(x.numpy(force=True)),
    "reversed": lambda x: np.ascontiguousarray(x.numpy(force=True)[::-1, ::-1])[::-1, ::-1],
    "Fortran": lambda x: np.asfortranarray(x.numpy(force=True)),
    "big-endian": lambda x: x.numpy(force=True).astype(">f8"),
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: x.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
    "requires grad": lambda x: x.clone().requires_grad_(),
    "channels_last": lambda x: x[:, :, None, None].contiguous(memory_format=torch.channels_last)[:, :, 0, 0],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x, mean, cov = grid(50, 6)
    given = LAYOUTS[layout](x)
    stats = FeatureStats(6).update(given)
    assert_as_accurate(stats.cov, cov, cov, roundings=roundings(50))
    assert_as_accurate(stats.mean, mean, mean, roundings=8, scale=2.0)
    assert not stats.cov.requires_grad


def test_features_are_not_changed() -> None:
    x, _, _ = grid(50, 6)
    before = x.clone()
    FeatureStats(6).update(x).update(x.numpy(force=True))
    assert torch.equal(x, before)


def test_what_it_returns_is_the_users_own() -> None:
    x, _, _ = grid(50, 3)
    stats = FeatureStats(3).update(x)
    mean, cov = stats.mean, stats.cov
    stats.mean.zero_()
    stats.cov.zero_()
    assert torch.equal(stats.mean, mean)
    assert torch.equal(stats.cov, cov)


def test_ddof() -> None:
    x, _, cov = grid(50, 3)
    stats = FeatureStats(3, ddof=0).update(x)
    assert stats.ddof == 0
    assert_as_accurate(stats.cov, torch.cov(x.T, correction=0), cov * 49 / 50, roundings=roundings(50))


def test_representation() -> None:
    assert repr(FeatureStats(3, ddof=0)) == "FeatureStats(dim=3, count=0, ddof=0)"


# ---- bad input ----


@pytest.mark.parametrize(
    ("dim", "kwargs", "error", "message"),
    [
        (0, {}, ValueError, "dim must be at least 1, got 0"),
        (3.0, {}, TypeError, "dim must be an int, got 3.0"),
        (3, {"ddof": 2}, ValueError, "ddof must be 0 or 1, got 2"),
    ],
)
def test_bad_construction(dim: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureStats(dim, **kwargs)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.ones(4, 2), ValueError, r"features must have shape \(n, 3\), got \(4, 2\)"),
        (torch.ones(3), ValueError, r"features must have shape \(n, 3\), got \(3,\)"),
        (torch.ones(4, 3).long(), TypeError, "features must have a real .* torch.int64"),
        (torch.ones(4, 3).cfloat(), TypeError, "features must have a real .* torch.complex64"),
        (np.ones((4, 3), int), TypeError, "features must have a real .* int64"),
        (np.ones((4, 3), complex), TypeError, "features must have a real .* complex128"),
        ([[1.0, 2.0, 3.0]], TypeError, "features must be a NumPy array or a tensor, got list"),
        (torch.tensor([[1.0, float("nan"), float("inf")]]), ValueError, "features must be finite, got 2 entries"),
        (torch.full((4, 3), 1e308, dtype=torch.float64), ValueError, "features must be small enough to be summed"),
    ],
)
def test_bad_features_add_nothing(features: Any, error: type[Exception], message: str) -> None:
    x, _, _ = grid(10, 3)
    stats = FeatureStats(3).update(x)
    mean, cov = stats.mean, stats.cov
    with pytest.raises(error, match=message):
        stats.update(features)
    assert stats.count == 10
    assert torch.equal(stats.mean, mean)
    assert torch.equal(stats.cov, cov)


def test_a_late_nan_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_stats, "_CHUNK_ENTRIES", 30)
    x, _, _ = grid(100, 3)
    x[-1, -1] = float("nan")
    stats = FeatureStats(3)
    with pytest.raises(ValueError, match="features must be finite, got 1 entries"):
        stats.update(x)
    assert stats.count == 0
    assert not stats._scatter.any()


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_samples(n: int, tmp_path: Path) -> None:
    stats = FeatureStats(3).update(torch.ones(n, 3))
    for use in (lambda: stats.cov, lambda: stats.save(tmp_path / "x.npz")):
        with pytest.raises(ValueError, match=f"the covariance needs at least 2 samples, got {n}|mean needs at least 1"):
            use()
    if n == 0:
        with pytest.raises(ValueError, match="the mean needs at least 1 sample, got 0"):
            _ = stats.mean
    assert not list(tmp_path.iterdir())


def test_bad_merges() -> None:
    with pytest.raises(ValueError, match="other must have dim 3, got 4"):
        FeatureStats(3).merge(FeatureStats(4))
    with pytest.raises(TypeError, match="other must be a FeatureStats, got int"):
        FeatureStats(3).merge(3)  # type: ignore[arg-type]


# ---- files ----


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_file_continues(tmp_path: Path, ddof: int) -> None:
    x, _, _ = grid(80, 5)
    x = x + 1e6
    path = tmp_path / "stats.npz"
    FeatureStats(5, ddof=ddof).update(x[:30]).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["stats.npz"]
    stats = FeatureStats.load(str(path)).update(x[30:])
    once = FeatureStats(5, ddof=ddof).update(x)
    assert (stats.count, stats.ddof) == (80, ddof)
    # The file holds the mean as one number, which leaves the offset's rounding in the distance of the two means.
    assert_as_accurate(stats.cov, once.cov, once.cov, roundings=roundings(80), scale=1e6)
    assert_as_accurate(stats.mean, once.mean, once.mean, roundings=2)


def test_others_read_our_file(tmp_path: Path) -> None:
    x, mean, cov = grid(80, 5)
    path = tmp_path / "stats.npz"
    FeatureStats(5).update(x).save(path)
    with np.load(path) as file:
        mu, sigma = file["mu"][:], file["sigma"][:]
    assert mu.dtype == sigma.dtype == np.float64
    assert mu.shape == (5,)
    np.testing.assert_allclose(mu, mean.cpu(), rtol=1e-13)
    np.testing.assert_allclose(sigma, cov.cpu(), rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_we_read_the_files_of_others(tmp_path: Path, write: Callable[..., None], dtype: Any) -> None:
    x, _, _ = grid(80, 5)
    mu, sigma = x.numpy(force=True).mean(0).astype(dtype), np.cov(x.numpy(force=True), rowvar=False).astype(dtype)
    write(tmp_path / "other.npz", mu=mu, sigma=sigma)
    stats = FeatureStats.load(tmp_path / "other.npz")
    assert stats.count is None
    np.testing.assert_array_equal(stats.mean, mu)
    np.testing.assert_allclose(stats.cov, sigma, rtol=np.finfo(dtype).eps)
    assert torch.equal(stats.cov, stats.cov.T)
    for add in (lambda: stats.update(x), lambda: stats.merge(stats), lambda: FeatureStats(5).merge(stats)):
        with pytest.raises(ValueError, match="read from a file without a count"):
            add()
    stats.save(tmp_path / "again.npz")
    again = FeatureStats.load(tmp_path / "again.npz")
    assert again.count is None
    assert torch.equal(again.cov, stats.cov)


MU, SIGMA = np.zeros(3), np.eye(3)


class Unpickled:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("the file was unpickled",))


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no mu": ({"sigma": SIGMA, "x": MU}, "it has no array 'mu', only sigma, x"),
    "no sigma": ({"mu": MU}, "it has no array 'sigma', only mu"),
    "empty": ({}, "it has no array 'mu', only none"),
    "shape of mu": ({"mu": SIGMA, "sigma": SIGMA}, r"mu must have shape \(d,\), got \(3, 3\)"),
    "no features": ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, r"mu must have shape \(d,\), got \(0,\)"),
    "shape of sigma": ({"mu": MU, "sigma": SIGMA[:2]}, r"sigma must have shape \(3, 3\), got \(2, 3\)"),
    "not square": ({"mu": MU, "sigma": MU}, r"sigma must have shape \(3, 3\), got \(3,\)"),
    "integers": ({"mu": MU, "sigma": SIGMA.astype(int)}, "sigma must have a real floating-point dtype, got int64"),
    "complex": ({"mu": MU.astype(complex), "sigma": SIGMA}, "mu must have a real .* complex128"),
    "text": ({"mu": np.array(["a", "b", "c"]), "sigma": SIGMA}, "mu must have a real .* <U1"),
    "NaN": ({"mu": MU, "sigma": SIGMA * np.nan}, "sigma must be finite, got 9 entries"),
    "infinite": ({"mu": MU + np.inf, "sigma": SIGMA}, "mu must be finite, got 3 entries"),
    "not symmetric": ({"mu": MU, "sigma": SIGMA + np.eye(3, k=1)}, "sigma must be symmetric, got max"),
    "count of one": ({"mu": MU, "sigma": SIGMA, "count": 1}, "count must be at least 2, got 1"),
    "fractional count": ({"mu": MU, "sigma": SIGMA, "count": 2.5}, "count must be one integer, got .* float64"),
    "ddof": ({"mu": MU, "sigma": SIGMA, "ddof": 7}, "ddof must be 0 or 1, got 7"),
    "objects": ({"mu": np.array([Unpickled()] * 3, object), "sigma": SIGMA}, "holds Python objects"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_archives(case: str, tmp_path: Path) -> None:
    arrays, message = MALFORMED[case]
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is no file of feature statistics: .*{message}"):
        FeatureStats.load(path)


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    x, _, _ = grid(20, 3)
    whole = tmp_path / "whole.npz"
    FeatureStats(3).update(x).save(whole)
    content = whole.read_bytes()
    (tmp_path / "pickle").write_bytes(pickle.dumps(Unpickled()))
    np.save(tmp_path / "array.npy", SIGMA)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "half").write_bytes(content[: len(content) // 2])
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 255
    (tmp_path / "flipped").write_bytes(flipped)
    for name in ("pickle", "array.npy", "empty", "half", "flipped"):
        with pytest.raises(ValueError, match=f"{name} is no file of feature statistics: "):
            FeatureStats.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        FeatureStats.load(tmp_path / "absent.npz")


@settings(max_examples=200, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), length=st.floats(0, 1))
def test_any_damage_is_one_clear_error_or_none(
    tmp_path_factory: pytest.TempPathFactory, position: float, value: int, length: float
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damaged.npz"
    stats = FeatureStats(3).update(grid(20, 3)[0])
    stats.save(path)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] = value
    path.write_bytes(content[: int(length * len(content)) + 1])
    try:
        loaded = FeatureStats.load(path)
    except ValueError as error:
        assert "is no file of feature statistics" in str(error)  # noqa: PT017
    else:
        assert torch.equal(loaded.mean, stats.mean)
