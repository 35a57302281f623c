"""The Triton kernels of matrix_sqrt, in Triton's interpreter, against a wider truth and against PyTorch."""

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from lipgan.kernels import config
from lipgan.kernels.matrix_sqrt import polar as kernels
from tolerance import assert_as_accurate
from torch import Tensor

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float64]

# Sides of 1, primes, tall, wide, a batch; 63 to 65 lie around a tile, 130 has three tiles of which the last is partial.
SHAPES = [(1, 1), (1, 13), (13, 1), (16, 16), (5, 7), (63, 65), (130, 70), (20, 130), (64, 64), (2, 3, 17, 33)]

# Of a step whose polynomial, s (15 - 10 s^2 + 3 s^4) / 8, maps [0, 1] onto itself and meets 1 with a zero derivative.
STEP = (1.875, -1.25, 0.375)


def wide(x: Tensor) -> np.ndarray[Any, Any]:
    return x.numpy().astype(np.longdouble)


def truth(x: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(x.astype(np.float64))


def roundings(depth: int) -> float:
    """Roundings of a sum of `depth` products, relative to the sum of their absolute values.

    A step of the loop adds 16 products to the accumulator, in any order; a rounding is eps / 2.
    """
    return (16 + config.ceil_div(depth, 16)) / 2


def random_symmetric(*shape: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(*shape, shape[-1], dtype=dtype)
    return (x + x.mT) / 2


def polynomial_by_torch(x: Tensor, gram: Tensor, a: float, b: float, c: float) -> Tensor:
    return x @ (a * torch.eye(gram.shape[-1], dtype=x.dtype) + b * gram + c * (gram @ gram))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_symmetric_product_is_as_accurate_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    before = x.clone()
    value = kernels.symmetric_product(x)
    assert torch.equal(x, before), "the input changed"
    assert torch.equal(value, value.mT), "not symmetric to the last bit"
    exact = wide(x).swapaxes(-1, -2) @ wide(x)
    size = float((x.double().abs().mT @ x.double().abs()).max())
    assert_as_accurate(value, x.mT @ x, truth(exact), roundings=roundings(shape[-2]), scale=size)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_polynomial_is_as_accurate_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n = shape[-1]
    x, gram = torch.randn(shape, dtype=dtype), random_symmetric(*shape[:-2], n, dtype=dtype)
    before = x.clone(), gram.clone()
    value = kernels.polynomial(x, gram, *STEP)
    assert torch.equal(x, before[0])
    assert torch.equal(gram, before[1])
    a, b, c = STEP
    x_, g_ = wide(x), wide(gram)
    exact = x_ @ (a * np.eye(n, dtype=np.longdouble) + b * g_ + c * (g_ @ g_))
    size = abs(x_) @ (abs(a) * np.eye(n) + abs(b) * abs(g_) + abs(c) * (abs(g_) @ abs(g_)))
    # Two sums over n products, one inside the other, and two products and two sums in the epilogue.
    floor = 2 * roundings(n) + 2
    peer = polynomial_by_torch(x, gram, *STEP)
    assert_as_accurate(value, peer, truth(exact), roundings=floor, scale=float(size.max()))


def with_singular_values(m: int, n: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(matrix, u, v) with matrix = u diag(values) v^T, in float64."""
    u, _ = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))
    return u * values @ v.T, u, v


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 9), (70, 20), (20, 70)])
def test_the_iteration_reaches_the_polar_factor(shape: tuple[int, int], dtype: torch.dtype) -> None:
    steps = 8
    matrix, u, v = with_singular_values(*shape, torch.linspace(0.2, 1.0, min(shape), dtype=torch.float64))
    p = kernels.polar_iteration(matrix.to(dtype), [STEP] * steps)
    assert p.shape == shape
    assert p.dtype == dtype
    peer = matrix.to(dtype)
    for _ in range(steps):
        peer = polynomial_by_torch(peer, peer.T @ peer, *STEP)
    # The input is rounded, by eps / 2 of |M| = 1, and the polar factor moves by at most the distance over the smallest
    # singular value, 5 times as far. Later roundings of a step are at most sqrt(n) times those of its entries in norm,
    # grow by |p'| <= 1.875 a step and are undone where the singular values have arrived.
    n = min(shape)
    floor = (5 + steps * (2 * roundings(max(shape)) + 2)) * n**0.5
    assert_as_accurate(p, peer, u @ v.T, roundings=floor, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_iteration_composes_its_polynomials(dtype: torch.dtype) -> None:
    coefficients = [(3.0, -4.0, 1.5), (1.5, -0.5, 0.0), (2.0, -1.0, 0.25)]
    values = torch.linspace(0.05, 1.0, 10, dtype=torch.float64)
    matrix, u, v = with_singular_values(12, 10, values)
    matrix = matrix.to(dtype)
    for a, b, c in coefficients:
        values = values * (a + b * values**2 + c * values**4)
    p = kernels.polar_iteration(matrix, coefficients)
    # The derivatives of the three polynomials are at most 3, 1.5 and 2 in size, so an early error grows ninefold; the
    # errors of the steps are those of the polynomial, for sizes of at most (3 + 4 + 1.5) sqrt(10).
    floor = 9.0 * 8.5 * 10**0.5 * (1 + 3 * (2 * roundings(12) + 2))
    assert_as_accurate(p, p, u * values @ v.T, roundings=floor, c=0.0, scale=1.0)


def test_singular_values_of_zero_stay_zero() -> None:
    values = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    matrix, u, v = with_singular_values(30, 8, values)
    p = kernels.polar_iteration(matrix, [STEP] * 9)
    # Rounding leaves singular values of about eps, which a step multiplies by 1.875.
    torch.testing.assert_close(p, u * (values > 0) @ v.T, rtol=0, atol=1e-12)
    assert not kernels.polar_iteration(torch.zeros(5, 3), [STEP] * 2).any()


def test_no_step_is_a_copy() -> None:
    m = torch.randn(4, 6).T
    p = kernels.polar_iteration(m, [])
    assert torch.equal(p, m)
    assert p.data_ptr() != m.data_ptr()


def test_a_wide_matrix_is_the_transpose_of_a_tall_one() -> None:
    matrix, _, _ = with_singular_values(33, 18, torch.linspace(0.2, 1.0, 18, dtype=torch.float64))
    before = matrix.clone()
    tall, flat = kernels.polar_iteration(matrix, [STEP] * 3), kernels.polar_iteration(matrix.T, [STEP] * 3)
    assert torch.equal(tall, flat.T)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:1, :1].expand(x.shape),
    ],
    ids=["transposed", "sliced", "unaligned", "channels_last", "expanded"],
)
def test_strides_change_no_bit(view: Any) -> None:
    x = view(torch.randn(2, 3, 20, 17))
    gram = kernels.symmetric_product(x)
    assert torch.equal(gram, kernels.symmetric_product(x.contiguous()))
    strided = view(random_symmetric(2, 3, 17, dtype=torch.float32))
    assert torch.equal(kernels.polynomial(x, gram, *STEP), kernels.polynomial(x.contiguous(), gram, *STEP))
    assert torch.equal(kernels.polynomial(x, strided, *STEP), kernels.polynomial(x, strided.contiguous(), *STEP))
    assert torch.equal(kernels.polar_iteration(x, [STEP]), kernels.polar_iteration(x.contiguous(), [STEP]))


def test_a_batch_equals_its_members() -> None:
    x = torch.randn(3, 70, 66) / 20
    together = kernels.polar_iteration(x, [STEP] * 2)
    for matrix, p in zip(x, together, strict=True):
        assert torch.equal(kernels.polar_iteration(matrix, [STEP] * 2), p)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_stays_in_its_matrix(bad: float) -> None:
    x = torch.randn(3, 20, 17)
    x[1, 3, 4] = bad
    assert kernels.symmetric_product(x).isfinite().all(-1).all(-1).tolist() == [True, False, True]
    assert kernels.polar_iteration(x / 100, [STEP]).isfinite().all(-1).all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 4, 4), (2, 0, 5), (0, 0)])
def test_empty_matrices(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    gram = kernels.symmetric_product(x)
    assert torch.equal(gram, x.mT @ x)
    assert kernels.polynomial(x, gram, *STEP).shape == shape
    assert kernels.polar_iteration(x, [STEP] * 2).shape == shape


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(batch: int, m: int, n: int, transposed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(m * 41 + n)
    x = torch.randn(batch, n, m, dtype=dtype).mT if transposed else torch.randn(batch, m, n, dtype=dtype)
    gram = kernels.symmetric_product(x)
    size = float((x.double().abs().mT @ x.double().abs()).max())
    exact = truth(wide(x).swapaxes(-1, -2) @ wide(x))
    assert_as_accurate(gram, x.mT @ x, exact, roundings=roundings(m), scale=size)
    assert torch.equal(gram, gram.mT)


@triton.jit
def _places_kernel(index_ptr, i_ptr, j_ptr):
    index = tl.load(index_ptr + tl.program_id(0))
    i, j = kernels._triangle_place(index)
    tl.store(i_ptr + tl.program_id(0), i)
    tl.store(j_ptr + tl.program_id(0), j)


def test_the_places_of_the_triangle() -> None:
    rows, cols = np.tril_indices(20)
    # The first, the last but one and the last tile of large rows, where the square root is rounded.
    large = np.array([4095, 4096, 11585, 32767, 46000])
    rows = np.concatenate([rows, large, large, large])
    cols = np.concatenate([cols, large * 0, large - 1, large])
    index = torch.from_numpy(rows * (rows + 1) // 2 + cols).to(torch.int32)
    i, j = torch.empty_like(index), torch.empty_like(index)
    _places_kernel[(len(index),)](index, i, j)
    assert i.tolist() == rows.tolist()
    assert j.tolist() == cols.tolist()


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_symmetric_products_take_half_of_the_programs(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *_, PRECISION, **__: launches.append((self.name, grid, PRECISION))

    monkeypatch.setattr(kernels, "_matrix_sqrt_gram_kernel", Recorder("gram"))
    monkeypatch.setattr(kernels, "_matrix_sqrt_product_kernel", Recorder("product"))
    kernels.polar_iteration(torch.empty(2048, 2048), [STEP], precision=precision)
    half, full = 32 * 33 // 2, 16 * 16  # of tiles of 64 and of 128
    assert launches == [("gram", (half,), precision), ("gram", (half,), precision), ("product", (full,), precision)]


def test_arguments_that_do_not_fit() -> None:
    x = torch.randn(4, 6)
    gram = x.T @ x
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        kernels.symmetric_product(x[0])
    with pytest.raises(TypeError, match=r"torch\.bfloat16"):
        kernels.symmetric_product(x.bfloat16())
    with pytest.raises(TypeError, match=r"m must be .* torch\.complex64"):
        kernels.polar_iteration(x + 1j, [STEP])
    with pytest.raises(ValueError, match=r"one of ieee, tf32x3, got 'tf32'"):
        kernels.symmetric_product(x, precision="tf32")
    with pytest.raises(ValueError, match=r"tf32x3' needs float32 on an NVIDIA GPU, got torch\.float64"):
        kernels.polar_iteration(x.double(), [STEP], precision="tf32x3")
    with pytest.raises(ValueError, match=r"gram must be torch\.float32 \[6, 6\] on cpu"):
        kernels.polynomial(x, gram.double(), *STEP)
    with pytest.raises(ValueError, match="gram must be"):
        kernels.polynomial(x.T, gram, *STEP)
    with pytest.raises(ValueError, match="32-bit"):
        kernels.symmetric_product(torch.empty(4, 1 << 27, device="meta").T)
    with pytest.raises(ValueError, match="32-bit"):
        kernels.polar_iteration(torch.empty(20, 1 << 27, device="meta"), [STEP])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("batch", [1, 5000])
@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (16, 16), (64, 65), (2048, 2048), (4096, 4096), (100000, 64)])
def test_launch_shapes(shape: tuple[int, int], batch: int, itemsize: int, symmetric: bool) -> None:
    m, n = (shape[1], shape[1]) if symmetric else shape
    tile = config.product_tile(m, n, batch, itemsize, symmetric)
    assert tile.block & (tile.block - 1) == 0, "tiles have sides of powers of 2"
    assert tile.block >= 16, "the smallest side of a matrix product in Triton"
    assert tile.block < 2 * max(m, n, 16), "a tile that is mostly outside"
    words = tile.block**2 // (32 * tile.num_warps) * (itemsize // 4) * (2 if symmetric else 1)
    assert words <= 128, "a tile, and its mirror image, take at most half of the registers of a thread"
    assert 2 * 2 * tile.block * tile.block_k * itemsize <= 64 << 10, "two buffers of both operands"
