"""The Triton kernels of gradient_penalty, in Triton's interpreter, against float64 and against PyTorch."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lipgan.kernels import common, config
from lipgan.kernels.gradient_penalty import launch as kernels
from tolerance import assert_as_accurate
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Rows: single elements, odd sizes, several rows a program and a partial last program, more than one wide load.
# Columns: a single row, odd sizes, whole columns, and in (2, 70, 66) a second step down and a second, partial tile.
ROWS = [(1, 1, 1), (9, 1, 1), (3, 5, 1), (700, 3, 1), (7, 16, 1), (5, 640, 1), (2, 4099, 1)]
COLUMNS = [(2, 1, 9), (1, 7, 2), (2, 3, 7), (3, 5, 64), (2, 70, 66)]

# Not a float32 number, so that a weight that gets rounded to float32 on its way shows in float64.
WEIGHT, TARGET = 10.0 / 3.0, 0.7

# Roundings of a norm. A thread adds at most 32 squares, each rounded, and at most 512 threads add up in 9 levels: 42
# roundings, of which the root leaves a half; it adds one of its own, the join of parts two.
ROUNDINGS = 24.0


def make(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Gradients with norms on both sides of TARGET."""
    grads = torch.randn(shape, dtype=torch.float64)
    norms = grads.norm(dim=1, keepdim=True)
    return (grads / norms * TARGET * (0.5 + torch.rand_like(norms))).to(dtype)


def norms_of(grads: Tensor) -> Tensor:
    """[B, S] in float64, by NumPy's long double, whose range holds the squares of float64."""
    wide = grads.double().numpy().astype(np.longdouble)
    return torch.tensor(np.float64(np.sqrt((wide * wide).sum(axis=1))))


def formula(grads: Tensor, n: Tensor, kind: str, weight: float, target: float) -> tuple[Tensor, Tensor]:
    """(penalty, cotangent) of norms n [B, S], in the dtype of n."""
    if kind == "squared":
        penalty, slope = weight * n.square().mean() / 2, weight * n / n.numel()
    elif kind == "max":
        ties = n == n.max()
        penalty, slope = weight * (n.max() - target) ** 2, 2 * weight * (n.max() - target) * ties / ties.sum()
    else:
        distance = (n - target).clamp_min(0) if kind == "one-sided" else n - target
        penalty, slope = weight * distance.square().mean(), 2 * weight * distance / n.numel()
    direction = grads.to(n.dtype) / torch.where(n == 0, 1, n).unsqueeze(1)
    return penalty, direction * slope.unsqueeze(1)


def check(grads: Tensor, kind: str, weight: float = WEIGHT, target: float = TARGET) -> None:
    penalty, norms, cotangent = kernels.gradient_penalty_fwd(grads, kind, weight, target)
    wide = kernels.accumulation_dtype(grads.dtype)
    assert penalty.shape == ()
    assert penalty.dtype == norms.dtype == wide
    assert cotangent.dtype == grads.dtype
    n = norms_of(grads)
    exact_penalty, exact_cotangent = formula(grads, n, kind, weight, target)
    peer_n = torch.linalg.vector_norm(grads.to(wide), dim=1)
    peer_penalty, peer_cotangent = formula(grads, peer_n, kind, weight, target)
    assert_as_accurate(norms, peer_n, n, roundings=ROUNDINGS)
    # ROUNDINGS of the norm move (n - t)^2 by 2 |n - t| n of them; a product and a sum like that of the norm add as
    # many as 2 (n - t)^2 does.
    distance = n if kind == "squared" else (n - target).abs()
    terms = 2 * distance * (n + distance)
    size = weight * float(terms.max() if kind == "max" else terms.mean())
    assert_as_accurate(penalty, peer_penalty, exact_penalty, roundings=ROUNDINGS, scale=size)
    # The slope moves with the norm; the result is rounded to the dtype of the gradients.
    slope = 2 * weight * float((n + distance).max()) / (1 if kind == "max" else n.numel())
    size = float(exact_cotangent.abs().max()) + slope * torch.finfo(wide).eps / torch.finfo(grads.dtype).eps
    assert_as_accurate(cotangent, peer_cotangent.to(grads.dtype), exact_cotangent, roundings=ROUNDINGS, scale=size)


@pytest.fixture(autouse=True)
def _plans_of_this_test() -> Iterator[None]:
    """Plans are kept by sizes; tests change what they are made from."""
    kernels._plan.cache_clear()
    yield
    kernels._plan.cache_clear()


@pytest.fixture
def _small_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 8 elements go in parts of 8, and the last program takes 8 summands a step."""
    monkeypatch.setattr(config, "longest_row", lambda itemsize: 8)
    monkeypatch.setattr(config, "flat_block", lambda itemsize: 8)
    monkeypatch.setattr(config, "SUMMANDS_PER_STEP", 8)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("kind", kernels.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_as_accurate_as_torch(dtype: torch.dtype, kind: str) -> None:
    for shape in ROWS + COLUMNS:
        grads = make(shape, dtype)
        before = grads.clone()
        check(grads, kind)
        assert torch.equal(grads, before), "the gradients changed"


@pytest.mark.usefixtures("poisoned_outputs", "_small_launches")
@pytest.mark.parametrize("kind", kernels.KINDS)
def test_long_rows_in_parts(kind: str) -> None:
    # One part; 9 parts, more than a step takes; rows in several steps. The columns have many tiles to scale.
    for shape in [(3, 8, 1), (1, 70, 1), (9, 17, 1), (2, 5, 7)]:
        check(make(shape, torch.float32), kind)
    check(make((3, 17, 1), torch.float16), kind)


@pytest.mark.usefixtures("poisoned_outputs")
def test_a_row_one_longer_than_registers_hold() -> None:
    for dtype in (torch.float32, torch.float64):
        longest = config.longest_row(dtype.itemsize)
        for width in (longest, longest + 1):
            for kind in ("two-sided", "max"):
                check(make((2, width, 1), dtype), kind)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("kind", kernels.KINDS)
def test_more_programs_than_a_step_sums_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SUMMANDS_PER_STEP", 4)
    for shape in [(13, 2048, 1), (5, 3, 70)]:
        check(make(shape, torch.float32), kind)


@pytest.mark.parametrize("delta", [-1, 0, 1])
def test_sizes_around_the_tiles(delta: int) -> None:
    for shape in [
        (4, 32 + delta, 1),
        (64 + delta, 32, 1),
        (2, 64 + delta, 64),
        (1, 4, 1024 + delta),
        (2, 3, 16 + delta),
    ]:
        check(make(shape, torch.float32), "two-sided")


def autograd(grads: Tensor, kind: str, weight: float, target: float) -> Tensor:
    grads = grads.clone().requires_grad_()
    n = torch.linalg.vector_norm(grads, dim=1)
    penalty = {
        "two-sided": lambda: (n - target).square().mean(),
        "one-sided": lambda: (n - target).clamp_min(0).square().mean(),
        "squared": lambda: n.square().mean() / 2,
        "max": lambda: (n.amax() - target) ** 2,
    }[kind]()
    return torch.autograd.grad(weight * penalty, grads)[0]


@settings(max_examples=30, deadline=None)
@given(b=st.integers(1, 6), c=st.integers(0, 20), s=st.integers(1, 20), kind=st.sampled_from(kernels.KINDS))
def test_the_cotangent_is_the_gradient_of_torch(b: int, c: int, s: int, kind: str) -> None:
    grads = torch.randn(b, c, s, dtype=torch.float64, generator=torch.Generator().manual_seed(b * 400 + c * 20 + s))
    _, norms, cotangent = kernels.gradient_penalty_fwd(grads, kind, WEIGHT, 1.5)
    torch.testing.assert_close(norms, torch.linalg.vector_norm(grads, dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(cotangent, autograd(grads, kind, WEIGHT, 1.5), rtol=1e-12, atol=1e-14)


SCALES = [
    *((torch.float32, scale) for scale in (1e-37, 1e-30, 1e30, 1e36)),
    *((torch.bfloat16, scale) for scale in (1e-30, 1e30)),
    *((torch.float64, scale) for scale in (1e-300, 1e300)),
]


@pytest.mark.parametrize("shape", [(5, 37, 1), (3, 70, 66)])
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_magnitudes_whose_squares_leave_the_range(
    dtype: torch.dtype, scale: float, shape: tuple[int, int, int]
) -> None:
    unit = make(shape, dtype)
    check_magnitude(unit, (unit.double() * scale).to(dtype))


@pytest.mark.usefixtures("_small_launches")
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_magnitudes_of_long_rows(dtype: torch.dtype, scale: float) -> None:
    unit = make((3, 20, 1), dtype)
    check_magnitude(unit, (unit.double() * scale).to(dtype))


def check_magnitude(unit: Tensor, grads: Tensor) -> None:
    wide = kernels.accumulation_dtype(grads.dtype)
    n = norms_of(grads)
    # PyTorch's own float32 is no peer, because it squares; the rounded truth stands in.
    for kind in ("two-sided", "max"):
        # With the target at half or twice the norms the slope has their size.
        target = float(n.mean()) * 0.5
        _, norms, cotangent = kernels.gradient_penalty_fwd(grads, kind, WEIGHT, target)
        assert_as_accurate(norms, n.to(wide), n, roundings=ROUNDINGS)
        _, exact = formula(grads, n, kind, WEIGHT, target)
        size = 4 * float(exact.abs().max())
        assert_as_accurate(cotangent, exact.to(grads.dtype), exact, roundings=ROUNDINGS, scale=size)
    # With the target at 1, the slope of norms close to 0 stays -2 weight / N.
    _, _, cotangent = kernels.gradient_penalty_fwd(grads, "two-sided", WEIGHT, 1.0)
    _, exact = formula(grads, n, "two-sided", WEIGHT, 1.0)
    assert_as_accurate(cotangent, exact.to(grads.dtype), exact, roundings=ROUNDINGS, scale=4 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (torch.float32, [(1e30, 1e-30, 3.0), (3e-39, 1e-40, 0.0), (3.4e38, 1e-45, 1.0), (1e-45, 0.0, 0.0)]),
        (torch.float64, [(1e300, 1e-300, 3.0), (3e-309, 1e-310, 0.0), (1.7e308, 5e-324, 1.0), (5e-324, 0.0, 0.0)]),
    ],
)
def test_magnitudes_far_apart(dtype: torch.dtype, rows: list[tuple[float, ...]]) -> None:
    smallest = 2.0 ** (-149 if dtype == torch.float32 else -1074)
    for values in rows:
        row = torch.tensor(values, dtype=dtype)
        pair = row, torch.ones_like(row)
        for grads in (row.view(1, 3, 1), torch.stack(pair).view(2, 3, 1), torch.stack(pair, dim=1).view(1, 3, 2)):
            n = norms_of(grads)
            norms = kernels.gradient_penalty_fwd(grads, "two-sided", 1.0, 1.0)[1]
            assert bool(((norms.double() - n).abs() <= n * (4 * torch.finfo(dtype).eps) + smallest).all())


@pytest.mark.usefixtures("_small_launches")
def test_magnitudes_far_apart_in_parts() -> None:
    row = torch.cat([torch.full((5,), 1e30), torch.zeros(6), torch.full((9,), 1e-30)])
    for grads in (row, row.flip(0)):
        _, norms, cotangent = kernels.gradient_penalty_fwd(grads.view(1, 20, 1), "two-sided", 1.0, 0.0)
        torch.testing.assert_close(norms.double(), norms_of(grads.view(1, 20, 1)), rtol=1e-6, atol=0)
        # What is below 2^-126 of its norm may be lost.
        torch.testing.assert_close(cotangent.view(-1), 2 * grads, rtol=1e-6, atol=2e30 * 2.0**-126)


@pytest.mark.parametrize("shape", [(4, 6, 1), (4, 20, 1), (2, 6, 5)])
@pytest.mark.parametrize("kind", kernels.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poisoned_outputs", "_small_launches")
def test_the_gradient_of_a_norm_at_zero_is_zero(dtype: torch.dtype, kind: str, shape: tuple[int, int, int]) -> None:
    grads = make(shape, dtype)
    grads[1] = 0
    check(grads, kind)
    grads.zero_()
    penalty, norms, cotangent = kernels.gradient_penalty_fwd(grads, kind, WEIGHT, TARGET)
    expected = {"one-sided": 0.0, "squared": 0.0}.get(kind, WEIGHT * TARGET**2)
    assert float(penalty) == pytest.approx(expected, rel=1e-6)
    assert not norms.any()
    assert not cotangent.any()


@pytest.mark.parametrize("kind", kernels.KINDS)
def test_gradients_without_elements(kind: str) -> None:
    for shape in [(3, 0, 1), (3, 0, 4)]:
        penalty, norms, cotangent = kernels.gradient_penalty_fwd(torch.empty(shape), kind, WEIGHT, TARGET)
        assert not norms.any()
        assert cotangent.shape == shape
        assert bool(penalty.isfinite())


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("shape", [(9, 12, 1), (3, 5, 7)])
def test_ties_share_the_gradient(shape: tuple[int, int, int], small: bool, request: pytest.FixtureRequest) -> None:
    if small:
        request.getfixturevalue("_small_launches")
    grads = make(shape, torch.float64)
    # The same largest column in three places, once with its elements negated: equal norms to the bit.
    grads[0, :, 0] *= 10
    grads[2, :, -1] = -grads[0, :, 0]
    grads[1, :, 0] = grads[0, :, 0]
    _, norms, cotangent = kernels.gradient_penalty_fwd(grads, "max", WEIGHT, TARGET)
    assert int((norms == norms.max()).sum()) == 3
    torch.testing.assert_close(cotangent, autograd(grads, "max", WEIGHT, TARGET), rtol=1e-13, atol=0)
    assert int(cotangent.any(dim=1).sum()) == 3


@pytest.mark.usefixtures("_small_launches")
def test_ties_in_different_steps() -> None:
    # Rows in two parts go 4 a step, so these four meet in two lanes of the program that compares them.
    grads = make((33, 12, 1), torch.float64)
    for row in (0, 5, 16, 32):
        grads[row] = 10.0
    cotangent = kernels.gradient_penalty_fwd(grads, "max", WEIGHT, TARGET)[2]
    torch.testing.assert_close(cotangent, autograd(grads, "max", WEIGHT, TARGET), rtol=1e-13, atol=0)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("shape", [(5, 12, 1), (2, 5, 3)])
@pytest.mark.parametrize("kind", kernels.KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.usefixtures("poisoned_outputs")
def test_what_is_not_finite_reaches_the_penalty(
    bad: float, kind: str, shape: tuple[int, int, int], small: bool, request: pytest.FixtureRequest
) -> None:
    if small:
        request.getfixturevalue("_small_launches")
    for sample in (0, shape[0] - 1):
        grads = make(shape, torch.float32)
        grads[sample, 2, 0] = bad
        penalty, norms, cotangent = kernels.gradient_penalty_fwd(grads, kind, WEIGHT, TARGET)
        assert not bool(penalty.isfinite())
        assert bool(penalty.isnan()) == math.isnan(bad)
        fine = torch.ones_like(norms, dtype=torch.bool)
        fine[sample, 0] = False
        assert torch.equal(norms.isfinite(), fine), "the norm of another column is not finite"
        assert torch.equal(cotangent.isfinite().all(dim=1), fine), "the cotangent of another column is not finite"


@pytest.mark.parametrize("kind", kernels.KINDS)
def test_equal_inputs_give_equal_bits(kind: str) -> None:
    common.forget_tickets()
    for shape in [(9, 300, 1), (3, 70, 66)]:
        grads = make(shape, torch.float32)
        first, second = (kernels.gradient_penalty_fwd(grads, kind, WEIGHT, TARGET) for _ in range(2))
        assert all(map(torch.equal, first, second))
    # One ticket for all of them, which each has put back.
    (ticket,) = common._tickets.values()
    assert ticket.tolist() == [0]


@pytest.mark.usefixtures("_small_launches")
@pytest.mark.parametrize("kind", kernels.KINDS)
def test_launches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch; two where the norms of all samples or of all parts of one have to be known before the cotangent."""
    launches: list[str] = []
    run = InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda f, *a, **k: launches.append(f.fn.__name__) or run(f, *a, **k)
    )
    for shape, first in (((700, 3, 1), "rows"), ((3, 5, 64), "columns"), ((3, 17, 1), "parts")):
        launches.clear()
        kernels.gradient_penalty_fwd(make(shape, torch.float32), kind, WEIGHT, TARGET)
        then = ["_gradient_penalty_scale_kernel"] if kind == "max" or first == "parts" else []
        assert launches == [f"_gradient_penalty_{first}_kernel", *then]


def test_a_launch_in_a_graph_has_a_ticket_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3)
    of_stream = common.ticket_of(x)
    assert common.ticket_of(x) is of_stream
    monkeypatch.setattr(common, "stream_of", lambda like: 7)
    assert common.ticket_of(x) is not of_stream, "a launch on another stream runs beside this one"
    monkeypatch.setattr(common, "is_capturing", lambda like: True)
    monkeypatch.setattr(common, "_for_graphs", {x.device: list(torch.zeros(2, 32, dtype=torch.int32)[:, :1].unbind())})
    # Two that were made before; then the graph writes its own.
    tickets = [common.ticket_of(x) for _ in range(3)]
    assert len({ticket.data_ptr() for ticket in (*tickets, of_stream)}) == 4
    assert all(ticket.tolist() == [0] for ticket in tickets)
    assert not common._for_graphs[x.device]


def test_the_penalty_of_one_program_is_that_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = make((40, 6, 1), torch.float64)
    alone = kernels.gradient_penalty_fwd(grads, "two-sided", WEIGHT, TARGET)
    monkeypatch.setattr(config, "row_tile", lambda h, w, itemsize: config.Tile(4, 8, 4))
    kernels._plan.cache_clear()
    several = kernels.gradient_penalty_fwd(grads, "two-sided", WEIGHT, TARGET)
    torch.testing.assert_close(alone[0], several[0], rtol=1e-14, atol=0)
    assert torch.equal(alone[2], several[2])


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolation_is_rounded_once(dtype: torch.dtype) -> None:
    wide = kernels.accumulation_dtype(dtype)
    for shape in [(1, 1), (7, 1), (5, 3), (300, 2), (3, 64), (2, 9001)]:
        real, fake = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
        mix = torch.rand(shape[0], dtype=wide)
        x_hat = kernels.gradient_penalty_interpolate(real, fake, mix)
        assert x_hat.dtype == dtype
        a, b, m = (x.double().numpy().astype(np.longdouble) for x in (real, fake, mix[:, None]))
        truth = torch.tensor(np.float64(m * a + (1 - m) * b))
        peer = (mix[:, None] * real.to(wide) + (1 - mix[:, None]) * fake.to(wide)).to(dtype)
        # Two products, 1 - m and the sum; the terms are no larger than the larger sample.
        size = float(torch.maximum(real.abs(), fake.abs()).max())
        assert_as_accurate(x_hat, peer, truth, roundings=3.0, c=1.0, scale=size)
        if dtype == torch.float16:
            # Half a unit in the last place, and what float32 adds to it. (The interpreter truncates to bfloat16.)
            assert bool(((x_hat.double() - truth).abs() <= truth.abs() * torch.finfo(dtype).eps * 0.51 + 1e-7).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_the_line_are_exact(dtype: torch.dtype) -> None:
    real, fake = torch.randn(3, 9).to(dtype), torch.randn(3, 9).to(dtype)
    real[0, 1], real[0, 2], fake[1, 3] = -0.0, math.inf, -0.0
    fake[0, 4], real[1, 4], fake[0, 5] = math.inf, math.nan, 0.0
    mix = torch.tensor([1.0, 0.0, 0.5], dtype=kernels.accumulation_dtype(dtype))
    x_hat = kernels.gradient_penalty_interpolate(real, fake, mix)
    bits = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(x_hat[0].view(bits), real[0].view(bits))
    assert torch.equal(x_hat[1].view(bits), fake[1].view(bits))


def test_arguments_that_do_not_fit() -> None:
    x, mix = torch.randn(4, 6), torch.rand(4)
    for arguments in [(x, x[:3], mix), (x, x, mix[:3]), (x.view(-1), x.view(-1), mix)]:
        with pytest.raises(ValueError, match="expected real and fake"):
            kernels.gradient_penalty_interpolate(*arguments)
    for arguments in [
        (x, x.double(), mix),
        (x, x, mix.double()),
        (x.T, x.T, torch.rand(6)),
        (x.half(), x.half(), mix.half()),
    ]:
        with pytest.raises(ValueError, match="expected contiguous"):
            kernels.gradient_penalty_interpolate(*arguments)
    with pytest.raises(ValueError, match="kind must be one of two-sided, one-sided, squared, max, got 'both'"):
        kernels.gradient_penalty_fwd(x.view(4, 6, 1), "both", 1.0, 1.0)
    for grads in (x, x.view(4, 3, 2).mT, x.new_empty(0, 3, 1), x.new_empty(3, 3, 0)):
        with pytest.raises(ValueError, match="expected contiguous gradients"):
            kernels.gradient_penalty_fwd(grads, "two-sided", 1.0, 1.0)
    with pytest.raises(ValueError, match="too long"):
        kernels._programs(4, 1 << 30, config.Tile(4, 512, 4))


def test_samples_without_elements() -> None:
    x = torch.empty(3, 0)
    assert kernels.gradient_penalty_interpolate(x, x, torch.rand(3)).shape == (3, 0)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_launch_shapes(itemsize: int) -> None:
    longest = config.longest_row(itemsize)

    # Registers of 4 bytes that the values of a tile take per thread; the kernels need some 30 besides, of 128 at most
    # for 512 threads.
    def registers(tile: config.Tile) -> float:
        assert tile.num_warps <= 16
        return tile.block_h * tile.block_w * max(itemsize, 4) / 4 / (32 * tile.num_warps)

    for h in (1, 3, 64, 1000):
        for w in (1, 2, 27, 640, 3072, 12288, longest):
            if w <= longest:
                tile = config.row_tile(h, w, itemsize)
                assert w <= tile.block_w < 2 * w
                assert registers(tile) <= 32
        for w in (1, 16, 49, 1024, 65536):
            tile = config.norm_column_tile(h, w, itemsize)
            assert registers(tile) <= 32
            # Rows of a tile are at least two cache lines of float32, or the whole width.
            assert tile.block_w >= min(64, config.next_power_of_2(w))
            tile = config.flat_tile(h, w, itemsize)
            assert tile.block_h * tile.block_w * itemsize <= 16384
    for parts in (1, 2, 12, 1000, 5000):
        block_h, block_w = config.partials_tile(parts)
        assert block_h * block_w == config.SUMMANDS_PER_STEP
        assert block_w == config.SUMMANDS_PER_STEP or parts <= block_w < 2 * parts
