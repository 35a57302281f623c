"""The op ``symmetrize``: both forms see the same in a matrix, and refuse it in the same words."""

import math

import pytest
import torch
from torch import Tensor

import lipgan
from lipgan.ops import _backend
from lipgan.ops.symmetrize import symmetrize

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(_backend.native() is None, reason="lipgan._C was not built"),
]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Around a tile of 32 rows, and the width of a vector.
SIZES = [1, 2, 7, 31, 32, 33, 65, 130]


def matrix(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + x.mT).to(dtype)


def off(a: Tensor, row: int, column: int, share: float) -> Tensor:
    """With one entry that is off by that share of the largest."""
    a = a.clone()
    a[row, column] += share * a.abs().max()
    return a


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_the_forms_agree(n: int, dtype: torch.dtype) -> None:
    shares = {torch.float64: 1e-9, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
    exact = matrix(n, dtype)
    rounded = exact if n == 1 else off(exact, n - 1, 0, shares[dtype])
    for a, expected in ((exact, True), (rounded, n == 1)):
        symmetric, equal = symmetrize("a", a, "native")
        other, also_equal = symmetrize("a", a, "reference")
        assert equal is also_equal is expected
        assert symmetric.dtype == torch.float64
        assert torch.equal(symmetric, other)
        assert torch.equal(symmetric, symmetric.mT)


def test_a_symmetric_matrix_is_not_copied() -> None:
    a = matrix(40)
    assert symmetrize("a", a)[0] is a


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_entry_is_seen(threads: int) -> None:
    """Where one entry of a pair is off, in each tile of two matrices whose last tiles are not full."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    module = _backend.serving_native()
    module.insist_on_threads(True)
    try:
        for n in (33, 400):
            a = matrix(n)
            for row in range(0, n, 31):
                for column in range(0, n, 29):
                    if row == column:
                        continue
                    given = off(a, row, column, 1e-8)
                    largest, difference, symmetric = module.symmetrize(given, threads)
                    assert largest == given.abs().max()
                    assert difference == (given - given.mT).abs().max()
                    assert torch.equal(symmetric, 0.5 * (given + given.mT))
    finally:
        module.insist_on_threads(False)
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused(value: float, dtype: torch.dtype) -> None:
    for place in ((0, 0), (69, 3), (3, 69)):
        a = matrix(70, dtype)
        a[place] = value
        for backend in ("native", "reference"):
            with pytest.raises(ValueError, match="sigma must be finite, got 1 entries that are NaN or infinite"):
                symmetrize("sigma", a, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_symmetric_is_refused(dtype: torch.dtype) -> None:
    a = off(matrix(40, dtype), 5, 30, 0.5)
    messages = set()
    for backend in ("native", "reference"):
        with pytest.raises(ValueError, match=r"sigma must be symmetric, got .*e-01 max") as error:
            symmetrize("sigma", a, backend)
        messages.add(str(error.value))
    assert len(messages) == 1


def test_numbers_at_the_ends_of_the_range() -> None:
    for size in (1.7e308, 5e-324):
        a = torch.full((3, 3), size, dtype=torch.float64)
        a[0, 1] = -size
        a[1, 0] = -size
        assert symmetrize("a", a, "native") == (a, True)
        a[1, 0] = size
        for backend in ("native", "reference"):
            with pytest.raises(ValueError, match="must be symmetric"):
                symmetrize("a", a, backend)
    assert symmetrize("a", torch.zeros(0, 0, dtype=torch.float64), "native")[1]


def test_other_strides() -> None:
    a = off(matrix(50), 3, 4, 1e-9)
    expected = symmetrize("a", a, "reference")[0]
    wide = torch.zeros(50, 100, dtype=torch.float64)
    wide[:, ::2] = a
    for given in (a.mT.contiguous().mT, wide[:, ::2], a.neg().mT.contiguous().mT.neg()):
        assert torch.equal(symmetrize("a", given, "native")[0], expected)


def test_a_backend_without_a_form_leaves_it_to_the_reference() -> None:
    a = off(matrix(20), 3, 4, 1e-9)
    with lipgan.use_backend("triton"):
        assert not _backend.serves("symmetrize", "cpu")
        assert torch.equal(symmetrize("a", a)[0], symmetrize("a", a, "native")[0])
