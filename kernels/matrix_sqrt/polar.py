"""The polar factor of a matrix by matrix products alone, for a batch of matrices.

A step takes X [m, n] to X (a I + b G + c G^2) with G = X^T X: an odd polynomial of every singular value, so that a
sequence of them drives the singular values to 1. It is three launches:

  G  = X^T X                   _matrix_sqrt_gram_kernel, half of the tiles
  Q  = a I + b G + c G^T G     the same kernel on G, the polynomial in its epilogue
  X' = X Q                     _matrix_sqrt_product_kernel

The first two results are symmetric, to the last bit: a tile below the diagonal is stored twice, as it is and
transposed. For a square X a step is 4 n^3 operations, where three plain products are 6 n^3.

PRECISION names what a product does with its operands: "ieee" multiplies float32 and float64 as they are; "tf32x3"
(float32, NVIDIA) splits each float32 into two TF32 numbers and adds three products of those. Triton's default, one
TF32 product, would leave 10 bits of a metric and is not offered. The interpreter multiplies in float32 for either.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..common import materialized, product_tile

PRECISIONS = ("ieee", "tf32x3")


@triton.jit
def _triangle_place(index):
    """(i, j) with i >= j of the tile `index`, counted along the rows of the lower triangle."""
    # The index is i (i + 1) / 2 + j. The root of twice that lies between i and i + 3/2, so at worst one row too far.
    i = tl.sqrt(2.0 * index.to(tl.float32)).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    return i, index - i * (i + 1) // 2


@triton.jit
def _matrix_sqrt_gram_kernel(
    x,  # T [batch, m, n], any strides
    a: tl.float32,  # a, b and c only if POLYNOMIAL
    b: tl.float32,
    c: tl.float32,
    a_wide: tl.float64,  # the same, for float64
    b_wide: tl.float64,
    c_wide: tl.float64,
    out,  # T [batch, n, n], contiguous
    m,
    n,
    tiles,  # of the lower triangle of one matrix
    batch_stride,
    row_stride,
    col_stride,
    POLYNOMIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = X^T X or, if POLYNOMIAL, out = a I + b X + c X^T X for a symmetric X; out is exactly symmetric.

    A program computes one tile of the lower triangle and stores it and its mirror image. Of a tile on the diagonal
    it keeps the lower half, because the three products of tf32x3 are not symmetric in their operands.

    Source: the step of Polar Express (Amsel et al. 2025, "The Polar Express: Optimal Matrix Sign Methods and Their
    Application to the Muon Algorithm", Algorithm 1), without the half that symmetry gives.
    """
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile_row, tile_col = _triangle_place(tl.program_id(0) % tiles)
    row, col = tile_row * BLOCK, tile_col * BLOCK
    x += matrix * batch_stride
    out += matrix * n * n
    value = product_tile(
        x, x, row, col, n, n, m, col_stride, row_stride, row_stride, col_stride, PRECISION, BLOCK, BLOCK_K
    )
    index = tl.arange(0, BLOCK)
    rows, cols = (row + index)[:, None], (col + index)[None, :]
    inside = (rows < n) & (cols < n)
    if POLYNOMIAL:
        corner = x + row.to(tl.int64) * row_stride + col.to(tl.int64) * col_stride
        x_tile = tl.load(corner + (index[:, None] * row_stride + index[None, :] * col_stride), mask=inside, other=0.0)
        if x.dtype.element_ty == tl.float64:
            value = tl.full([], b_wide, tl.float64) * x_tile + tl.full([], c_wide, tl.float64) * value
            value += tl.where(rows == cols, tl.full([], a_wide, tl.float64), 0.0)
        else:
            # Arguments of the width of the arithmetic: a conversion would take registers through the whole product.
            value = tl.full([], b, tl.float32) * x_tile + tl.full([], c, tl.float32) * value
            value += tl.where(rows == cols, tl.full([], a, tl.float32), 0.0)
    corner = out + row.to(tl.int64) * n + col
    offsets = index[:, None] * n + index[None, :]
    image = out + col.to(tl.int64) * n + row
    if tile_row == tile_col:
        image_offsets = index[None, :] * n + index[:, None]
        tl.store(corner + offsets, value, mask=inside & (rows >= cols))
        tl.store(image + image_offsets, value, mask=inside & (rows > cols))
    else:
        tl.store(corner + offsets, value, mask=inside)
        # Transposed in the program, so that the stores run along the rows of the image.
        tl.store(image + offsets, tl.trans(value), mask=((col + index)[:, None] < n) & ((row + index)[None, :] < n))


@triton.jit
def _matrix_sqrt_product_kernel(
    x,  # T [batch, m, n], any strides
    q,  # T [batch, n, n], contiguous
    out,  # T [batch, m, n], contiguous
    m,
    n,
    tiles,  # of one result
    batch_stride,
    row_stride,
    col_stride,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = X Q, one tile a program.

    Source: as _matrix_sqrt_gram_kernel.
    """
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    column_tiles = tl.cdiv(n, BLOCK)
    row, col = tile // column_tiles * BLOCK, tile % column_tiles * BLOCK
    x += matrix * batch_stride
    q += matrix * n * n
    value = product_tile(x, q, row, col, m, n, n, row_stride, col_stride, n, 1, PRECISION, BLOCK, BLOCK_K)
    index = tl.arange(0, BLOCK)
    corner = out + (matrix * m + row) * n + col
    inside = (row + index < m)[:, None] & (col + index < n)[None, :]
    tl.store(corner + (index[:, None] * n + index[None, :]), value, mask=inside)


def _check(name: str, x: Tensor, precision: str) -> None:
    if x.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "tf32x3" and (x.dtype != torch.float32 or torch.version.hip):
        raise ValueError(f"precision 'tf32x3' needs float32 on an NVIDIA GPU, got {x.dtype}")


def _as_batch(x: Tensor) -> Tensor:
    """[batch, m, n]; a view where the strides allow one."""
    return materialized(x).reshape(x.shape[:-2].numel(), *x.shape[-2:])


def _check_strides(x: Tensor, tile: config.ProductTile) -> None:
    if max(x.stride()[1:]) * tile.block >= 1 << 31:
        raise ValueError(f"a matrix has strides {x.stride()}, which are too large: offsets within a tile are 32-bit")


def _launch_gram(x: Tensor, coefficients: tuple[float, float, float] | None, out: Tensor, precision: str) -> None:
    batch, m, n = x.shape
    tile = config.product_tile(n, n, batch, x.element_size(), symmetric=True)
    _check_strides(x, tile)
    side = config.ceil_div(n, tile.block)
    tiles = side * (side + 1) // 2
    if batch * tiles == 0:
        return
    # Annotated float arguments arrive in the dtype of the annotation, and are not compile-time constants.
    a, b, c = (0.0, 0.0, 0.0) if coefficients is None else map(float, coefficients)
    with torch.cuda.device_of(x):
        _matrix_sqrt_gram_kernel[(batch * tiles,)](
            x, a, b, c, a, b, c, out, m, n, tiles, *x.stride(),
            POLYNOMIAL=coefficients is not None, PRECISION=precision, **tile.blocks, **tile.options,
        )  # fmt: skip


def _launch_product(x: Tensor, q: Tensor, out: Tensor, precision: str) -> None:
    batch, m, n = x.shape
    tile = config.product_tile(m, n, batch, x.element_size(), symmetric=False)
    _check_strides(x, tile)
    tiles = config.ceil_div(m, tile.block) * config.ceil_div(n, tile.block)
    if batch * tiles == 0:
        return
    with torch.cuda.device_of(x):
        _matrix_sqrt_product_kernel[(batch * tiles,)](
            x, q, out, m, n, tiles, *x.stride(), PRECISION=precision, **tile.blocks, **tile.options
        )


def symmetric_product(x: Tensor, *, precision: str = "ieee") -> Tensor:
    """X^T X, computed by half of its tiles.

    Args:
        x: [..., m, n], float32 or float64, any strides.
        precision: "ieee", or "tf32x3" for float32 on an NVIDIA GPU.

    Returns:
        [..., n, n], contiguous, symmetric to the last bit.

    Raises:
        ValueError: fewer than 2 dimensions, an unknown precision, or "tf32x3" where it cannot serve.
        TypeError: another dtype.
    """
    _check("x", x, precision)
    n = x.shape[-1]
    out = x.new_empty(*x.shape[:-2], n, n)
    _launch_gram(_as_batch(x), None, _as_batch(out), precision)
    return out


def polynomial(x: Tensor, gram: Tensor, a: float, b: float, c: float, *, precision: str = "ieee") -> Tensor:
    """X (a I + b G + c G^2).

    Args:
        x: [..., m, n], float32 or float64, any strides.
        gram: G [..., n, n], symmetric (not checked: of G^2, G^T G is computed), in the dtype of `x`.
        a: coefficient of X.
        b: coefficient of X G.
        c: coefficient of X G^2.
        precision: as in symmetric_product.

    Returns:
        [..., m, n], contiguous.

    Raises:
        As symmetric_product; ValueError for a `gram` whose shape, dtype or device does not fit.
    """
    _check("x", x, precision)
    n = x.shape[-1]
    if gram.shape != (*x.shape[:-2], n, n) or gram.dtype != x.dtype or gram.device != x.device:
        raise ValueError(
            f"gram must be {x.dtype} {[*x.shape[:-2], n, n]} on {x.device}, "
            f"got {gram.dtype} {list(gram.shape)} on {gram.device}"
        )
    q, out = gram.new_empty(gram.shape), x.new_empty(x.shape)
    _launch_gram(_as_batch(gram), (a, b, c), _as_batch(q), precision)
    _launch_product(_as_batch(x), _as_batch(q), _as_batch(out), precision)
    return out


def polar_iteration(
    m: Tensor, coefficients: Sequence[tuple[float, float, float]], *, precision: str = "ieee"
) -> Tensor:
    """The composition of odd polynomials p_k(s) = a_k s + b_k s^3 + c_k s^5 of the singular values of M.

    M = U diag(s) V^T becomes U diag(p_K(... p_1(s))) V^T, which nears the polar factor U V^T where the polynomials
    near 1. The caller scales M such that its singular values lie where the polynomials were made for.

    Args:
        m: [..., rows, columns], float32 or float64, any strides; not changed.
        coefficients: (a, b, c) of each step; none returns a copy of M.
        precision: as in symmetric_product.

    Returns:
        [..., rows, columns].

    Raises:
        As symmetric_product.
    """
    _check("m", m, precision)
    # The Gram matrix is taken of the shorter side.
    wide = m.shape[-2] < m.shape[-1]
    x = _as_batch(m.mT if wide else m)
    if not coefficients:
        return m.clone(memory_format=torch.contiguous_format)
    batch, _, n = x.shape
    gram, q = x.new_empty(2, batch, n, n)
    # Two results take turns, so that M itself stays as it is.
    results = x.new_empty(min(len(coefficients), 2), *x.shape)
    for step, row in enumerate(coefficients):
        _launch_gram(x, None, gram, precision)
        _launch_gram(gram, row, q, precision)
        _launch_product(x, q, results[step % 2], precision)
        x = results[step % 2]
    return x.mT.reshape(m.shape) if wide else x.reshape(m.shape)
