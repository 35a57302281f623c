"""The kernel distance against its definition, whole kernel matrices in NumPy, and closed forms."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from devices import as_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipgan.metrics import CMMD, KernelDistance, cmmd, kernel_distance

module = sys.modules["lipgan.metrics.kernel_distance"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definition(x: Tensor, y: Tensor, kernel: str = "polynomial", sigma: float = 10.0) -> float:
    def matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if kernel == "polynomial":
            return (a @ b.T / a.shape[1] + 1) ** 3
        return np.exp(-((a[:, None] - b) ** 2).sum(-1) / (2 * sigma**2))

    a, b = x.double().numpy(force=True), y.double().numpy(force=True)
    xx, yy, xy = matrix(a, a), matrix(b, b), matrix(a, b)
    m, n = len(a), len(b)
    return float((xx.sum() - np.trace(xx)) / (m * (m - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1)) - 2 * xy.mean())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 40), st.integers(2, 40), st.integers(1, 9), st.sampled_from(["polynomial", "rbf"]), st.integers(0, 9)
)
def test_all_samples(m: int, n: int, d: int, kernel: str, seed: int) -> None:
    x, y = randn(m, d, seed=seed), 1 + randn(n, d, seed=seed + 1)
    mean, std = kernel_distance(x, y, subset_size=None, kernel=kernel, sigma=2.0)
    assert mean == pytest.approx(definition(x, y, kernel, 2.0), rel=1e-11, abs=1e-11)
    assert std == 0
    arrays = x.numpy(force=True), y.numpy(force=True)
    value, spread = kernel_distance(*arrays, subset_size=None, kernel=kernel, sigma=2.0)
    assert value == as_on_cpu(mean)
    assert spread == 0


@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
@pytest.mark.parametrize("block", [1, 3, 16, 17, 1000])
def test_blocks(block: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("_ROWS", block), ("_COLUMNS", max(1, block // 2)), ("_MOST_ROWS", max(1, block // 3))):
        monkeypatch.setattr(module, name, size)
    x, y = randn(17, 3), randn(33, 3, seed=1) + 0.5
    value, _ = kernel_distance(x, y, subset_size=None, kernel=kernel)
    assert value == pytest.approx(definition(x, y, kernel), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize(("n", "subsets", "size"), [(40, 30, 25), (40, 2, 5)])
def test_both_routes_average_the_subsets(n: int, subsets: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 16)
    monkeypatch.setattr(module, "_MOST_ROWS", 9)
    x, y = randn(n, 30), randn(n + 3, 30, seed=1)
    in_x = module._subsets(n, subsets, size, torch.Generator().manual_seed(4))
    assert all(len(set(row.tolist())) == size for row in in_x)
    generator = torch.Generator().manual_seed(4)
    in_x, in_y = (module._subsets(k, subsets, size, generator) for k in (n, n + 3))
    truth = [definition(x[i], y[j]) for i, j in zip(in_x, in_y, strict=True)]
    shared: list[int] = []
    membership = module._membership
    monkeypatch.setattr(module, "_membership", lambda *a: shared.append(1) or membership(*a))
    value = kernel_distance(x, y, subsets, size, generator=torch.Generator().manual_seed(4))
    assert value == pytest.approx((np.mean(truth), np.std(truth)), rel=1e-11)
    assert len(shared) == (2 if subsets == 30 else 0)


def test_the_generator_repeats_itself() -> None:
    x, y = randn(30, 4), randn(30, 4, seed=1)
    values = [kernel_distance(x, y, 5, 10, generator=torch.Generator().manual_seed(k)) for k in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_without_bias() -> None:
    # Of two samples of one distribution the mean over many draws is 0 within 4 standard errors.
    draws = np.array(
        [kernel_distance(randn(8, 3, seed=k), randn(8, 3, seed=k + 999), subset_size=None)[0] for k in range(400)]
    )
    assert abs(draws.mean()) < 4 * draws.std() / 20
    assert (draws < 0).any()


def test_closed_form() -> None:
    # (x.y + 1): the squared distance of the means, without bias: mean of x x' + mean of y y' - 2 mean of x y.
    x = torch.tensor([[0.0], [2.0]])
    assert kernel_distance(x, x + 1, subset_size=None, degree=1) == (-1.0, 0.0)
    # All samples at one point each, at distance 2: 2 - 2 exp(-4 / (2 sigma^2)).
    x, y = torch.zeros(5, 1), torch.full((4, 1), 2.0)
    value, _ = kernel_distance(x, y, subset_size=None, kernel="rbf", sigma=1.0)
    assert value == pytest.approx(2 - 2 * np.exp(-2), rel=1e-14)


def test_a_common_offset_costs_the_gaussian_no_accuracy() -> None:
    x, y = randn(20, 4).round(decimals=3), randn(20, 4, seed=1).round(decimals=3)
    near, far = (kernel_distance(x + k, y + k, subset_size=None, kernel="rbf", sigma=1.0)[0] for k in (0, 2.0**20))
    assert far == pytest.approx(near, rel=1e-7)


def test_the_gaussian_sees_small_distances_far_from_the_other_set() -> None:
    # Multiples of 1/8, which stay exact with the offset; its square rounds to multiples of 1 and more.
    x, y = (randn(20, 4, seed=k).mul(8).round() / 8 for k in (0, 1))
    for offset in (1e8, 1e12):
        mixed = torch.cat([x, y + offset])
        assert kernel_distance(x, y + offset, subset_size=None, kernel="rbf", sigma=1.0)[0] == pytest.approx(
            definition(x, y + offset, "rbf", 1.0), rel=1e-13
        )
        assert kernel_distance(mixed, y, subset_size=None, kernel="rbf", sigma=1.0)[0] == pytest.approx(
            definition(mixed, y, "rbf", 1.0), rel=1e-13
        )
        assert cmmd(x, y + offset, sigma=1.0) == pytest.approx(cmmd(x, y + 1e3, sigma=1.0), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_computed_in_float64(dtype: torch.dtype) -> None:
    x, y = randn(20, 4).to(dtype), randn(20, 4, seed=1).to(dtype)
    assert kernel_distance(x, y, subset_size=None)[0] == pytest.approx(definition(x, y), rel=1e-11)
    assert kernel_distance(x.T.contiguous().T, y, subset_size=None)[0] == pytest.approx(definition(x, y), rel=1e-11)


def bound_of_float32(x: Tensor, y: Tensor, independent: bool = True) -> float:
    """Equation (2), or (1), of docs/numerics/kernel_distance.md, for all samples at once."""
    both = torch.cat([x, y]).double()
    n, d = min(len(x), len(y)), x.shape[1]
    largest = float((both - both.mean(0)).square().sum(1).max()) / d
    steepest = 3 * (float((both @ both.T).abs().max()) / d + 1) ** 2
    alone = 4 * 2.0**-24 * (d**0.5 + 2) * largest * steepest
    return 6 * alone / n if independent else alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["rectified", "far from 0", "falling", "few rows"])
def test_products_in_float32_stay_within_their_bound(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = randn(300, 512), 1.1 * randn(320, 512, seed=1) + 0.05
    if kind == "rectified":
        x, y = x.clamp_min(0), y.clamp_min(0)
    elif kind == "far from 0":
        x, y = x + 30, y + 30
    elif kind == "falling":
        falls = (1 + torch.arange(512, dtype=torch.float64)) ** -1
        x, y = 20 * x * falls, 20 * y * falls
    else:  # the rounding of equal rows is equal, too
        x, y = x[:3].repeat(100, 1), y[:2].repeat(160, 1)
    x, y = x.to(dtype), y.to(dtype)
    used: list[torch.dtype] = []
    rows = module._Rows
    monkeypatch.setattr(module, "_Rows", lambda a, *rest, **named: used.append(a.dtype) or rows(a, *rest, **named))
    value, _ = kernel_distance(x, y, subset_size=None)
    assert used[0] == (torch.float32 if x.device.type == "cpu" else torch.float64)
    # The definition sums the kernel in float64, in another order.
    both = torch.cat([x, y]).double()
    exact = 16 * 2.0**-52 * (float((both @ both.T).abs().max()) / 512 + 1) ** 3
    error = abs(value - definition(x, y))
    assert error <= bound_of_float32(x, y, independent=kind != "few rows") + exact
    wide = kernel_distance(x.double(), y.double(), subset_size=None)[0]
    assert abs(wide - definition(x, y)) <= exact


def test_products_are_in_float64_where_float32_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = randn(300, 4).float(), randn(300, 4, seed=1).float()
    used: list[torch.dtype] = []
    rows = module._Rows
    monkeypatch.setattr(module, "_Rows", lambda a, *rest, **named: used.append(a.dtype) or rows(a, *rest, **named))
    large = x.clone()
    large[0, 0] = 2.0**41
    for a, b, options in (
        (x.double(), y.double(), {}),
        (large, y, {}),
        (x, y, {"kernel": "rbf"}),
        (x[:255], y, {}),
        (x, y, {"subset_size": 255, "subsets": 1}),
    ):
        kernel_distance(a, b, **{"subset_size": None, **options})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
        kernel_distance(x, y, subset_size=None)
    assert set(used) == {torch.float64}


def test_autocast_changes_nothing() -> None:
    x, y = randn(300, 4).float(), randn(300, 4, seed=1).float()
    expected = kernel_distance(x, y, subset_size=None)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel_distance(x, y, subset_size=None) == expected


def test_it_grows_as_the_distributions_part() -> None:
    x, y = randn(300, 5), randn(300, 5, seed=1)
    values = [kernel_distance(x, y + shift, subset_size=None)[0] for shift in (0.0, 0.3, 0.6, 1.2)]
    assert values == sorted(values)


def test_batches_and_reset() -> None:
    x, y = randn(50, 4).float(), randn(60, 4, seed=1).float()
    options: dict[str, Any] = {"subsets": 3, "subset_size": 20}
    metric = KernelDistance(reset_real_features=False, **options, generator=torch.Generator().manual_seed(0))
    for real, rows in ((True, x), (False, y)):
        for batch in rows.split(7):
            metric.update(batch, real=real)
    expected = kernel_distance(x, y, **options, generator=torch.Generator().manual_seed(0))
    assert tuple(map(float, metric.compute())) == expected
    metric.reset()
    with pytest.raises(ValueError, match="the generated side needs at least 1 sample, got 0"):
        metric.compute()
    metric.update(y, real=False)
    metric.options["generator"].manual_seed(0)
    assert tuple(map(float, metric.compute())) == expected
    metric.reset_real_features = True
    metric.reset()
    with pytest.raises(ValueError, match="the real side needs at least 1 sample, got 0"):
        metric.compute()


X = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("fake", "options", "error", "message"),
    [
        (torch.ones(4, 3), {}, ValueError, "fake must have 2 features like real, got 3"),
        (torch.ones(4), {}, ValueError, r"fake must have shape \(n, d\), got \(4,\)"),
        (torch.ones(4, 2).long(), {}, TypeError, "fake must have a real floating-point dtype"),
        (
            *(X[:3], {}, ValueError),
            "^real must have at least 1000 samples for subset_size=1000, got 4; pass subset_size=3 or less$",
        ),
        (
            *(X[:3], {"subset_size": 4}, ValueError),
            "^fake must have at least 4 samples for subset_size=4, got 3; pass subset_size=3 or less$",
        ),
        (
            *(X, {"protocol": "torchmetrics"}, ValueError),
            "got 4; protocol 'torchmetrics' sets it: leave out protocol and pass subset_size=4 or less$",
        ),
        (X[:1], {}, ValueError, "^fake must have at least 2 samples, got 1$"),
        (X[:1], {"subset_size": None}, ValueError, "^fake must have at least 2 samples, got 1$"),
        (X, {"subset_size": 1}, ValueError, "subset_size must be at least 2, got 1"),
        (X, {"subsets": 0}, ValueError, "subsets must be at least 1, got 0"),
        (X, {"kernel": "linear"}, ValueError, "kernel must be one of polynomial, rbf, got 'linear'"),
        (X, {"sigma": 0.0}, ValueError, "sigma must be positive, got 0.0"),
        (X, {"sigma": math.inf}, ValueError, "sigma must be finite, got inf"),
        (X, {"generator": 1}, TypeError, "generator must be a torch.Generator or None, got int"),
        (X, {"gamma": float("nan")}, ValueError, "gamma must be finite, got nan"),
        (X * 1e20, {"subset_size": None, "degree": 40}, ValueError, "small enough for their kernel"),
        (X * torch.inf, {"subset_size": None}, ValueError, "fake must be finite, got 8 entries"),
    ],
)
def test_bad_input(fake: Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernel_distance(X, fake, **options)


def test_bad_input_of_the_class() -> None:
    with pytest.raises(TypeError, match="features must be callable or None, got int"):
        KernelDistance(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'subset'"):
        KernelDistance(subset=3)
    metric = KernelDistance()
    metric.update(X, real=True)
    with pytest.raises(TypeError, match="real must be a bool, got 1"):
        metric.update(X, real=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"features must have shape \(n, 2\), got \(4, 3\)"):
        metric.update(torch.ones(4, 3), real=False)
    metric.update(X, real=False)
    with pytest.raises(ValueError, match="for subset_size=1000, got 4; pass subset_size=4 or less"):
        metric.compute()


# ---- CMMD ----


def cmmd_by_definition(x: Tensor, y: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    a, b = x.double().numpy(force=True), y.double().numpy(force=True)
    xx, yy, xy = (np.exp(-((p[:, None] - q) ** 2).sum(-1) / (2 * sigma**2)).mean() for p, q in ((a, a), (b, b), (a, b)))
    return float(scale * (xx + yy - 2 * xy))


@pytest.mark.parametrize(("m", "n", "sigma", "scale"), [(1, 1, 10.0, 1000.0), (7, 12, 10.0, 1000.0), (9, 2, 0.7, 3.0)])
@pytest.mark.parametrize("block", [2, 1000])
def test_cmmd(m: int, n: int, sigma: float, scale: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_ROWS", "_COLUMNS", "_MOST_ROWS"):
        monkeypatch.setattr(module, name, block)
    x, y = (torch.nn.functional.normalize(randn(k, 5, seed=k) + 1) for k in (m, n + 30))
    y = y[:n]
    expected = cmmd_by_definition(x, y, sigma, scale)
    assert expected > 0
    value = cmmd(x, y, sigma=sigma, scale=scale)
    # Means of at most 1 are subtracted, in float64.
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)
    assert cmmd(y.numpy(force=True), x.numpy(force=True), sigma=sigma, scale=scale) == pytest.approx(value, rel=1e-9)
    metric = CMMD(sigma=sigma, scale=scale)
    for rows, real in ((x, True), (y, False)):
        for batch in rows.split(3):
            metric.update(batch, real=real)
    assert float(metric.compute()) == pytest.approx(value, rel=1e-9)


def test_cmmd_of_equal_sets_and_of_narrow_embeddings() -> None:
    x, y = (torch.nn.functional.normalize(randn(200, 64, seed=k)) for k in (0, 1))
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    # Means near 1 are subtracted: in float32 the result would be off by some 1e-4 of itself.
    assert cmmd(x.float(), y.float()) == pytest.approx(cmmd_by_definition(x.float(), y.float()), rel=1e-9)
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        cmmd(x, y, sigma=0.0)
    with pytest.raises(ValueError, match="scale must be positive, got -1"):
        cmmd(x, y, scale=-1.0)
    with pytest.raises(ValueError, match="fake must have 64 features like real, got 3"):
        cmmd(x, y[:, :3])
