"""Square roots of many small symmetric matrices by their eigenvalues, which derivatives take too: a program a matrix.

The eigenvalues are those of Jacobi's method: rotations of pairs of rows and columns (i, p) take the entry between them
to 0, until all are. In a round every row has one partner, so that all rotations of a round are one step of the whole
matrix, which stays in the registers of a program:

  B = A C - A[:, p] S,   A' = C B - S B[p, :],   V' = V C - V[:, p] S,   C = diag(c), S = diag(s)

Rows pair as players of a tournament do: N - 1 rounds of N / 2 pairs, with N = n or n + 1, in which each meets every
other once. A sweep are all rounds; the last one is that in which no entry was worth a rotation.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..common import divide, materialized, square_root

# A sweep takes 7 to 9 for most matrices, up to 20 where eigenvalues span all digits of float64.
SWEEPS = 40

# The largest n: two matrices of this size fit the registers of a program in float64.
LIMIT = 64


@triton.jit
def _power_of_four(largest):
    """(scale, 1 / scale): a power of 4 within a factor of 4 of a number, or nearest to it where both are normal."""
    if largest.dtype == tl.float64:
        exponent = ((largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022
        exponent = tl.minimum(tl.maximum(exponent & -2, -1018), 1022)
        scale = ((1023 + exponent) << 52).to(tl.float64, bitcast=True)
        inverse = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
        exponent = tl.minimum(tl.maximum(exponent & -2, -122), 126)
        scale = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
        inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def _diagonalize(a, largest, size, BLOCK: tl.constexpr, EPSILON: tl.constexpr, SWEEPS: tl.constexpr):
    """Eigenvalues [BLOCK] and eigenvectors, as columns, of a symmetric a [BLOCK, BLOCK], whose rows from `size` are 0.

    Also the number of rotations of the last sweep: 0, unless it has not converged. What a round needs stands in here:
    each call of a function takes the interpreter longer than all of its arithmetic.

    Source: Golub and Van Loan, "Matrix Computations", 8.5 (rotations, rounds); Rutishauser, "The Jacobi method for real
    symmetric matrices" (1966): eigenvalues apart from the matrix, and rotations by s and s / (1 + c), which round less.
    """
    index = tl.arange(0, BLOCK)
    rows, cols = index[:, None], index[None, :]
    one = tl.full([], 1.0, a.dtype)
    v = tl.where(rows == cols, one, 0.0)
    d = tl.sum(tl.where(rows == cols, a, 0.0), 1)
    circle = size - 1
    turned = tl.full([], 1, tl.int32)
    sweep = tl.full([], 0, tl.int32)
    while (turned > 0) & (sweep < SWEEPS):
        counts = tl.zeros([BLOCK], tl.int32)
        for round in range(0, circle):
            # The last of an even number of players stays, the others pass by in a circle: i meets 2 round - i. Rows
            # beyond `size` meet any, and do nothing.
            partner = (2 * round - index + circle * index) % circle
            partner = tl.where(partner == index, circle, partner)
            partner = tl.where(index == circle, round, partner)
            entry = tl.sum(tl.where(cols == partner[:, None], a, 0.0), 1)
            lower = index < partner
            # Both of a pair take the entry of the upper triangle, and so opposite angles, to the last bit.
            entry = tl.where(lower, entry, tl.gather(entry, partner, 0))
            turn = (tl.abs(entry) > EPSILON * largest) & (index < size)
            entry = tl.where(turn, entry, 0.0)
            # The smaller angle: tan = sign(x) y / (|x| + (x^2 + y^2)^(1/2)), x between the eigenvalues, y = 2 entry.
            x = tl.gather(d, partner, 0) - d
            y = tl.where((x > 0) | ((x == 0) & lower), 2.0 * entry, -2.0 * entry)
            square = tl.where(turn, x * x + y * y, one)
            if a.dtype == tl.float64:
                tangent = y / (tl.abs(x) + tl.sqrt(square))
                secant = tl.sqrt(tangent * tangent + 1.0)
                sine = tangent / secant
                ratio = tangent / (secant + 1.0)
            else:
                tangent = tl.div_rn(y, tl.abs(x) + tl.sqrt_rn(square))
                secant = tl.sqrt_rn(tangent * tangent + 1.0)
                sine = tl.div_rn(tangent, secant)
                ratio = tl.div_rn(tangent, secant + 1.0)
            d -= tangent * entry

            row_partners = tl.broadcast_to(partner[:, None], [BLOCK, BLOCK])
            column_partners = tl.broadcast_to(partner[None, :], [BLOCK, BLOCK])
            # In this order: with the rows first, ptxas spills registers in float64.
            a -= sine[None, :] * (tl.gather(a, column_partners, 1) + ratio[None, :] * a)
            v -= sine[None, :] * (tl.gather(v, column_partners, 1) + ratio[None, :] * v)
            a -= sine[:, None] * (tl.gather(a, row_partners, 0) + ratio[:, None] * a)
            a = tl.where(cols == tl.where(turn, partner, -1)[:, None], 0.0, a)
            counts += turn.to(tl.int32)
        turned = tl.sum(counts, 0)
        sweep += 1
    return d, v, turned


@triton.jit
def _matrix_sqrt_root_kernel(
    a,  # T [count, n, n], any strides
    eps: tl.float32,
    share: tl.float32,  # of the largest root, below which a root is not resolved
    eps_wide: tl.float64,  # the same, for float64
    share_wide: tl.float64,
    root,  # T [count, n, n], contiguous
    roots,  # T [count, n]; this and the next only if SPECTRUM
    vectors,  # T [count, n, n], as columns
    seen,  # T [5, count]
    count,
    n,
    batch_stride,
    row_stride,
    col_stride,
    INVERSE: tl.constexpr,
    SPECTRUM: tl.constexpr,
    EPSILON: tl.constexpr,  # of T
    SWEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """root = (a + eps I)^(1/2), or its inverse, of the symmetric part of a, as reference.matrix_sqrt_fwd.

    ``seen`` are, of each matrix: max|a|, NaN where an entry is not finite; max|a - a^T|; its smallest and its largest
    eigenvalue; and the number of rotations that the last sweep still had to make. A matrix that is not finite counts as
    0 in all others.
    """
    T: tl.constexpr = a.dtype.element_ty
    matrix = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    rows, cols = index[:, None], index[None, :]
    inside = (rows < n) & (cols < n)
    x = tl.load(a + matrix * batch_stride + (rows * row_stride + cols * col_stride), mask=inside, other=0.0)
    finite = tl.min(tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1), 0) > 0
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    x = tl.where(finite, x, 0.0)
    y = tl.trans(x)
    difference = tl.max(tl.max(tl.abs(x - y), 1), 0)
    tl.store(seen + matrix, tl.where(finite, largest, float("nan")))
    tl.store(seen + count + matrix, difference)

    largest = tl.where(finite, largest, 0.0)
    scale, inverse_scale = _power_of_four(largest)
    # Each half by itself: their sum may leave the range.
    x = (0.5 * x + 0.5 * y) * inverse_scale
    d, v, turned = _diagonalize(x, largest * inverse_scale, n + n % 2, BLOCK, EPSILON, SWEEPS)
    real = index < n
    low = tl.min(tl.where(real, d, float("inf")), 0) * scale
    high = tl.max(tl.where(real, d, float("-inf")), 0) * scale
    tl.store(seen + 2 * count + matrix, low)
    tl.store(seen + 3 * count + matrix, high)
    tl.store(seen + 4 * count + matrix, turned.to(T))

    if a.dtype.element_ty == tl.float64:
        added, smallest = tl.full([], eps_wide, tl.float64), tl.full([], share_wide, tl.float64)
    else:
        added, smallest = tl.full([], eps, tl.float32), tl.full([], share, tl.float32)
    values = d * scale + added
    values = square_root(tl.where(real & (values > 0), values, 0.0))
    if SPECTRUM:
        kept = tl.where(values > smallest * tl.max(values, 0), values, 0.0)
        tl.store(roots + matrix * n + index, kept, mask=real)
        tl.store(vectors + matrix * n * n + (rows * n + cols), v, mask=inside)
    if INVERSE:
        values = tl.where(real, divide(tl.full([], 1.0, T), tl.where(real, values, 1.0)), 0.0)
    # Column by column, which takes few registers, and with as much of the factor on either side: symmetric to the last
    # bit.
    v *= square_root(values)[None, :]
    product = tl.zeros([BLOCK, BLOCK], T)
    for k in range(0, n):
        column = tl.sum(tl.where(cols == k, v, 0.0), 1)
        product += column[:, None] * column[None, :]
    tl.store(root + matrix * n * n + (rows * n + cols), product, mask=inside)


def _as_batch(a: Tensor) -> Tensor:
    """[count, n, n] of what is [..., n, n]; a view where the strides allow one."""
    if a.dim() < 2 or a.shape[-1] != a.shape[-2] or a.shape[-1] > LIMIT:
        raise ValueError(f"a must be square matrices of up to {LIMIT} rows, got shape {tuple(a.shape)}")
    if a.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a must be float32 or float64, got {a.dtype}")
    batch = materialized(a).reshape(a.shape[:-2].numel(), *a.shape[-2:])
    # Offsets within a matrix are 32-bit.
    return batch if max(batch.stride()[1:]) * LIMIT < 1 << 31 else batch.contiguous()


def matrix_sqrt_fwd(
    a: Tensor, inverse: bool, eps: float, unit: float, spectrum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a + eps I)^(1/2), or its inverse, of the symmetric part of a: one launch.

    Args:
        a: [..., n, n], n at most 64, float32 or float64, any strides.
        inverse: whether the inverse is wanted.
        eps: what is added to the diagonal.
        unit: share of the largest eigenvalue below which one is not resolved.
        spectrum: whether the next two results are wanted.

    Returns:
        The root [..., n, n], symmetric to the last bit; the roots of the eigenvalues [..., n], 0 where not resolved,
        and the eigenvectors [..., n, n] as columns, both empty without `spectrum`; and seen [5, matrices]: max|a| (NaN
        where an entry is not finite), max|a - a^T|, the smallest and the largest eigenvalue, and a number that is
        positive where the eigenvalues have not converged.

    Raises:
        ValueError: matrices that are not square, or too large.
        TypeError: another dtype.
    """
    x = _as_batch(a)
    count, n, _ = x.shape
    root = a.new_empty(a.shape)
    size = n if spectrum else 0
    roots, vectors = a.new_empty(*a.shape[:-2], size), a.new_empty(*a.shape[:-2], size, size)
    seen = a.new_empty(5, count)
    if count * n == 0:
        return root, roots, vectors, seen
    share = math.sqrt(unit)
    tile = config.small_matrix_tile(n)
    with torch.cuda.device_of(x):
        _matrix_sqrt_root_kernel[(count,)](
            x, eps, share, eps, share, root, roots, vectors, seen, count, n, *x.stride(),
            INVERSE=inverse, SPECTRUM=spectrum, EPSILON=torch.finfo(x.dtype).eps, SWEEPS=SWEEPS, BLOCK=tile.block_h,
            **config.launch_options(tile.num_warps, registers=255),
        )  # fmt: skip
    return root, roots, vectors, seen
