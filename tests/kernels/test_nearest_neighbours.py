"""The Triton kernels of nearest_neighbours, in Triton's interpreter: the decisions of the definition, tile by tile."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lipgan.kernels import config
from lipgan.kernels import nearest_neighbours as kernels
from lipgan.kernels.nearest_neighbours import launch
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


# ---- by bounds: the exact kernel, alone, is the truth to the bit ----

Left = Callable[[], list[int]]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Left:
    """Bounds serve every call, in small steps, with 8 pairs a row. The rows that each call left to the exact kernel."""
    monkeypatch.setattr(config, "bounds_serve", lambda m, n, d: True)
    monkeypatch.setattr(config, "product_tile", lambda *_, **__: config.ProductTile(16, 16, 1))
    monkeypatch.setattr(config, "BOUNDS_WORKSPACE", 1)  # 16 rows at a time
    monkeypatch.setattr(config, "BOUNDS_PER_STEP", 16)
    monkeypatch.setattr(config, "FEATURES_PER_STEP", 4)
    monkeypatch.setattr(config, "NEIGHBOUR_PAIRS", 8)
    calls, shift = [], launch._shift

    def remembered(x: Tensor, y: Tensor) -> launch._Shifted:
        calls.append(shift(x, y))
        return calls[-1]

    monkeypatch.setattr(launch, "_shift", remembered)
    return lambda: [int(call.pending.sum()) for call in calls]


def exactly(call: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A call by the exact kernels alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "bounds_serve", lambda m, n, d: False)
        return call()


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_find_the_same_to_the_bit(dtype: torch.dtype, left: Left) -> None:
    # Two blocks of rows, both ragged. Whole numbers with ties: some rows have more than 8 pairs, and some do not.
    x, y = integers(19, 2, 2, dtype), integers(37, 2, 2, dtype)
    y[:9] = x[5:14]
    rx, ry = torch.randint(0, 9, (19,)).double(), torch.randint(0, 9, (37,)).double()
    for k in (1, 4):
        value = ops.nearest_neighbours(x, y, k, backend="triton")
        assert_same(value, reference.nearest_neighbours(x, y, k))
        assert_same(value, ops.nearest_neighbours(x, y, k, backend="native"))
    value = ops.ball_counts(x, y, rx, ry, closed=True, backend="triton")
    assert_same(value, reference.ball_counts(x, y, rx, ry, True))
    assert_same(value, ops.ball_counts(x, y, rx, ry, closed=True, backend="native"))
    assert any(0 < rows < 19 for rows in left())


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_decide_all_of_separate_points(dtype: torch.dtype, left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "BOUNDS_PER_STEP", 64)  # a class for each point
    x, y = (torch.randn(n, 3, dtype=torch.float64).to(dtype) + 50 for n in (5, 20))
    for k in (1, 8):
        assert_same(kernels.nearest_neighbours(x, y, k), exactly(lambda k=k: kernels.nearest_neighbours(x, y, k)))
    assert_same(kernels.nearest_neighbours(x, None, 4), exactly(lambda: kernels.nearest_neighbours(x, None, 4)))
    # Radii that reach to a point: the bounds cannot decide that one.
    rx = kernels.nearest_neighbours(x, y, 3)[0][:, 2].contiguous()
    ry = kernels.nearest_neighbours(y, x, 2)[0][:, 1].contiguous()
    for closed in (False, True):
        value = kernels.ball_counts(x, y, rx, ry, closed)
        assert_same(value, exactly(lambda closed=closed: kernels.ball_counts(x, y, rx, ry, closed)))
        assert value[0][0].tolist() == [2 + closed] * 5
        assert value[1][0].tolist() == [1 + closed] * 20
    assert not any(left())


def test_the_length_of_the_point_that_asks_counts_in_its_limit(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point far from all others, whose distances differ by less than float32 can tell."""
    monkeypatch.setattr(config, "BOUNDS_PER_STEP", 64)
    monkeypatch.setattr(config, "NEIGHBOUR_PAIRS", 64)
    aside = torch.rand(40, 2, dtype=torch.float64) - 0.5
    squared = 1e6 + 1e-6 * torch.randperm(40).double()
    y = torch.cat([1e3 - (squared - aside.square().sum(1)).sqrt()[:, None], aside], 1)
    x = torch.tensor([[1e3, 0.0, 0.0]], dtype=torch.float64)
    # Turned, so that large products cancel.
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    x, y = x @ turn, y @ turn
    for k in (1, 5):
        assert_same(kernels.nearest_neighbours(x, y, k), exactly(lambda k=k: kernels.nearest_neighbours(x, y, k)))
    assert left() == [0, 0]


# What the bounds cannot tell apart: equal points, distances below their slack, points below the range of float32 beside
# one far point; and what they can, by the offset and the scale.
UNDECIDED = {
    "equal": lambda x: x[:1].expand_as(x).contiguous(),
    "clusters": lambda x: (x * 1000).sign() * 1000 + x * 2.0**-12,
    "far point": lambda x: torch.cat([x[:-1], x[-1:] * 1e60]),
}
DECIDED = {
    "offset": lambda x: 1e8 + x,
    "large": lambda x: x * 2.0**390,
    "small": lambda x: x * 2.0**-390,
}


@pytest.mark.parametrize("case", {**UNDECIDED, **DECIDED})
def test_bounds_of_points_far_from_1(case: str, left: Left) -> None:
    place = {**UNDECIDED, **DECIDED}[case]
    x, y = (place((torch.randn(n, 3).double() * 2**8).round() / 2**8) for n in (7, 30))
    y[:3] = x[:3]
    assert_same(kernels.nearest_neighbours(x, y, 3), exactly(lambda: kernels.nearest_neighbours(x, y, 3)))
    distances = reference.squared_distances(x, y)
    rx, ry = distances[:, 20].contiguous(), distances[3].contiguous()
    value = kernels.ball_counts(x, y, rx, ry, True)
    assert_same(value, exactly(lambda: kernels.ball_counts(x, y, rx, ry, True)))
    neighbours, counts = left()
    assert bool(neighbours) == (case in UNDECIDED)
    # Point 3 of x lies on the border of all balls around y; that row is left in any case.
    assert (counts > 1) == (case in UNDECIDED)
    assert counts


@pytest.mark.parametrize("radius", [torch.inf, 0.0, -1.0, torch.nan, 1e-320, 1e308])
def test_bounds_and_radii_of_any_size(radius: float, left: Left) -> None:
    x, y = integers(4, 2, 1), integers(7, 2, 1)
    rx, ry = (torch.full((n,), radius, dtype=torch.float64) for n in (4, 7))
    for closed in (False, True):
        assert_same(kernels.ball_counts(x, y, rx, ry, closed), reference.ball_counts(x, y, rx, ry, closed))
    assert len(left()) == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_numbers_that_are_not_finite_are_left_to_the_exact_kernel(side: int, value: float, left: Left) -> None:
    points = torch.randn(6, 3), torch.randn(20, 3)
    points[side][4, 1] = value
    rx, ry = torch.rand(6).double() * 9, torch.rand(20).double() * 9
    assert_same(kernels.nearest_neighbours(*points, 2), exactly(lambda: kernels.nearest_neighbours(*points, 2)))
    assert_same(
        kernels.ball_counts(*points, rx, ry, False), exactly(lambda: kernels.ball_counts(*points, rx, ry, False))
    )
    assert all(left())
    with pytest.raises(ValueError, match=f"{'xy'[side]} must be finite"):
        ops.nearest_neighbours(*points, 2, backend="triton")


def test_many_neighbours_are_not_asked_of_bounds(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "NEIGHBOURS_BY_BOUNDS", 3)
    x, y = integers(3, 4, 9), integers(20, 4, 9)
    for k in (3, 4, 20):
        assert_same(kernels.nearest_neighbours(x, y, k), reference.nearest_neighbours(x, y, k))
    assert len(left()) == 1


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e30])
@pytest.mark.parametrize("d", [1, 300])
def test_the_bounds_hold_and_are_needed(d: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "product_tile", lambda *_, **__: config.ProductTile(16, 16, 1))
    x, y = torch.randn(20, d) * scale, torch.randn(30, d) * scale
    x[:5], y[:5] = x[:5].abs() * 1e3, y[:5].abs() * 1e3  # sums that only grow
    y[7] = x[7]
    shifted = launch._shift(x, y)
    ((first, rows, q),) = launch._blocks_of_bounds(shifted)
    assert (first, rows) == (0, 20)
    offset = y.double().mean(0)
    power = ((shifted.x.double() / (x - offset)).flatten()).median().log2().round().exp2()
    assert float(shifted.x.abs().max()) <= 1
    slack = (d + 32) * 2.0**-24 * (1 + (d + 32) * 2.0**-23)
    tiny = (d + 1) * 2.0**-119
    x_norms, y_norms = shifted.x_norms[:, None], shifted.y_norms
    distances = reference.squared_distances(x, y) * power * power
    low = q[:20, :30].double() + x_norms * (1 - slack) - tiny
    high = q[:20, :30].double() + x_norms * (1 + slack) + 2 * slack * y_norms + tiny
    assert (low <= distances).all()
    assert (distances <= high).all()
    # The middle between them is off by more than a thousandth of the slack.
    assert ((low + high) / 2 - distances).abs().max() > 1e-3 * (high - low).max() / 2


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
