"""csrc/cuda/spectral_norm.cu, run by the host executor, and the module lipgan._cuda where it is built."""

import contextlib
import ctypes
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import host_executor
import numpy as np
import pytest
import torch
from arena import Arena
from cuda_sources import SPECTRAL_NORM
from matrix_memory import in_memory, out_of_memory
from tolerance import assert_as_accurate

from lipgan.ops import _backend
from lipgan.ops.spectral_norm import backends, cuda
from lipgan.reference import spectral_norm as reference

needs_gxx = pytest.mark.skipif(host_executor.GXX is None, reason=host_executor.NO_GXX)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # numbered as in lipgan/dtype.h
CUDA_ERROR_INVALID_VALUE = 1
EPS = 1e-12

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # weight [h, w], u [h], v [w]
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # y [h, w], u [h], v [w], sigma []


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = host_executor.build(SPECTRAL_NORM, tmp_path_factory.mktemp("spectral_norm"))
    for function in (loaded.workspace_size, loaded.table_size, loaded.bwd_workspace_size):
        function.restype = ctypes.c_int64
    return loaded


Order = tuple[int, int]  # inner, channels


def orders_of(layers: Sequence[tuple[torch.Tensor, ...]], orders: Sequence[Order] | None) -> Sequence[Order]:
    """Those given, or those of matrices that lie as they are."""
    return [(layer[0].shape[1],) * 2 for layer in layers] if orders is None else orders


def run(
    library: ctypes.CDLL,
    layers: Sequence[Layer],
    n: int,
    *,
    eps: float = EPS,
    multiprocessors: int = 3,
    order: int = 2,
    misaligned: bool = False,
    orders: Sequence[Order] | None = None,
) -> list[Result]:
    """The grouped forward on the host executor, of weights that lie in these orders."""
    dtype = layers[0][0].dtype
    arena = Arena()
    orders = orders_of(layers, orders)
    lying = [(in_memory(layer[0], *pair), *layer[1:]) for layer, pair in zip(layers, orders, strict=True)]
    inputs = [[arena.copy(t, misaligned) for t in layer] for layer in lying]
    outputs = [[arena.empty(t.shape, dtype, misaligned) for t in layer] for layer in lying]
    sigma = arena.empty([len(layers)], torch.float64 if dtype == torch.float64 else torch.float32)
    rows = np.array(
        [
            [*(t.data_ptr() for t in (*ins, *outs)), *ins[0].shape, channels]
            for ins, outs, (_, channels) in zip(inputs, outputs, orders, strict=True)
        ],
        dtype=np.int64,
    )
    table = ctypes.c_void_p(rows.ctypes.data)
    count = ctypes.c_int64(len(layers))
    workspace = arena.empty([library.workspace_size(table, count)], torch.uint8)
    device_table = arena.empty([library.table_size(count)], torch.uint8)
    host_executor.configure(library, multiprocessors=multiprocessors, seed=order)
    error = library.spectral_norm_fwd(
        DTYPES.index(dtype), table, count, ctypes.c_void_p(sigma.data_ptr()), ctypes.c_int64(n),
        ctypes.c_double(eps), ctypes.c_void_p(workspace.data_ptr()), ctypes.c_void_p(device_table.data_ptr()),
    )  # fmt: skip
    assert error == 0, library.host_executor_message().decode()
    arena.assert_guards_untouched()
    for ins, layer in zip(inputs, lying, strict=True):
        for mine, given in zip(ins, layer, strict=True):
            torch.testing.assert_close(mine, given, rtol=0, atol=0, equal_nan=True)
    # Copies: the arena's memory goes away with it.
    return [
        (out_of_memory(y, channels), u.clone(), v.clone(), s.clone())
        for (y, u, v), s, (_, channels) in zip(outputs, sigma, orders, strict=True)
    ]


def truth(layer: Layer, n: int, eps: float = EPS) -> Result:
    """A plain power iteration in extended precision, rounded to float64."""
    weight, u, v = (t.double().numpy().astype(np.longdouble) for t in layer)
    for _ in range(n):
        t = weight @ v
        u = t / max(np.sqrt(t @ t), np.longdouble(eps))
        s = weight.T @ u
        v = s / max(np.sqrt(s @ s), np.longdouble(eps))
    sigma = u @ (weight @ v) if n == 0 else s @ v
    y = weight / sigma if abs(sigma) > 0 else weight
    return tuple(torch.from_numpy(np.asarray(x, np.float64)) for x in (y, u, v, sigma))


def peer(layer: Layer, n: int, eps: float = EPS) -> Result:
    """PyTorch's computation, in the dtype of the weight."""
    weight, u, v = layer
    for _ in range(n):
        u = torch.nn.functional.normalize(weight.mv(v), dim=0, eps=eps)
        v = torch.nn.functional.normalize(weight.mT.mv(u), dim=0, eps=eps)
    sigma = u.dot(weight.mv(v))
    return weight / sigma, u, v, sigma


def random_layer(h: int, w: int, dtype: torch.dtype, scale: float = 1.0) -> Layer:
    weight = (torch.randn(h, w, dtype=torch.float64) * scale).to(dtype)
    u = torch.nn.functional.normalize(torch.randn(h, dtype=torch.float64), dim=0)
    v = torch.nn.functional.normalize(torch.randn(w, dtype=torch.float64), dim=0)
    return weight, u.to(dtype), v.to(dtype)


def assert_accurate(results: Sequence[Result], layers: Sequence[Layer], n: int, eps: float = EPS) -> None:
    for result, layer in zip(results, layers, strict=True):
        for name, mine, torchs, true in zip(
            ("y", "u", "v", "sigma"), result, peer(layer, n, eps), truth(layer, n, eps), strict=True
        ):
            # Floor: per iteration, two products with at most 6 roundings each along the longest path of a sum (its
            # terms are random, so roundings mostly cancel), the norm, its reciprocal, and the product with it. sigma
            # without iterations may be far smaller than the |W| its terms come from, and y then is that much larger.
            cancellation = 1.0
            if n == 0 and true.numel():
                sigma = truth(layer, n)[3].abs()
                cancellation = float(layer[0].double().norm() / sigma)
            # The half types are rounded once, from float32.
            half = layer[0].dtype.itemsize == 2
            floor = 1.0 + (cancellation * 2.0**-8 if half else 16.0 * max(n, 1) * cancellation)
            try:
                assert_as_accurate(mine.to(torchs.dtype), torchs, true, roundings=floor)
            except AssertionError as error:
                raise AssertionError(f"{name} of {tuple(layer[0].shape)}: {error}") from error


# 1 x 1, rows, columns, primes; more rows than one block of rows; one, two and more packs of 16 bytes +- 1 for each
# dtype; more columns than 256 threads hold at once; several chunks.
SHAPES = [
    (1, 1), (1, 2), (1, 257), (61, 1), (1031, 2), (7, 13), (8, 15), (9, 16), (5, 17), (37, 64), (64, 27),
    (600, 128), (19, 1032), (11, 1151), (17, 2056), (3, 4104), (2, 5003), (131, 260),
]  # fmt: skip


@pytest.mark.slow
@needs_gxx
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_group(library: ctypes.CDLL, dtype: torch.dtype, n: int) -> None:
    layers = [random_layer(h, w, dtype) for h, w in SHAPES]
    results = run(library, layers, n)
    assert_accurate(results, layers, n)
    if n == 0:
        for (_, u, v, _), (_, u_in, v_in) in zip(results, layers, strict=True):
            assert u.equal(u_in)
            assert v.equal(v_in)


# Weights that do not lie as their matrices: (h, w), then inner and channels. Packs of 16 bytes of each dtype and not; a
# row, a pixel, a channel; several blocks of rows, tiles of one, and columns that no tile holds.
ORDERS = [
    # Channels last, rows of dimension 0.
    ((37, 45), (45, 5)), ((64, 144), (144, 16)), ((3, 1152), (1152, 128)), ((300, 12), (12, 3)), ((2, 50), (50, 1)),
    # Contiguous, rows of dimension 1.
    ((16, 36), (9, 36)), ((24, 64), (16, 64)), ((300, 50), (25, 50)), ((7, 98), (49, 98)), ((19, 2064), (16, 2064)),
    ((1, 6), (3, 6)),
    # Channels last, rows of dimension 1: rows side by side.
    ((3, 1030), (1, 1030)), ((128, 48), (1, 48)), ((40, 1032), (1, 1032)), ((13, 7), (1, 7)), ((300, 16), (1, 16)),
    ((301, 3), (1, 3)), ((1, 5), (1, 5)),
    # Both at once, which no layer has.
    ((6, 24), (8, 4)), ((16, 24), (1, 6)),
]  # fmt: skip


@needs_gxx
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtype", [pytest.param(d, marks=[pytest.mark.slow] * (d in DTYPES[1:3])) for d in DTYPES])
def test_orders_of_memory(library: ctypes.CDLL, dtype: torch.dtype, misaligned: bool) -> None:
    """A group of all of them, beside weights that lie as their matrices."""
    shapes, orders = map(list, zip(*ORDERS, ((64, 27), (27, 27)), ((5, 64), (64, 64)), strict=True))
    layers = [random_layer(h, w, dtype) for h, w in shapes]
    for n in (2,) if misaligned else (0, 2):
        results = run(library, layers, n, orders=orders, misaligned=misaligned)
        assert_accurate(results, layers, n)
    backward, sigma, grad_sigma = backward_inputs(shapes, dtype)
    gradients = run_backward(library, backward, sigma, grad_sigma, orders=orders, misaligned=misaligned)
    assert_gradients_accurate(gradients, backward, sigma, grad_sigma)


@needs_gxx
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    layers = [random_layer(h, w, dtype) for h, w in [(1, 1), (24, 64), (9, 272), (40, 33)]]
    assert_accurate(run(library, layers, 2, misaligned=True), layers, 2)


@needs_gxx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_every_grid_and_in_every_order(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    layers = [random_layer(h, w, dtype) for h, w in [(300, 128), (5, 2100), (70, 40), (1, 9), (70, 40), (70, 1040)]]
    orders = [(128, 128), (2100, 2100), (40, 40), (9, 9), (5, 40), (1, 1040)]
    first = run(library, layers, 2, multiprocessors=1, order=0, orders=orders)
    for multiprocessors, order in [(1, 1), (2, 0), (5, 1), (16, 7)]:
        again = run(library, layers, 2, multiprocessors=multiprocessors, order=order, orders=orders)
        for mine, theirs in zip(again, first, strict=True):
            assert all(a.equal(b) for a, b in zip(mine, theirs, strict=True))


@needs_gxx
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_zero_matrix(library: ctypes.CDLL, dtype: torch.dtype, n: int) -> None:
    weight, u_in, v_in = random_layer(13, 24, dtype)
    other = random_layer(5, 8, dtype)
    (y, u, v, sigma), result = run(library, [(torch.zeros_like(weight), u_in, v_in), other], n)
    assert sigma == 0
    assert y.eq(0).all()
    assert u.equal(u_in if n == 0 else torch.zeros_like(u))
    assert v.equal(v_in if n == 0 else torch.zeros_like(v))
    assert_accurate([result], [other], n)


@needs_gxx
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scale_of_the_matrix(library: ctypes.CDLL, dtype: torch.dtype, scale: float) -> None:
    eps = 1e-36  # below |t| and |s|, so that u and v are unit vectors
    layers = [random_layer(h, w, dtype, scale) for h, w in [(40, 72), (33, 31), (3, 1100)]]
    for n in (1, 2):
        results = run(library, layers, n, eps=eps)
        for result, layer in zip(results, layers, strict=True):
            # The same matrix at an ordinary scale, a power of two away, which changes no rounding of ours.
            power = 2.0 ** -round(np.log2(scale))
            ordinary = ((layer[0].double() * power).to(dtype), layer[1], layer[2])
            y, u, v, sigma = result
            assert_accurate([(y * power * (1 / power), u, v, (sigma.double() * power).to(sigma.dtype))], [ordinary], n)


@needs_gxx
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("n", [0, 2])
def test_orders_of_memory_near_the_ends_of_the_range(library: ctypes.CDLL, n: int, scale: float) -> None:
    """Columns of W are read again where a sum has left the range; the whole iteration is, times a power of two."""
    orders = [(72, 8), (5, 30), (1, 40), (31, 31)]
    layers = [random_layer(h, w, torch.float32, scale) for h, w in [(40, 72), (33, 30), (24, 40), (9, 31)]]
    power = 2.0 ** -round(np.log2(scale))
    ordinary = [((weight.double() * power).float(), u, v) for weight, u, v in layers]
    results = run(library, layers, n, eps=1e-36, orders=orders)
    scaled = [(y, u, v, (sigma.double() * power).float()) for y, u, v, sigma in results]
    assert_accurate(scaled, ordinary, n)


@needs_gxx
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        (torch.float32, 3.4e38),
        (torch.float32, 1e30),
        (torch.bfloat16, 3e38),
        (torch.float64, 1.7e308),
        (torch.float64, 1e155),
    ],
)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_matrix_at_the_end_of_the_range(library: ctypes.CDLL, dtype: torch.dtype, largest: float, n: int) -> None:
    layers = []
    for h, w in [(40, 72), (33, 31), (3, 1100)]:
        weight, u, v = random_layer(h, w, torch.float64)
        layers.append(((weight / weight.abs().max() * largest).to(dtype), u.to(dtype), v.to(dtype)))
    # A layer beside them that is not large, and one that is not finite.
    layers += [random_layer(9, 40, dtype), (torch.full((4, 4), torch.inf, dtype=dtype), *random_layer(4, 4, dtype)[1:])]
    *results, infinite = run(library, layers, n)
    power = 2.0 ** -round(np.log2(largest))
    for (y, u, v, sigma), (weight, u_in, v_in) in zip(results, layers, strict=False):
        scale = power if weight.abs().max() > 1e10 else 1.0
        true = truth((weight.double() * scale, u_in, v_in), n)
        with np.errstate(over="ignore"):
            exact = torch.tensor(float(np.longdouble(true[3].item()) / np.longdouble(scale)), dtype=torch.float64)
        if exact.to(sigma.dtype).isfinite():
            ordinary = (sigma.double() * scale).to(sigma.dtype)
        else:
            assert sigma.abs() == torch.inf
            ordinary = true[3].to(sigma.dtype)
        ordinary_layer = ((weight.double() * scale).to(dtype), u_in, v_in)
        assert_accurate([(y, u, v, ordinary)], [ordinary_layer], n)
    assert infinite[0].isnan().any()


@needs_gxx
def test_unit_vectors_far_from_the_singular_ones_do_not_overflow(library: ctypes.CDLL) -> None:
    # |t| is ordinary and the norm of W is not: t W overflows, t / |t| W does not.
    weight = torch.diag(torch.tensor([1.0, 1e38, 2.0, 3.0, 5.0], dtype=torch.float32))
    weight[0, 1] = 1e35
    weight[1, 1] = 0.0
    v = torch.tensor([1e4, 0.0, 0.0, 0.0, 0.0])
    layer = (weight, torch.ones(5), v)
    assert_accurate(run(library, [layer], 1), [layer], 1)


@needs_gxx
def test_norm_below_eps_is_clamped(library: ctypes.CDLL) -> None:
    # u and v are shorter than 1, and sigma = |s|^2 / eps.
    layer = random_layer(12, 20, torch.float64, 1e-8)
    ((y, u, v, sigma),) = run(library, [layer], 1, eps=1e-3)
    assert u.norm() < 1e-3
    assert_accurate([(y, u, v, sigma)], [layer], 1, eps=1e-3)


@needs_gxx
def test_sigma_below_the_smallest_normal_number_scales_by_one(library: ctypes.CDLL) -> None:
    layer = random_layer(12, 20, torch.float32, 1e-30)
    ((y, _, _, sigma),) = run(library, [layer], 1)
    assert sigma.abs() < torch.finfo(torch.float32).tiny
    assert y.equal(layer[0])


@needs_gxx
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_not_finite_stays_in_its_layer(library: ctypes.CDLL, n: int, value: float) -> None:
    layers = [random_layer(h, w, torch.float32) for h, w in [(9, 40), (10, 52), (9, 40)]]
    clean = run(library, layers, n)
    layers[1][0][3, 17] = value
    results = run(library, layers, n)
    for i in (0, 2):
        assert all(a.equal(b) for a, b in zip(results[i], clean[i], strict=True))
    y, u, v, sigma = results[1]
    assert not sigma.isfinite()
    assert y[3, 17].isnan()
    if n > 0:
        assert y.isnan().all()
        assert u.isnan().any()
        assert v.isnan().all()


@needs_gxx
def test_more_layers_than_one_table_launch(library: ctypes.CDLL) -> None:
    layers = [random_layer(1 + i % 7, 1 + i % 11, torch.float32) for i in range(45)]
    assert_accurate(run(library, layers, 1), layers, 1)


@needs_gxx
def test_empty(library: ctypes.CDLL) -> None:
    layers = [random_layer(h, w, torch.float32) for h, w in [(4, 8), (0, 5), (3, 0), (2, 2), (0, 0)]]
    results = run(library, layers, 1)
    assert_accurate([results[0], results[3]], [layers[0], layers[3]], 1)
    for i in (1, 2, 4):
        assert results[i][3] == 0
        assert results[i][1].eq(0).all()
        assert results[i][2].eq(0).all()
    # No layer at all is no launch.
    none = [ctypes.c_void_p(None)] * 2
    arguments = [ctypes.c_int64(0), None, ctypes.c_int64(1), ctypes.c_double(EPS), *none]
    assert library.spectral_norm_fwd(0, None, *arguments) == 0


Backward = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # dY [h, w], Y [h, w], u [h], v [w]


def run_backward(
    library: ctypes.CDLL,
    layers: Sequence[Backward],
    sigma: torch.Tensor,
    grad_sigma: torch.Tensor | None,
    *,
    multiprocessors: int = 3,
    order: int = 2,
    misaligned: bool = False,
    orders: Sequence[Order] | None = None,
) -> list[torch.Tensor]:
    """The grouped backward on the host executor, of weights that lie in these orders."""
    dtype = layers[0][0].dtype
    arena = Arena()
    orders = orders_of(layers, orders)
    lying = [
        (*(in_memory(t, *pair) for t in layer[:2]), *layer[2:]) for layer, pair in zip(layers, orders, strict=True)
    ]
    inputs = [[arena.copy(t, misaligned) for t in layer] for layer in lying]
    outputs = [arena.empty(layer[0].shape, dtype, misaligned) for layer in lying]
    rows = np.array(
        [
            [*(t.data_ptr() for t in (*ins, out)), *out.shape, channels]
            for ins, out, (_, channels) in zip(inputs, outputs, orders, strict=True)
        ],
        dtype=np.int64,
    )
    scalars = [None if t is None else arena.copy(t) for t in (sigma, grad_sigma)]
    table, count = ctypes.c_void_p(rows.ctypes.data), ctypes.c_int64(len(layers))
    workspace = arena.empty([library.bwd_workspace_size(table, count)], torch.uint8)
    host_executor.configure(library, multiprocessors=multiprocessors, seed=order)
    error = library.spectral_norm_bwd(
        DTYPES.index(dtype), table, count, *(ctypes.c_void_p(t if t is None else t.data_ptr()) for t in scalars),
        ctypes.c_void_p(workspace.data_ptr()),
    )  # fmt: skip
    assert error == 0, library.host_executor_message().decode()
    arena.assert_guards_untouched()
    return [out_of_memory(out, channels) for out, (_, channels) in zip(outputs, orders, strict=True)]


def backward_inputs(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> tuple[list[Backward], torch.Tensor, torch.Tensor]:
    layers = []
    for h, w in shapes:
        y, u, v = random_layer(h, w, dtype)
        layers.append((torch.randn(h, w, dtype=torch.float64).to(dtype), y, u, v))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return layers, torch.rand(len(shapes), dtype=wide) + 0.5, torch.randn(len(shapes), dtype=wide)


def assert_gradients_accurate(
    results: Sequence[torch.Tensor],
    layers: Sequence[Backward],
    sigma: torch.Tensor,
    grad_sigma: torch.Tensor | None,
) -> None:
    """Against the formula in float64, and against PyTorch's in the accumulation dtype."""
    for i, (result, layer) in enumerate(zip(results, layers, strict=True)):

        def formula(kind: torch.dtype, i: int = i, layer: Backward = layer) -> tuple[torch.Tensor, float]:
            dy, y, u, v = (t.to(kind) for t in layer)
            s = sigma[i].to(kind)
            along = (dy * y).sum() / s - (0.0 if grad_sigma is None else grad_sigma[i].to(kind))
            # What the terms of the sum, and those of the difference, amount to.
            terms = (dy * y).abs().sum() * u.abs().max() * v.abs().max() / s + dy.abs().max()
            return dy / s - along * torch.outer(u, v), float(terms / s)

        exact, size = formula(torch.float64)
        peer, _ = formula(sigma.dtype)
        narrow = torch.finfo(sigma.dtype).eps / torch.finfo(result.dtype).eps
        assert_as_accurate(
            result, peer.to(result.dtype), exact, roundings=4.0, scale=float(exact.abs().max()) + size * narrow
        )


@needs_gxx
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(library: ctypes.CDLL, dtype: torch.dtype, misaligned: bool) -> None:
    # Rows that 16 bytes divide or not, wider than a block's step and narrower than 16 bytes; several chunks, and their
    # edges.
    shapes = [(1, 1), (61, 1), (1, 257), (7, 13), (64, 27), (9, 16), (3, 2056), (33, 256), (17, 513)]
    layers, sigma, grad_sigma = backward_inputs(shapes, dtype)
    for given in (grad_sigma, None):
        results = run_backward(library, layers, sigma, given, misaligned=misaligned)
        assert_gradients_accurate(results, layers, sigma, given)


@needs_gxx
def test_backward_of_vectors_that_lie_anywhere(library: ctypes.CDLL) -> None:
    """u and v of a group lie one behind the other, so that v may begin anywhere where all else is aligned."""
    layers, sigma, grad_sigma = backward_inputs([(40, 64), (12, 20)], torch.float32)
    uv = torch.cat([torch.zeros(1), *(t for layer in layers for t in layer[2:])])
    expected = run_backward(library, layers, sigma, grad_sigma)
    at, shifted = 1, []
    for dy, y, u, v in layers:
        shifted.append((dy, y, uv[at : at + len(u)], uv[at + len(u) : at + len(u) + len(v)]))
        at += len(u) + len(v)
    arena_copy = Arena.copy

    def as_it_lies(self: Arena, tensor: torch.Tensor, misaligned: bool = False) -> torch.Tensor:
        return tensor if tensor.data_ptr() % 16 else arena_copy(self, tensor, misaligned)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arena, "copy", as_it_lies)
        results = run_backward(library, shifted, sigma, grad_sigma)
    assert all(map(torch.equal, results, expected))


@needs_gxx
def test_backward_gives_the_same_bits_on_every_grid_and_in_every_group(library: ctypes.CDLL) -> None:
    layers, sigma, grad_sigma = backward_inputs([(300, 40), (5, 2100), (1, 9), (300, 40)], torch.float32)
    options = {"orders": [(40, 40), (2100, 100), (9, 9), (8, 40)]}
    first = run_backward(library, layers, sigma, grad_sigma, multiprocessors=1, order=0, **options)
    for multiprocessors, order in [(1, 1), (2, 0), (16, 7)]:
        again = run_backward(
            library, layers, sigma, grad_sigma, multiprocessors=multiprocessors, order=order, **options
        )
        assert all(map(torch.equal, again, first))
    (alone,) = run_backward(library, layers[1:2], sigma[1:2], grad_sigma[1:2], orders=options["orders"][1:2])
    assert torch.equal(alone, first[1])


@needs_gxx
def test_backward_of_more_layers_than_a_launch_takes(library: ctypes.CDLL) -> None:
    layers, sigma, grad_sigma = backward_inputs([(1 + i % 7, 1 + i % 11) for i in range(50)], torch.float32)
    assert_gradients_accurate(run_backward(library, layers, sigma, grad_sigma), layers, sigma, grad_sigma)


@needs_gxx
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_where_sigma_counts_as_zero(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    layers, sigma, _ = backward_inputs([(4, 8), (0, 5), (5, 8), (6, 7)], dtype)
    layers[0] = (layers[0][0], torch.zeros(4, 8, dtype=dtype), *layers[0][2:])
    sigma[0], sigma[2] = torch.finfo(dtype).tiny / 4, float("nan")
    results = run_backward(library, layers, sigma, None)
    assert torch.equal(results[0], layers[0][0])
    assert results[2].isnan().all(), "a NaN is not taken for 0"
    assert results[3].isfinite().all()


class Executed:
    """lipgan._cuda, as far as spectral_norm needs it, of the host executor."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.addresses: set[int] = set()  # of all arrays of layers

    def _rows(self, layers: Sequence[tuple[int, ...]]) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
        rows = []
        for *arrays, h, w, inner, channels in layers:
            self.addresses.update(arrays)
            rows.append([*arrays, w // inner, h, inner, channels])
        self.rows = np.array(rows, np.int64)
        return ctypes.c_void_p(self.rows.ctypes.data), ctypes.c_int64(len(layers))

    def spectral_norm_fwd_workspace(self, layers: Sequence[tuple[int, ...]]) -> int:
        return self.library.workspace_size(*self._rows(layers))

    def spectral_norm_fwd_table_size(self, num_layers: int) -> int:
        return self.library.table_size(ctypes.c_int64(num_layers))

    def spectral_norm_bwd_workspace(self, layers: Sequence[tuple[int, ...]]) -> int:
        return self.library.bwd_workspace_size(*self._rows(layers))

    def spectral_norm_fwd(
        self, dtype: int, layers: Sequence[tuple[int, ...]], sigma: int, n: int, eps: float, *addresses: int
    ) -> None:
        *arrays, stream = addresses
        assert stream == 7
        host_executor.configure(self.library, multiprocessors=2, seed=2)
        settings = ctypes.c_void_p(sigma), ctypes.c_int64(n), ctypes.c_double(eps)
        error = self.library.spectral_norm_fwd(dtype, *self._rows(layers), *settings, *map(ctypes.c_void_p, arrays))
        assert error == 0

    def spectral_norm_bwd(self, dtype: int, layers: Sequence[tuple[int, ...]], *addresses: int) -> None:
        *arrays, stream = addresses
        assert stream == 7
        host_executor.configure(self.library, multiprocessors=2, seed=2)
        assert self.library.spectral_norm_bwd(dtype, *self._rows(layers), *map(ctypes.c_void_p, arrays)) == 0


@pytest.fixture
def executed(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Executed:
    """In place of lipgan._cuda."""
    module = Executed(library)
    monkeypatch.setattr(_backend, "cuda", lambda: module)
    cuda._bwd_sizes.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return module


def weights_of_layers() -> tuple[list[torch.Tensor], list[int]]:
    """Weights as layers hold them, and the dimensions of their rows."""
    channels_last, channels_last_3d = torch.channels_last, torch.channels_last_3d
    return [
        torch.randn(5, 7),
        torch.randn(4, 3, 2, 2),
        torch.randn(4, 3, 2, 2),
        torch.randn(4, 3, 2, 2).to(memory_format=channels_last),
        torch.randn(4, 3, 2, 2).to(memory_format=channels_last),
        torch.randn(8, 12, 3, 3).to(memory_format=channels_last),
        torch.randn(4, 3, 2, 2, 2).to(memory_format=channels_last_3d),
        torch.randn(6, 4, 3),
        torch.randn(7, 5).T,
    ], [0, 0, 1, 0, 1, 0, 1, 2, 0]  # fmt: skip


@needs_gxx
@pytest.mark.parametrize("n", [0, 2])
def test_forward_of_the_op(executed: Executed, n: int) -> None:
    """Shapes, dimensions and orders of memory, by the backend's function: read and written where they lie."""
    weights, dims = weights_of_layers()
    vectors = [
        torch.nn.functional.normalize(torch.randn(size), dim=0) for size in backends._vector_sizes(weights, dims)
    ]
    arguments = weights, vectors[::2], vectors[1::2], n, EPS, dims
    ys, sigma, uv = cuda.fwd(*arguments)
    exact_ys, exact_sigma, us, vs = reference.spectral_norm_fwd(*arguments)
    torch.testing.assert_close(sigma, exact_sigma, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(uv, backends.join_vectors(us, vs), rtol=1e-4, atol=1e-5)
    for weight, mine, exact in zip(weights, ys, exact_ys, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)
        assert mine.stride() == weight.stride()
        assert {weight.data_ptr(), mine.data_ptr()} <= executed.addresses


@needs_gxx
@pytest.mark.parametrize("with_sigma", [False, True])
def test_backward_of_the_op(executed: Executed, with_sigma: bool) -> None:
    ys, dims = weights_of_layers()
    grads = [torch.empty_like(y).normal_() for y in ys]
    vectors = [torch.randn(size) for size in backends._vector_sizes(ys, dims)]
    sigma, grad_sigma = torch.rand(len(ys)) + 0.5, torch.randn(len(ys)) if with_sigma else None
    arguments = grads, grad_sigma, ys, sigma
    results = cuda.bwd(*arguments, torch.cat(vectors), dims)
    exact = reference.spectral_norm_bwd(*arguments, vectors[::2], vectors[1::2], dims)
    for y, grad, mine, theirs in zip(ys, grads, results, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert mine.stride() == y.stride()
        assert {y.data_ptr(), grad.data_ptr(), mine.data_ptr()} <= executed.addresses


@needs_gxx
@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 2, 1)])
def test_what_does_not_lie_alike_is_copied(executed: Executed, dims: tuple[int, ...]) -> None:
    # Y of which every second number is somebody else's; gradients in another order than Y, negations that are put off.
    ys = [torch.randn(5, 14)[:, ::2], torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
          torch.randn(6, 4, 3), torch.randn(4, 3, 2, 2)]  # fmt: skip
    grads = [torch.randn(7, 5).T, torch.randn(4, 3, 2, 2, dtype=torch.complex64).conj().imag,
             torch.randn(3, 4, 6).permute(2, 1, 0),
             torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)]  # fmt: skip
    vectors = [torch.randn(size) for size in backends._vector_sizes(ys, dims)]
    arguments = grads, None, ys, torch.rand(4) + 0.5
    results = cuda.bwd(*arguments, torch.cat(vectors), dims)
    exact = reference.spectral_norm_bwd(*arguments, vectors[::2], vectors[1::2], dims)
    for y, mine, theirs in zip(ys, results, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert mine.stride() == torch.empty_like(y).stride()
    forward = ys, vectors[::2], vectors[1::2], 1, EPS, dims
    for mine, theirs in zip(cuda.fwd(*forward)[0], reference.spectral_norm_fwd(*forward)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_which_backward_a_gpu_is_asked_for_first() -> None:
    def of(shape: tuple[int, int], is_cuda: bool = True) -> str | None:
        y = SimpleNamespace(is_cuda=is_cuda, numel=lambda: shape[0] * shape[1], element_size=lambda: 4)
        return backends._first([y, y])

    assert of((1024, 4096)) == "cuda"
    assert of((1025, 4096)) is None
    assert of((1, 1), is_cuda=False) is None
    # Only where nothing else was chosen, and where it can serve.
    assert _backend.resolve("spectral_norm", "reference", "cuda", "cuda") == "reference"
    assert _backend.resolve("matrix_sqrt", None, "cpu", "cuda") == _backend.resolve("matrix_sqrt", None, "cpu")


# outer, h, inner and channels of a layer, and what no layer has.
VALID = (1, 4, 4, 4)
INVALID = {
    "outer": (-1, 4, 4, 4),
    "h": (1, -1, 4, 4),
    "inner": (1, 4, 2**31, 4),
    "w": (2**16, 4, 2**16, 2**16),
    "channels": (1, 4, 4, 3),
    "no channels": (1, 4, 4, 0),
}


@needs_gxx
@pytest.mark.parametrize("field", [*INVALID, "workspace", "dtype"])
def test_invalid_arguments_of_the_backward(library: ctypes.CDLL, field: str) -> None:
    row = np.array([[0, 0, 0, 0, 0, *INVALID.get(field, VALID)]], dtype=np.int64)
    error = library.spectral_norm_bwd(
        4 if field == "dtype" else 0, ctypes.c_void_p(row.ctypes.data), ctypes.c_int64(1), None, None,
        ctypes.c_void_p(8 if field == "workspace" else 0),
    )  # fmt: skip
    assert error == CUDA_ERROR_INVALID_VALUE


@needs_gxx
@pytest.mark.parametrize("field", [*INVALID, "n_power_iterations", "workspace", "dtype"])
def test_invalid_arguments(library: ctypes.CDLL, field: str) -> None:
    row = np.array([[0, 0, 0, 0, 0, 0, *INVALID.get(field, VALID)]], dtype=np.int64)
    dtype, n, workspace = 0, 1, 0
    if field == "n_power_iterations":
        n = -1
    elif field == "workspace":
        workspace = 8
    elif field == "dtype":
        dtype = 4
    table = np.zeros(512, np.uint8)
    table_address = table.ctypes.data + (-table.ctypes.data) % 16
    error = library.spectral_norm_fwd(
        dtype, ctypes.c_void_p(row.ctypes.data), ctypes.c_int64(1), None, ctypes.c_int64(n), ctypes.c_double(EPS),
        ctypes.c_void_p(workspace), ctypes.c_void_p(table_address),
    )  # fmt: skip
    assert error == CUDA_ERROR_INVALID_VALUE


# An installation may do without the module; conftest.py skips what is marked so, and says why.
@pytest.mark.backend("cuda module")
def test_module_sizes() -> None:
    module = importlib.import_module("lipgan._cuda")
    layers = [[0, 0, 0, 0, 0, 0, 64, 576, 576, 576], [0, 0, 0, 0, 0, 0, 1, 8192, 16, 8192]]
    # t, s and one partial row per block of rows at least.
    assert module.spectral_norm_fwd_workspace(layers) >= 8 * (64 + 2 * 576 + 1 + 2 * 8192)
    assert module.spectral_norm_fwd_workspace(layers) % 16 == 0
    assert module.spectral_norm_fwd_table_size(3) == 3 * module.spectral_norm_fwd_table_size(1) > 0
    # A number for each chunk, of 4096 elements at least and 32768 at most.
    backward = [[0, 0, 0, 0, 0, 64, 65, 65, 65], [0, 0, 0, 0, 0, 1024, 9216, 9, 9216], [0, 0, 0, 0, 0, 0, 7, 7, 7]]
    assert module.spectral_norm_bwd_workspace(backward) == 8 * (2 + 288)
    # And v in the order of the columns.
    assert module.spectral_norm_bwd_workspace([[0, 0, 0, 0, 0, 64, 65, 65, 5]]) == 8 * (2 + 66)
    assert module.runtime_version() >= 12000


@pytest.mark.backend("cuda module")
@pytest.mark.parametrize(("w", "inner", "channels"), [(12, 5, 12), (12, 0, 12), (12, 12, 5), (12, 12, -3)])
def test_orders_that_describe_no_memory_are_refused(w: int, inner: int, channels: int) -> None:
    module = importlib.import_module("lipgan._cuda")
    message = f"^inner and channels must divide w of a layer, got inner={inner} and channels={channels} of w={w}$"
    forward, backward = ([*[0] * addresses, 4, w, inner, channels] for addresses in (6, 5))
    with pytest.raises(ValueError, match=message):
        module.spectral_norm_fwd_workspace([forward])
    with pytest.raises(ValueError, match=message):
        module.spectral_norm_fwd(0, [forward], 0, 1, 1e-12, 0, 0, 0)
    with pytest.raises(ValueError, match=message):
        module.spectral_norm_bwd_workspace([backward])
    with pytest.raises(ValueError, match=message):
        module.spectral_norm_bwd(0, [backward], 0, 0, 0, 0)


WITHOUT_A_DEVICE = """
import pytest
import lipgan._cuda as module

assert module.device_count() == 0
with pytest.raises(RuntimeError, match=r"CUDA error: .*driver|CUDA error: no CUDA-capable device"):
    module.spectral_norm_fwd(0, [[0, 0, 0, 0, 0, 0, 4, 4, 4, 4]], 0, 1, 1e-12, 0, 0, 0)
with pytest.raises(RuntimeError, match=r"CUDA error: .*driver|CUDA error: no CUDA-capable device"):
    module.spectral_norm_bwd(0, [[0, 0, 0, 0, 0, 4, 4, 4, 4]], 0, 0, 0, 0)
module.spectral_norm_bwd(0, [], 0, 0, 0, 0)
module.spectral_norm_fwd(0, [], 0, 1, 1e-12, 0, 0, 0)
"""


@pytest.mark.backend("cuda module")
def test_module_without_a_device() -> None:
    """Where there is one, it is hidden from the process."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", WITHOUT_A_DEVICE], env=environment, check=True)
