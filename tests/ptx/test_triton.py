"""What Triton emits for every kernel, run on the emulator: results as accurate as PyTorch's, and no finding.

Shapes of each op: one block; ragged edges; several blocks. With LIPGAN_PTX_FULL=1 there are more of them.
"""

import itertools
import re
from collections.abc import Iterator

import grouped
import pytest
import torch
from lipgan.kernels import config, gradient_penalty, matrix_sqrt, nearest_neighbours
from ptx import compile
from ptx.compile import Session
from ptx.execute import Program
from ptx.selection import DTYPES_ON_TARGETS, FULL, TARGETS, WIDE_ON_TARGETS, selected
from tolerance import assert_as_accurate
from torch import Tensor

from lipgan.reference import gradient_penalty as gradient_penalty_reference
from lipgan.reference import nearest_neighbours as neighbours_reference
from lipgan.reference import spectral_norm as spectral_norm_reference

EPS = 1e-12


@pytest.fixture(autouse=True)
def reduced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of all launches here: only the triangle's tiles are found by an approximate root, only matrix_sqrt takes TF32."""
    launched: dict[str, str] = {}
    program_of = compile.program_of

    def noted(ptx: str, name: str) -> Program:
        launched[ptx] = name
        return program_of(ptx, name)

    monkeypatch.setattr(compile, "program_of", noted)
    yield
    for ptx, name in launched.items():
        approximate = set(re.findall(r"\b[a-z][a-z0-9]*\.(?:approx|full)[.\w]*", ptx))
        assert approximate <= ({"sqrt.approx.ftz.f32"} if name == "_matrix_sqrt_gram_kernel" else set()), name
        assert ".tf32" not in ptx or name in ("_matrix_sqrt_gram_kernel", "_matrix_sqrt_product_kernel"), name


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# A tile of 4 x 1024 and the column sums of 16 x 128: in one block, up to its edge and beyond, several of them; the
# square tile of small layers, in a group; a width that takes the 16-byte loads next to one that does not.
SPECTRAL_SHAPES = [[(9, 1040), (7, 1025)], [(3, 700)], [(4, 1030)], [(64, 27), (1, 48)], [(1, 1)], [(1, 13), (13, 1)],
                   [(23, 16), (6, 2048), (5, 7)], [(130, 250)], [(3, 20000)]]  # fmt: skip
SPECTRAL = selected(
    [
        (SPECTRAL_SHAPES[0], torch.float32, "sm_90"),
        (SPECTRAL_SHAPES[0], torch.bfloat16, "sm_80"),
        (SPECTRAL_SHAPES[3], torch.float32, "sm_90"),
    ],
    ((shapes, *pair) for shapes, pair in itertools.product(SPECTRAL_SHAPES, DTYPES_ON_TARGETS)),
)


def spectral_inputs(shapes: list[tuple[int, int]], dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    weights = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    us = [torch.nn.functional.normalize(torch.randn(h, dtype=torch.float64), dim=0).to(dtype) for h, _ in shapes]
    vs = [torch.nn.functional.normalize(torch.randn(w, dtype=torch.float64), dim=0).to(dtype) for _, w in shapes]
    return weights, us, vs


@pytest.mark.parametrize(("shapes", "dtype", "target"), SPECTRAL, ids=str)
def test_spectral_norm(shapes: list[tuple[int, int]], dtype: torch.dtype, target: str) -> None:
    inputs = spectral_inputs(shapes, dtype)
    session = Session(target)
    weights, us, vs = ([session.copy(x) for x in xs] for xs in inputs)
    dims = [0] * len(shapes)
    accumulate = wide(dtype)
    for n in (0, 2):
        with session.running():
            ys, sigma, new_us, new_vs = grouped.spectral_norm_fwd(weights, us, vs, n, EPS)
        for result in (*ys, sigma, *new_us, *new_vs):
            session.assert_written(result)
        truth = spectral_norm_reference.spectral_norm_fwd(*([x.double() for x in xs] for xs in inputs), n, EPS, dims)
        peer = spectral_norm_reference.spectral_norm_fwd(
            *([x.to(accumulate) for x in xs] for xs in inputs), n, EPS, dims
        )
        for i, weight in enumerate(inputs[0]):
            # The terms that sigma is a sum of: without iterations they cancel. A sum over w elements takes few
            # roundings, being a tree of chains; y inherits the error of sigma, in A.
            u, v = truth[2][i].abs(), truth[3][i].abs()
            terms = float(u @ weight.double().abs() @ v)
            relative = terms / float(truth[1][i].abs())
            narrow = torch.finfo(accumulate).eps / torch.finfo(dtype).eps
            values = (sigma[i], ys[i], new_us[i], new_vs[i])
            truths = (truth[1][i], truth[0][i], truth[2][i], truth[3][i])
            peers = (peer[1][i], peer[0][i], peer[2][i], peer[3][i])
            norm = 1.0 + narrow * relative * 4
            sizes = (terms, float(truth[0][i].abs().max()) * (1.0 + narrow * relative), norm, norm)
            for value, exact, other, size in zip(values, truths, peers, sizes, strict=True):
                assert_as_accurate(value, other.to(value.dtype), exact, roundings=4.0, scale=size)
    grad_ys = [session.copy(torch.randn_like(y)) for y in ys]
    for grad_sigma in (torch.randn_like(sigma), None) if dtype == torch.float32 else (torch.randn_like(sigma),):
        with session.running():
            grads = grouped.spectral_norm_bwd(grad_ys, grad_sigma, ys, sigma, new_us, new_vs)
        for i, grad in enumerate(grads):
            session.assert_written(grad)
            exact, size = _spectral_backward(i, grad_ys, grad_sigma, ys, sigma, new_us, new_vs, torch.float64)
            other, _ = _spectral_backward(i, grad_ys, grad_sigma, ys, sigma, new_us, new_vs, accumulate)
            scale = float(exact.abs().max()) + size * torch.finfo(accumulate).eps / torch.finfo(dtype).eps
            assert_as_accurate(grad, other.to(dtype), exact, roundings=4.0, scale=scale)


def _spectral_backward(i, grad_ys, grad_sigma, ys, sigma, us, vs, dtype: torch.dtype) -> tuple[Tensor, float]:
    """dW = (dY - (<dY, Y> - sigma dsigma) u v^T) / sigma, and the size of the terms of the difference."""
    dy, y, s, u, v = (x.to(dtype) for x in (grad_ys[i], ys[i], sigma[i], us[i], vs[i]))
    along = (dy * y).sum() - (0.0 if grad_sigma is None else s * grad_sigma[i].to(dtype))
    size = dy.abs().max() + (dy * y).abs().sum() * u.abs().max() * v.abs().max()
    return (dy - along * torch.outer(u, v)) / s, float((size / s).abs())


@pytest.mark.parametrize(
    ("dtype", "target"), selected([(torch.float32, "sm_90"), (torch.float64, "sm_80")], DTYPES_ON_TARGETS), ids=str
)
def test_spectral_norm_of_second_order(dtype: torch.dtype, target: str) -> None:
    # Two tiles in either direction, one of them with 16-byte accesses and one without; small matrices beside them.
    shapes = [(9, 1040), (5, 1030), (7, 13)]
    inputs = grouped.double_inputs(shapes, [0] * len(shapes), dtype)
    session = Session(target)
    given = [session.copy(x) if isinstance(x, Tensor) else [session.copy(y) for y in x] for x in inputs]
    with session.running():
        results = grouped.spectral_norm_double_bwd(*given)
    for result in (*results[0], *results[1], *results[2:]):
        session.assert_written(result)
    grouped.assert_double_accurate(results, inputs, [0] * len(shapes))


# Rows of one tile of 32 x 64: a part of it, ragged, several; rows in a tile of their own. Columns: one tile; a ragged
# one, walked down; several tiles and samples. Rows too long for registers, in parts.
PENALTY_SHAPES = [(17, 64, 1), (31, 61, 1), (70, 50, 1), (2, 4099, 1), (1, 7, 64), (2, 70, 66), (3, 3, 100)]
WEIGHT, AIM = 10.0 / 3.0, 0.7


def long_row(dtype: torch.dtype) -> tuple[int, int, int]:
    return (2, config.longest_row(dtype.itemsize) + 1, 1)


def check_penalty(shape: tuple[int, int, int], dtype: torch.dtype, kind: str, target: str) -> None:
    grads = torch.randn(shape, dtype=torch.float64)
    norms = grads.norm(dim=1, keepdim=True)
    grads = (grads / norms * AIM * (0.5 + torch.rand_like(norms))).to(dtype)
    session = Session(target)
    given = session.copy(grads)
    with session.running():
        results = gradient_penalty.gradient_penalty_fwd(given, kind, WEIGHT, AIM)
    assert torch.equal(given, grads), "the gradients changed"
    for result in results:
        session.assert_written(result)
    penalty, norms, cotangent = results

    def formula(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        slopes = gradient_penalty_reference.gradient_cotangent(x, n, kind, WEIGHT, AIM)
        distance = (n - AIM).clamp_min(0) if kind == "one-sided" else n - AIM
        of_kind = {"squared": n.square().mean() / 2, "max": (n.max() - AIM) ** 2}
        return WEIGHT * of_kind.get(kind, distance.square().mean()), slopes

    accumulate = wide(dtype)
    n = torch.linalg.vector_norm(grads.double(), dim=1)
    peer_n = torch.linalg.vector_norm(grads.to(accumulate), dim=1)
    exact_penalty, exact_cotangent = formula(grads.double(), n)
    peer_penalty, peer_cotangent = formula(grads.to(accumulate), peer_n)
    # As in the tests in Triton's interpreter: a norm takes at most 24 roundings.
    assert_as_accurate(norms, peer_n, n, roundings=24.0)
    distance = n if kind == "squared" else (n - AIM).abs()
    terms = 2 * distance * (n + distance)
    assert_as_accurate(
        penalty, peer_penalty, exact_penalty, roundings=24.0,
        scale=WEIGHT * float(terms.max() if kind == "max" else terms.mean()),
    )  # fmt: skip
    slope = 2 * WEIGHT * float((n + distance).max()) / (1 if kind == "max" else n.numel())
    size = float(exact_cotangent.abs().max()) + slope * torch.finfo(accumulate).eps / torch.finfo(dtype).eps
    assert_as_accurate(cotangent, peer_cotangent.to(dtype), exact_cotangent, roundings=24.0, scale=size)


@pytest.mark.parametrize(("dtype", "target"), DTYPES_ON_TARGETS, ids=str)
@pytest.mark.parametrize("shape", selected([(31, 61, 1), (2, 70, 66)], PENALTY_SHAPES))
def test_gradient_penalty(shape: tuple[int, int, int], dtype: torch.dtype, target: str) -> None:
    for kind in gradient_penalty.KINDS if FULL else ("two-sided",):
        check_penalty(shape, dtype, kind, target)


@pytest.mark.parametrize(
    ("dtype", "target"),
    selected([(torch.float32, "sm_90"), (torch.bfloat16, "sm_80")], DTYPES_ON_TARGETS),
    ids=str,
)
def test_gradient_penalty_of_long_rows(dtype: torch.dtype, target: str) -> None:
    for kind in gradient_penalty.KINDS if FULL else ("two-sided",):
        check_penalty(long_row(dtype), dtype, kind, target)


@pytest.mark.parametrize("target", selected(["sm_90"], TARGETS))
@pytest.mark.parametrize("shape", [(70, 61, 1), (2, 70, 130), (2, 16385, 1)])
def test_the_same_bits_whichever_program_comes_last(shape: tuple[int, int, int], target: str) -> None:
    x = torch.randn(shape)
    results = []
    for descending in (False, True):
        session = Session(target, options={"descending": descending})
        with session.running():
            for _ in range(2):  # of one ticket
                results.append(gradient_penalty.gradient_penalty_fwd(session.copy(x), "two-sided", WEIGHT, AIM))
    for again in results[1:]:
        assert all(map(torch.equal, again, results[0]))


@pytest.mark.parametrize("target", selected(["sm_90"], TARGETS))
@pytest.mark.parametrize("kind", ["one-sided", "squared", "max"])
@pytest.mark.parametrize(
    "shape", selected([(70, 50, 1), (3, 3, 100)], [(31, 61, 1), (2, 70, 66), long_row(torch.float32)])
)
def test_other_kinds_of_penalty(shape: tuple[int, int, int], kind: str, target: str) -> None:
    check_penalty(shape, torch.float32, kind, target)


@pytest.mark.parametrize(("dtype", "target"), DTYPES_ON_TARGETS, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (5, 61), (300, 48)])
def test_interpolate(shape: tuple[int, int], dtype: torch.dtype, target: str) -> None:
    real, fake = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    mix = torch.rand(shape[0], dtype=wide(dtype))
    mix[0] = 1.0
    session = Session(target)
    with session.running():
        value = gradient_penalty.gradient_penalty_interpolate(*(session.copy(x) for x in (real, fake, mix)))
    session.assert_written(value)
    exact = mix[:, None].double() * real.double() + (1.0 - mix[:, None].double()) * fake.double()
    peer = mix[:, None] * real.to(mix.dtype) + (1.0 - mix[:, None]) * fake.to(mix.dtype)
    assert torch.equal(value[0], real[0])
    assert_as_accurate(value, peer.to(dtype), exact, roundings=2.0)


STEP = (1.875, -1.25, 0.375)
PRODUCTS = [(torch.float32, "ieee"), (torch.float64, "ieee"), (torch.float32, "tf32x3")]
# One tile of 16; 64, with a ragged edge; three tiles of 64 along a side; a batch, of columns.
PRODUCT_SHAPES = [(16, 16), (40, 61), (70, 130), (2, 17, 33)]
# Products by fma, by mma in float64 and in TF32, and by wgmma.
PRODUCT_CASES = selected(
    [
        ((70, 130), torch.float32, "ieee", "sm_90"), ((2, 17, 33), torch.float64, "ieee", "sm_80"),
        ((40, 61), torch.float32, "tf32x3", "sm_80"), ((70, 130), torch.float32, "tf32x3", "sm_90"),
        ((16, 16), torch.float64, "ieee", "sm_90"),
    ],
    ((shape, *kind, target) for shape, kind, target in itertools.product(PRODUCT_SHAPES, PRODUCTS, TARGETS)),
)  # fmt: skip


def check_products(shape: tuple[int, ...], dtype: torch.dtype, precision: str, target: str, transposed: bool) -> None:
    x = torch.randn(shape, dtype=dtype)
    session = Session(target)
    given = session.copy(x.mT).mT if transposed else session.copy(x)
    n, m = shape[-1], shape[-2]
    with session.running():
        gram = matrix_sqrt.symmetric_product(given, precision=precision)
        symmetric = session.copy(gram / float(gram.abs().max()))
        value = matrix_sqrt.polynomial(given, symmetric, *STEP, precision=precision)
    for result in (gram, value):
        session.assert_written(result)
    assert torch.equal(gram, gram.mT), "not symmetric to the last bit"
    wide_x = x.double()
    # 16 products a step and the accumulator, each a rounding of eps / 2; tf32x3 leaves out the product of two
    # remainders of 2^-11 (rounded to nearest), splits remainders to 2^-22, and a tensor core truncates.
    rounded = {"ieee": (16 + m / 16) / 2, "tf32x3": (16 + m / 8) + 8}[precision]
    size = float((wide_x.abs().mT @ wide_x.abs()).max())
    assert_as_accurate(gram, x.mT @ x, wide_x.mT @ wide_x, roundings=rounded, scale=size)
    a, b, c = STEP
    eye, g = torch.eye(n, dtype=torch.float64), symmetric.double()
    exact = wide_x @ (a * eye + b * g + c * (g @ g))
    size = float((wide_x.abs() @ (abs(a) * eye + abs(b) * g.abs() + abs(c) * (g.abs() @ g.abs()))).max())
    peer = x @ (a * eye.to(dtype) + b * symmetric + c * (symmetric @ symmetric))
    rounded = {"ieee": (16 + n / 16) + 2, "tf32x3": 2 * (16 + n / 8) + 18}[precision]
    assert_as_accurate(value, peer, exact, roundings=rounded, scale=size)


@pytest.mark.parametrize(("shape", "dtype", "precision", "target"), PRODUCT_CASES, ids=str)
def test_products(shape: tuple[int, ...], dtype: torch.dtype, precision: str, target: str) -> None:
    check_products(shape, dtype, precision, target, transposed=len(shape) == 3)


@pytest.mark.skipif(not FULL, reason="LIPGAN_PTX_FULL=1 takes it")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "precision"), PRODUCTS)
def test_products_in_the_largest_tile(
    dtype: torch.dtype, precision: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 64 if dtype == torch.float64 else 128
    monkeypatch.setattr(config, "product_tile", lambda *_, symmetric: config.ProductTile(side, 16, side * side // 2048))
    check_products((36, 140), dtype, precision, target, transposed=False)


@pytest.mark.parametrize(("dtype", "target"), WIDE_ON_TARGETS, ids=str)
@pytest.mark.parametrize("shape", selected([(2, 3, 3), (9, 300, 6)], [(6, 257, 9), (13, 520, 5)]))
def test_nearest_neighbours(shape: tuple[int, int, int], dtype: torch.dtype, target: str) -> None:
    m, n, d = shape
    # Whole numbers: distances are exact in every order, and many are equal.
    x, y = (torch.randint(-2, 3, (count, d)).to(dtype) for count in (m, n))
    y[: n // 3] = x[torch.randint(m, (n // 3,))]
    session = Session(target)
    x, y = session.copy(x), session.copy(y)
    radii = [session.copy(torch.randint(0, 2 * d, (count,)).double()) for count in (m, n)]
    for k in (min(3, n), min(18, n)):
        with session.running():
            found = nearest_neighbours.nearest_neighbours(x, y, k)
        for value, truth in zip(found, neighbours_reference.nearest_neighbours(x, y, k), strict=True):
            session.assert_written(value)
            assert torch.equal(value, truth)
    if m > 2:
        with session.running():
            found = nearest_neighbours.nearest_neighbours(x, None, 2)
        assert all(map(torch.equal, found, neighbours_reference.nearest_neighbours(x, None, 2)))
    for closed in (False, True):
        with session.running():
            counts = nearest_neighbours.ball_counts(x, y, *radii, closed)
        for value, truth in zip(counts, neighbours_reference.ball_counts(x, y, *radii, closed), strict=True):
            session.assert_written(value)
            assert torch.equal(value, truth)


@pytest.mark.parametrize(("dtype", "target"), WIDE_ON_TARGETS, ids=str)
def test_nearest_neighbours_by_bounds(dtype: torch.dtype, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "bounds_serve", lambda m, n, d: True)
    monkeypatch.setattr(config, "BOUNDS_WORKSPACE", 1)  # one row of tiles at a time
    x, y = (torch.randint(-9, 10, (count, 5)).to(dtype) for count in (18, 70))
    x[7] = y[0] = -9
    y[1:69] = 9  # more open pairs than a program takes, for the points that have no other
    session = Session(target)
    x, y = session.copy(x), session.copy(y)
    radii = [session.copy(torch.randint(0, 300, (count,)).double()) for count in (18, 70)]
    with session.running():
        found = nearest_neighbours.nearest_neighbours(x, y, 3)
    assert {"_nearest_by_bounds_kernel", "_nearest_neighbours_kernel"} < set(session.launched)
    for value, truth in zip(found, neighbours_reference.nearest_neighbours(x, y, 3), strict=True):
        session.assert_written(value)
        assert torch.equal(value, truth)
    with session.running():
        counts = nearest_neighbours.ball_counts(x, y, *radii, True)
    assert {"_counts_by_bounds_kernel", "_ball_counts_kernel"} < set(session.launched)
    for value, truth in zip(counts, neighbours_reference.ball_counts(x, y, *radii, True), strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("approximation", [-1, 1])
@pytest.mark.parametrize("target", selected(["sm_90"], TARGETS))
def test_an_approximate_root_finds_the_same_tiles(target: str, approximation: int) -> None:
    """sqrt.approx.ftz.f32 tells the tile of a program; it may be off by 2^-23 of itself, and the tile is the same."""
    x = torch.randn(5, 200)
    results = []
    for size in (0, approximation):
        session = Session(target, options={"approximation": size})
        given = session.copy(x)
        with session.running():
            results.append(matrix_sqrt.symmetric_product(given))
        session.assert_written(results[-1])
    assert torch.equal(*results)
