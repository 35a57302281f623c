"""What covariances of several blocks take: the same as PyTorch's functions of the whole matrix."""

import math
import sys

import pytest
import torch
from torch import Tensor

from lipgan.linalg import covariance_factor
from lipgan.linalg.covariance_factor import BLOCK, factorize, permuted
from lipgan.linalg.trace_sqrt_product import trace_sqrt_product_info

# `lipgan.linalg` has a function of this name.
trace_module = sys.modules["lipgan.linalg.trace_sqrt_product"]

EPS = torch.finfo(torch.float64).eps

# Of several blocks, the last of them not full, and of one row.
SIZES = [BLOCK, BLOCK + 1, 2 * BLOCK + 50]


def covariance(d: int, seed: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * d, d, generator=generator, dtype=torch.float64)[:rank]
    # Columns of different sizes in no order, so that pivots move rows.
    x = x * torch.rand(d, generator=generator, dtype=torch.float64).add(0.1)
    s = x.mT @ x / len(x)
    return 0.5 * (s + s.mT)


def assert_lower(found: Tensor, expected: Tensor) -> None:
    size = float(expected.abs().max())
    assert torch.allclose(found.tril(), expected.tril(), rtol=0, atol=16 * math.sqrt(len(expected)) * EPS * size)


@pytest.mark.parametrize("d", SIZES)
def test_cholesky_by_blocks(d: int) -> None:
    s = covariance(d, 0)
    factor, info = covariance_factor._cholesky(s)
    assert int(info) == 0
    assert torch.equal(factor, factor.tril()), "nothing is left above the diagonal"
    assert bool((factor.diagonal() > 0).all())
    assert_lower(factor @ factor.mT, s)
    assert_lower(factor, torch.linalg.cholesky(s))


@pytest.mark.parametrize("row", [3, BLOCK + 5, 2 * BLOCK + 49])
def test_cholesky_fails_in_any_block(row: int) -> None:
    s = torch.eye(2 * BLOCK + 50, dtype=torch.float64)  # the other blocks have factors
    s[row, row] = -1.0
    assert int(covariance_factor._cholesky(s)[1]) != 0
    assert covariance_factor.definite_factor(s) is None


def test_a_matrix_is_permuted() -> None:
    s = covariance(70, 0) + torch.arange(70, dtype=torch.float64)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permuted(s, order), s[order][:, order])


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("kind", ["cholesky", "pivoted", "eigh"])
def test_congruence_by_blocks(d: int, kind: str) -> None:
    s1 = covariance(d, 0, d * 3 // 4 if kind == "pivoted" else None)
    s2 = covariance(d, 1)
    factor = factorize(s1, method="eigh" if kind == "eigh" else "cholesky")
    assert factor.triangular is (kind == "cholesky")
    assert (factor.order is not None) is (kind == "pivoted")
    gram, sizes = trace_module._congruence(factor, s2)
    left = factor.matrix
    assert_lower(gram, left.mT @ s2 @ left)
    assert torch.allclose(sizes, (left.square() * s2.diagonal()[:, None]).sum(0), rtol=1e-13)


def test_what_a_pivoted_factor_leaves() -> None:
    """It is seen wherever it is: in the rows of the factor, and in those below."""
    d, rank = 2 * BLOCK + 50, 250
    generator = torch.Generator().manual_seed(0)
    lower = torch.randn(d, rank, generator=generator, dtype=torch.float64).tril()
    rest = torch.zeros(d, d, dtype=torch.float64)
    for row, column, value in ((10, 3, 1.0), (300, 20, -2.0), (400, 390, 3.0), (420, 420, -4.0), (100, 100, 0.5)):
        rest[row, column] = rest[column, row] = value
    largest, squares, clipped = covariance_factor._rest(lower @ lower.mT + rest, lower)
    assert largest == pytest.approx(4.0)
    assert squares == pytest.approx(float(rest.square().sum()))
    assert clipped == pytest.approx(4.5)


def test_a_pivoted_factor_is_that_of_its_covariance() -> None:
    s = covariance(400, 0, 250)
    factor = factorize(s)
    assert factor.order is not None
    assert factor.rank == 250
    lower = factor.matrix[factor.order]
    assert torch.equal(lower, lower.tril())
    assert float((factor.matrix @ factor.matrix.mT - s).abs().max()) <= 1e-13 * float(s.abs().max())
    assert float(torch.linalg.matrix_norm(factor.matrix @ factor.matrix.mT - s)) <= factor.error


@pytest.mark.parametrize("ranks", [(None, None), (250, None), (250, 200)])
def test_routes_agree_beyond_a_block(ranks: tuple[int | None, int | None]) -> None:
    s1, s2 = covariance(400, 0, ranks[0]), covariance(400, 1, ranks[1])
    expected, exact = trace_sqrt_product_info(s1, s2, method="svd")
    # The order of the coordinates is nothing that a trace depends on; in this one the matrix is put in order first.
    order = s1.diagonal().argsort()
    for a, b in ((s1, s2), (permuted(s1, order), permuted(s2, order))):
        trace, info = trace_sqrt_product_info(a, b)
        assert info.route == "cholesky"
        assert abs(float(trace) - float(expected)) <= info.error_bound + exact.error_bound
        assert abs(float(trace) - float(expected)) <= 1e-12 * float(expected)


def test_a_matrix_is_put_in_order() -> None:
    """Of which only the lower triangle is known."""
    d = BLOCK + 30
    s = covariance(d, 0)
    scales = torch.exp2(-(torch.arange(d - 1, -1, -1) // 20).double())  # powers of 2: s stays exactly symmetric
    s = s * scales * scales[:, None]
    gram, order = trace_module._in_descending_order(s.tril() + torch.full_like(s, math.nan).triu(1))
    assert order is not None
    assert bool((gram.diagonal().diff() <= 0).all())
    assert torch.equal(gram, s[order][:, order])
