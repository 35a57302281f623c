"""The Triton kernels of nearest_neighbours, in Triton's interpreter: the decisions of the definition, tile by tile."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lipgan.kernels import config
from lipgan.kernels import nearest_neighbours as kernels
from torch import Tensor

from lipgan import ops
from lipgan.reference import nearest_neighbours as reference

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Of x, y and features, around the tiles of `small_tiles`: one, primes, exact, one more.
SIZES = [(1, 1, 1), (2, 3, 5), (7, 11, 3), (4, 8, 4), (5, 9, 13), (6, 17, 9)]

TILE = config.distance_tile


@pytest.fixture(scope="module", autouse=True)
def small_tiles() -> Iterator[None]:
    """Tiles of 4 x 8 points and 4 features, so that few points fill several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "distance_tile", lambda: config.DistanceTile(4, 8, 4, 4))
        yield


def integers(n: int, d: int, largest: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Their distances are exact in every order of summation, and many are equal."""
    return torch.randint(-largest, largest + 1, (n, d)).to(dtype)


def roundings(d: int) -> float:
    """By how much two sums of the same d squares may differ, relative to themselves.

    Each is off by at most (d - 1) roundings of its additions and 1 of its squares; the differences are the same.
    """
    return 2 * d * 2.0**-53


def assert_same(value: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(value, truth, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize(
    ("m", "n", "d", "dtype"),
    [(*size, dtype) for size in SIZES for dtype in (DTYPES if size == (7, 11, 3) else DTYPES[:2])],
)
def test_whole_numbers_give_the_same_to_the_bit(m: int, n: int, d: int, dtype: torch.dtype) -> None:
    x, y = integers(m, d, dtype=dtype), integers(n, d, dtype=dtype)
    y[: n // 3] = x[torch.randint(m, (n // 3,))]  # copies, at distance 0
    before = x.clone(), y.clone()
    for k in {1, min(n, 5)}:
        assert_same(ops.nearest_neighbours(x, y, k, backend="triton"), reference.nearest_neighbours(x, y, k))
    if m > 1:
        k = min(m - 1, 5)
        assert_same(ops.nearest_neighbours(x, k=k, backend="triton"), reference.nearest_neighbours(x, None, k))
    rx, ry = (reference.nearest_neighbours(*pair, 1)[0][:, -1].contiguous() + 2 for pair in ((x, y), (y, x)))
    for closed in (False, True):
        expected = reference.ball_counts(x, y, rx, ry, closed)
        assert_same(ops.ball_counts(x, y, rx, ry, closed=closed, backend="triton"), expected)
    assert_same((x, y), before)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_ties_go_to_the_lower_index(k: int) -> None:
    x, y = integers(9, 2, 1), integers(35, 2, 1)  # 9 places for 35 points
    assert_same(kernels.nearest_neighbours(x, y, k), reference.nearest_neighbours(x, y, k))
    assert_same(kernels.nearest_neighbours(y, None, k), reference.nearest_neighbours(y, None, k))
    equal = torch.ones(20, 3)
    squared, indices = kernels.nearest_neighbours(equal, None, k)
    assert not squared.any()
    assert indices.tolist() == [[j for j in range(20) if j != i][:k] for i in range(20)]


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_more_neighbours_than_a_pass_finds(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "NEIGHBOUR_SLOTS", slots)
    x, y = integers(5, 3, 1), integers(10, 3, 1)
    for k in (slots + 1, 2 * slots, 9):
        assert_same(kernels.nearest_neighbours(x, y, k), reference.nearest_neighbours(x, y, k))
        assert_same(kernels.nearest_neighbours(y, None, k), reference.nearest_neighbours(y, None, k))


def test_farther_points_come_first_or_last() -> None:
    # Every tile brings nearer points than all before it, or none.
    for step in (-1.0, 1.0):
        y = step * torch.arange(40.0)[:, None] + (39.0 if step < 0 else 0.0)
        assert_same(kernels.nearest_neighbours(y[:1] * 0, y, 5), reference.nearest_neighbours(y[:1] * 0, y, 5))


@pytest.mark.parametrize(
    ("dtype", "offset"), [*((dtype, 0.0) for dtype in DTYPES), (torch.float32, 100.0), (torch.float64, 1e8)]
)
def test_real_numbers(dtype: torch.dtype, offset: float) -> None:
    x, y = ((torch.randn(n, 19, dtype=torch.float64) + offset).to(dtype) for n in (7, 18))
    y[:3] = x[:3]
    squared, indices = ops.nearest_neighbours(x, y, 4, backend="triton")
    distances = reference.squared_distances(x, y)
    truth = reference.nearest_neighbours(x, y, 4)[0]
    torch.testing.assert_close(squared, truth, rtol=roundings(19), atol=0)
    torch.testing.assert_close(distances.gather(1, indices), truth, rtol=roundings(19), atol=0)
    # Radii between two distances: no comparison hangs on an order of summation.
    rx, ry = (values.sort(1)[0][:, 5] * (1 + 2.0**-40) for values in (distances, distances.T))
    for closed in (False, True):
        value = ops.ball_counts(x, y, rx, ry, closed=closed, backend="triton")
        assert_same(value, reference.ball_counts(x, y, rx, ry, closed))


@pytest.mark.parametrize("scale", [2.0**-390, 2.0**390])
def test_magnitudes_far_from_1(scale: float) -> None:
    x, y = integers(6, 5) * scale, integers(10, 5) * scale
    assert_same(kernels.nearest_neighbours(x, y, 3), reference.nearest_neighbours(x, y, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_of_a_neighbour_lies_on_the_border(dtype: torch.dtype) -> None:
    # Both kernels have to find the same D to the bit, whichever of the two points is x and whatever its place.
    x = torch.randn(11, 18).to(dtype) + 10
    squared, indices = kernels.nearest_neighbours(x, None, 1)
    y, radii = x[indices[:, 0]], squared[:, 0]
    none = torch.full((11,), -1.0, dtype=torch.float64)
    own = (y[None] == x[:, None]).all(-1).sum(1)  # where x itself is somebody's neighbour it is in its own ball
    copies = (y[None] == y[:, None]).all(-1).sum(1)
    for first, second, radii_pair, row in ((x, y, (radii, none), 0), (y, x, (none, radii), 1)):
        opened = kernels.ball_counts(first, second, *radii_pair, False)[row]
        closed = kernels.ball_counts(first, second, *radii_pair, True)[row]
        assert torch.equal(opened[0], own)
        assert torch.equal(closed[0], own + copies)


@pytest.mark.parametrize("radius", [torch.inf, 0.0, -1.0, torch.nan])
@pytest.mark.parametrize("closed", [False, True])
def test_radii_of_any_size(closed: bool, radius: float) -> None:
    x, y = integers(5, 3, 1), integers(9, 3, 1)
    rx, ry = torch.full((5,), radius).double(), torch.full((9,), radius).double()
    assert_same(kernels.ball_counts(x, y, rx, ry, closed), reference.ball_counts(x, y, rx, ry, closed))


def test_strides_are_free() -> None:
    x, y = integers(9, 8)[:, ::2], integers(4, 12).T[::2, :]
    assert_same(kernels.nearest_neighbours(x, y, 3), reference.nearest_neighbours(x, y, 3))
    rx, ry = torch.arange(18.0).double()[::2], torch.arange(12.0).double()[::2]
    assert_same(kernels.ball_counts(x, y, rx, ry, True), reference.ball_counts(x, y, rx, ry, True))


@pytest.mark.usefixtures("poisoned_outputs")
def test_no_points() -> None:
    empty, y = torch.empty(0, 3), torch.randn(4, 3)
    squared, indices = kernels.nearest_neighbours(empty, y, 2)
    assert squared.shape == indices.shape == (0, 2)
    of_x, of_y = kernels.ball_counts(empty, y, torch.empty(0).double(), torch.ones(4).double(), False)
    assert of_x.shape == (2, 0)
    assert torch.equal(of_y, torch.zeros(2, 4, dtype=torch.int64))


def test_the_order_of_a_sum_does_not_hang_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(9, 13).double(), torch.randn(19, 13).double()
    found = kernels.nearest_neighbours(x, y, 3)
    monkeypatch.setattr(config, "distance_tile", lambda: config.DistanceTile(8, 16, 4, 4))
    assert_same(kernels.nearest_neighbours(x, y, 3), found)


@settings(max_examples=15, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 20), d=st.integers(1, 10), seed=st.integers(0, 2**31), data=st.data())
def test_any_sizes(m: int, n: int, d: int, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    x, y = integers(m, d), integers(n, d)
    k = data.draw(st.integers(1, min(n, 17)))
    assert_same(kernels.nearest_neighbours(x, y, k), reference.nearest_neighbours(x, y, k))
    rx, ry = torch.randint(0, 2 * d, (m,)).double(), torch.randint(0, 2 * d, (n,)).double()
    closed = data.draw(st.booleans())
    assert_same(kernels.ball_counts(x, y, rx, ry, closed), reference.ball_counts(x, y, rx, ry, closed))


def test_the_tile_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "distance_tile", TILE)
    x, y = integers(TILE().block_m + 1, 6), integers(TILE().block_n + 1, 6)
    assert_same(kernels.nearest_neighbours(x, y, 5), reference.nearest_neighbours(x, y, 5))
    radii = torch.full((len(x),), 20.0).double(), torch.full((len(y),), 30.0).double()
    assert_same(kernels.ball_counts(x, y, *radii, False), reference.ball_counts(x, y, *radii, False))


def test_bad_arguments_are_named() -> None:
    x, r = torch.randn(4, 3), torch.ones(4).double()
    for error, message, call in [
        (ValueError, r"expected x \[m, d\] and y", lambda: kernels.nearest_neighbours(x, x[:, :2], 1)),
        (ValueError, r"expected x \[m, d\] and y", lambda: kernels.nearest_neighbours(x, x.double(), 1)),
        (ValueError, r"expected x \[m, d\] and y", lambda: kernels.nearest_neighbours(x[0], None, 1)),
        (
            TypeError,
            "x must be float32 or float64, got torch.float16",
            lambda: kernels.nearest_neighbours(x.half(), None, 1),
        ),
        (ValueError, "k must be from 1 to .* 3, got 4", lambda: kernels.nearest_neighbours(x, None, 4)),
        (ValueError, "k must be from 1 to .* 4, got 0", lambda: kernels.nearest_neighbours(x, x, 0)),
        (ValueError, r"expected squared radii float64 \[4\]", lambda: kernels.ball_counts(x, x, r, r[:3], False)),
        (ValueError, r"expected squared radii float64 \[4\]", lambda: kernels.ball_counts(x, x, r.float(), r, False)),
    ]:
        with pytest.raises(error, match=message):
            call()
