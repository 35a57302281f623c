"""Nearest neighbours and counts in balls: equality with the definition, not closeness to it."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipgan.ops.nearest_neighbours import ball_counts, nearest_neighbours
from lipgan.reference import nearest_neighbours as reference

BACKENDS = ["reference", "native", "triton"]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _integers(n: int, d: int, largest: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Their distances are exact in every order of summation, and many are equal."""
    return torch.randint(-largest, largest + 1, (n, d)).to(dtype)


def _by_matrix(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    distances = reference.squared_distances(x, x if y is None else y)
    if y is None:
        distances.fill_diagonal_(torch.inf)
    squared, order = distances.sort(dim=1, stable=True)
    return squared[:, :k], order[:, :k]


def _counts_by_matrix(x: Tensor, y: Tensor, rx: Tensor, ry: Tensor, closed: bool) -> tuple[Tensor, Tensor]:
    distances = reference.squared_distances(x, y)
    of_x, of_y = (distances <= rx[:, None], distances <= ry) if closed else (distances < rx[:, None], distances < ry)
    return torch.stack([of_x.sum(1), of_y.sum(1)]), torch.stack([of_y.sum(0), of_x.sum(0)])


def _assert_same(value: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(value, truth, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# ---- the reference is the definition ----


def test_squared_distances_are_those_of_cdist() -> None:
    x, y = torch.randn(7, 5).double(), torch.randn(4, 5).double()
    expected = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(reference.squared_distances(x, y), expected)


@pytest.mark.parametrize("entries", [1, 100, 1 << 22])
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(reference, "_BLOCK_ENTRIES", entries)
    x, y = _integers(13, 3), _integers(11, 3)
    _assert_same(reference.nearest_neighbours(x, None, 4), _by_matrix(x, None, 4))
    _assert_same(reference.nearest_neighbours(x, y, 11), _by_matrix(x, y, 11))
    rx, ry = torch.arange(13.0).double(), torch.arange(11.0).double()
    _assert_same(reference.ball_counts(x, y, rx, ry, True), _counts_by_matrix(x, y, rx, ry, True))


# ---- native: the same numbers ----

SIZES = [
    (1, 1, 1),
    (2, 3, 1),
    (5, 7, 15),
    (49, 63, 16),
    (48, 64, 17),
    (97, 65, 31),
    (31, 129, 33),
    (60, 200, 127),
    (50, 70, 300),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "d"), SIZES)
@pytest.mark.usefixtures("poisoned_outputs")
def test_native_finds_the_same(isa: str, m: int, n: int, d: int, dtype: torch.dtype) -> None:
    x, y = _integers(m, d, dtype=dtype), _integers(n, d, dtype=dtype)
    y[: n // 3] = x[torch.randint(m, (n // 3,))]  # copies, at distance 0
    for k in {1, min(n, 5), n}:
        _assert_same(nearest_neighbours(x, y, k, backend="native"), _by_matrix(x, y, k))
    if m > 1:
        k = min(m - 1, 5)
        _assert_same(nearest_neighbours(x, k=k, backend="native"), _by_matrix(x, None, k))
    rx = _by_matrix(x, y, min(n, 3))[0][:, -1].contiguous()
    ry = _by_matrix(y, x, min(m, 3))[0][:, -1].contiguous()
    for closed in (False, True):
        expected = _counts_by_matrix(x, y, rx, ry, closed)
        _assert_same(ball_counts(x, y, rx, ry, closed=closed, backend="native"), expected)


# What the bound in single precision makes of them: a large common offset, sets far apart, one far point that takes the
# scale, numbers beyond the range of float and below it, equal points, and neighbours that differ by less than it sees.
CASES = {
    "offset": lambda x: 1e8 + x,
    "far point": lambda x: torch.cat([x[:-1], x[-1:] * 1e12]),
    "large": lambda x: x * 2.0**390,
    "small": lambda x: x * 2.0**-390,
    "equal": lambda x: x[:1].expand_as(x).contiguous(),
    "zero": torch.zeros_like,
    "close": lambda x: 1 + (x * 2**20).round() * 2.0**-50,
    "clusters": lambda x: (x * 1000).sign() * 1000 + x * 2.0**-12,
}


@pytest.mark.backend("native")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threaded", [False, True])
def test_native_decides_as_the_definition(case: str, threaded: bool, request: pytest.FixtureRequest) -> None:
    if threaded:
        request.getfixturevalue("threads")
    x = CASES[case]((torch.randn(260, 37).double() * 2**8).round() / 2**8)
    y = CASES[case]((torch.randn(170, 37).double() * 2**8).round() / 2**8)
    y[:40] = x[:40]
    squared, indices = nearest_neighbours(x, k=2, backend="native")
    truth, _ = _by_matrix(x, None, 2)
    # 37 squares are added in another order; which points are nearest is not asked for where they are equal up to that.
    torch.testing.assert_close(squared, truth, rtol=37 * 2.0**-53, atol=0)
    chosen = reference.squared_distances(x, x).gather(1, indices)
    torch.testing.assert_close(chosen, truth, rtol=37 * 2.0**-53, atol=0)
    # Radii between two distances: no comparison hangs on an order of summation.
    of_x, of_y = reference.squared_distances(x, y).sort(1)[0], reference.squared_distances(y, x).sort(1)[0]
    rx, ry = of_x[:, 60] * (1 + 2.0**-40), of_y[:, 60] * (1 + 2.0**-40)
    for closed in (False, True):
        value = ball_counts(x, y, rx, ry, closed=closed, backend="native")
        _assert_same(value, _counts_by_matrix(x, y, rx, ry, closed))


@pytest.mark.backend("native")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("largest", "dtype"), [(1, torch.float32), (1000, torch.float64)], ids=["ties", "few ties"])
def test_pairs_that_are_met_once(largest: int, dtype: torch.dtype, threads: int) -> None:
    # As many points and features as the C++ kernel takes for that, whatever the instruction set; 3 do not divide them.
    x = _integers(778, 30, largest, dtype)
    x[500] = x[3]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for k in (1, 4):
            _assert_same(nearest_neighbours(x, None, k, backend="native"), _by_matrix(x, None, k))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_copy_of_a_neighbour_lies_on_the_border(backend: str, dtype: torch.dtype) -> None:
    # The Gram formula puts about half of them inside.
    x = torch.randn(60, 50).to(dtype) + 10
    squared, indices = nearest_neighbours(x, k=1, backend=backend)
    y = x[indices[:, 0]]
    radii = squared[:, 0].contiguous()
    _, order = nearest_neighbours(x, y, 2, backend=backend)
    assert torch.equal(nearest_neighbours(y, x, 1, backend=backend)[0], torch.zeros(60, 1, dtype=torch.float64))
    none = torch.full((60,), -1.0, dtype=torch.float64)
    opened, _ = ball_counts(x, y, radii, none, backend=backend)
    closed, _ = ball_counts(x, y, radii, none, closed=True, backend=backend)
    own = (y[None] == x[:, None]).all(-1).sum(1)  # where x itself is somebody's neighbour it is in its own ball
    assert torch.equal(opened[0], own)
    assert (closed[0] >= own + 1).all()
    assert order.shape == (60, 2)


def test_instruction_sets_and_threads_agree_on_real_numbers(isa: str, threads: None) -> None:
    x, y = torch.randn(300, 100), torch.randn(200, 100)
    squared, indices = nearest_neighbours(x, y, 4, backend="native")
    truth, order = _by_matrix(x, y, 4)
    torch.testing.assert_close(squared, truth, rtol=100 * 2.0**-53, atol=0)
    assert torch.equal(indices, order)
    torch.set_num_threads(1)
    _assert_same(nearest_neighbours(x, y, 4, backend="native"), (squared, indices))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_free(backend: str) -> None:
    x, y = _integers(9, 8)[:, ::2], _integers(4, 12).T[::2, :]
    _assert_same(nearest_neighbours(x, y, 3, backend=backend), _by_matrix(x, y, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_outputs")
def test_no_points(backend: str) -> None:
    empty, y = torch.empty(0, 3), torch.randn(4, 3)
    none, some = torch.empty(0).double(), torch.ones(4).double()
    assert nearest_neighbours(empty, y, 2, backend=backend)[0].shape == (0, 2)
    zeros, nothing = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)
    for _ in range(3):  # the memory of small outputs is what the last ones left there
        _assert_same(ball_counts(empty, y, none, some, backend=backend), (nothing, zeros))
        _assert_same(ball_counts(y, empty, some, none, backend=backend), (zeros, nothing))
        _assert_same(ball_counts(empty, empty, none, none, backend=backend), (nothing, nothing))


@pytest.mark.parametrize("backend", BACKENDS)
def test_radii_of_any_size(backend: str) -> None:
    x, y = _integers(5, 3), _integers(6, 3)
    for radius, expected in ((torch.inf, 6), (-1.0, 0), (torch.nan, 0)):
        counts, _ = ball_counts(x, y, torch.full((5,), radius).double(), torch.zeros(6).double(), backend=backend)
        assert counts[0].tolist() == [expected] * 5


@pytest.mark.backend("native")
@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 80), n=st.integers(1, 80), d=st.integers(1, 40), seed=st.integers(0, 2**31), data=st.data())
def test_any_sizes(m: int, n: int, d: int, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    x, y = _integers(m, d, 2, torch.float32), _integers(n, d, 2, torch.float32)
    k = data.draw(st.integers(1, n))
    _assert_same(nearest_neighbours(x, y, k, backend="native"), _by_matrix(x, y, k))
    rx, ry = torch.randint(0, 2 * d, (m,)).double(), torch.randint(0, 2 * d, (n,)).double()
    closed = data.draw(st.booleans())
    _assert_same(ball_counts(x, y, rx, ry, closed=closed, backend="native"), _counts_by_matrix(x, y, rx, ry, closed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_register_well(backend: str) -> None:
    x, y, r = _integers(4, 3), _integers(5, 3), torch.ones(4, dtype=torch.float64)
    ops = torch.ops.lipgan
    torch.library.opcheck(ops.nearest_neighbours.default, (x, y, 2, backend))
    torch.library.opcheck(ops.nearest_neighbours.default, (x, None, 2, backend))
    torch.library.opcheck(ops.ball_counts.default, (x, y, r, torch.ones(5, dtype=torch.float64), False, backend))


def test_points_that_need_gradients_are_taken_as_they_are() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    assert not nearest_neighbours(x, k=1)[0].requires_grad


def test_bad_arguments_are_named() -> None:
    x = torch.randn(4, 3)
    r = torch.ones(4).double()
    for error, message, call in [
        (TypeError, "x must be a tensor, got list", lambda: nearest_neighbours([[1.0]])),
        (TypeError, "x must be float32.*int64", lambda: nearest_neighbours(x.long())),
        (TypeError, "y must have the dtype of x", lambda: nearest_neighbours(x, x.double())),
        (ValueError, r"x must have shape \(n, d\), got \(3,\)", lambda: nearest_neighbours(x[0])),
        (ValueError, r"x must have shape \(n, d\), got \(4, 0\)", lambda: nearest_neighbours(x[:, :0])),
        (ValueError, "x must be finite", lambda: nearest_neighbours(x / 0)),
        (ValueError, "x must be at most 1e.120 in size", lambda: nearest_neighbours(x.double() * 1e200)),
        (ValueError, "y must have 3 features like x, got 2", lambda: nearest_neighbours(x, x[:, :2])),
        (ValueError, "k must be from 1 to .* 3, got 4", lambda: nearest_neighbours(x, k=4)),
        (ValueError, "k must be from 1 to .* 4, got 0", lambda: nearest_neighbours(x, x, 0)),
        (ValueError, "k must be from 1 to .* 0, got 1", lambda: nearest_neighbours(x[:0])),
        (TypeError, "k must be an int, got 1.5", lambda: nearest_neighbours(x, x, 1.5)),
        (ValueError, "backend must be one of", lambda: nearest_neighbours(x, backend="fast")),
        (TypeError, "x_squared_radii must be a float64 tensor", lambda: ball_counts(x, x, r.float(), r)),
        (ValueError, r"y_squared_radii must have shape \(4,\)", lambda: ball_counts(x, x, r, r[:3])),
    ]:
        with pytest.raises(error, match=message):
            call()
