"""The op matrix_sqrt: every method against exact roots, SciPy and a float64 truth; derivatives; bad input.

The bounds are derived in docs/numerics/matrix_sqrt.md.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipgan.linalg import inv_sqrtm, polar, sqrtm
from lipgan.ops import UnavailableError, _backend, use_backend
from lipgan.ops import matrix_sqrt as ops
from lipgan.reference import matrix_sqrt as reference

_C: Any = _backend.native()  # None where it was not built: its tests are skipped then

METHODS = ["eigh", "native", "newton-schulz"]
DTYPES = [torch.float64, torch.float32]
# Around the 4 rows of a block of eigenvectors, and up to the limit of the native kernel.
SIZES = [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 64]
SPECTRA = ["flat", "decaying", "clustered", "deficient", "one huge", "zero"]


pytestmark = pytest.mark.usefixtures("single_thread")


def spectrum(kind: str, n: int) -> Tensor:
    """Eigenvalues, the largest of which is 1 (or 0)."""
    k = torch.arange(n, dtype=torch.float64)
    return {
        "flat": 1 - 0.5 * k / n,
        "decaying": 10.0 ** (-16 * k / max(1, n - 1)),
        "clustered": torch.where(k < n / 2, 1.0, 0.25).double(),
        "deficient": torch.where(k < (n + 1) // 2, 1 - 0.5 * k / n, 0.0),
        "one huge": torch.where(k == 0, 1.0, 1e-8).double(),
        "zero": torch.zeros(n, dtype=torch.float64),
    }[kind]


def draw(n: int, kind: str = "flat", batch: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64))[0]
    return reference.symmetric_part((q * spectrum(kind, n)) @ q.mT)


def bound(a: Tensor) -> Tensor:
    """``min(e^(1/2), e / (2 l^(1/2)))`` with ``e = 4 n^(1/2) eps |a|`` and l the smallest eigenvalue."""
    if a.numel() == 0:
        return a.new_zeros(a.shape[:-2], dtype=torch.float64)
    values = torch.linalg.eigvalsh(a.double())
    e = reference.resolution(a.shape[-1], a.dtype) * values[..., -1].clamp_min(0)
    return torch.minimum(e.sqrt(), e / (2 * values[..., 0].clamp_min(1e-300).sqrt()))


def assert_is_root(root: Tensor, a: Tensor, truth: Tensor) -> None:
    """Within the documented bound, which the truth, itself rounded, may use up once more."""
    assert root.dtype == a.dtype
    assert root.shape == a.shape
    assert torch.equal(root, root.mT)
    if a.numel() == 0:
        return
    error = torch.linalg.matrix_norm(root.double() - truth, 2)
    rounding = torch.finfo(a.dtype).eps * torch.linalg.matrix_norm(truth, 2) * 4 * math.sqrt(a.shape[-1])
    assert (error <= 2 * bound(a) + rounding).all(), f"{error} exceeds {2 * bound(a) + rounding}"


def truth_of(a: Tensor) -> Tensor:
    """The root in float64, by LAPACK."""
    values, vectors = torch.linalg.eigh(a.double())
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def exact(n: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix of integers and its root, of integers too: both without a rounding."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randint(-3, 4, (n, rank), generator=generator).double()
    root = b @ b.mT
    return root @ root, root


# ---- the forward ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", SIZES)
def test_roots_of_integer_matrices(method: str, n: int) -> None:
    for rank in {1, (n + 1) // 2, n}:
        a, root = exact(n, rank)
        assert_is_root(sqrtm(a, method=method), a, root)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("method", METHODS)
def test_every_spectrum(method: str, kind: str, dtype: torch.dtype) -> None:
    for n in SIZES:
        a = draw(n, kind, (2,), seed=n).to(dtype)
        assert_is_root(sqrtm(a, method=method), a, truth_of(a))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_and_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for n in SIZES:
        # 17 matrices: groups of every number of lanes, the last of which is not full.
        a = torch.cat([draw(n, kind, (3,), seed=n) for kind in SPECTRA])[:17].to(dtype)
        root, roots, vectors = torch.ops.lipgan.matrix_sqrt_fwd(a, False, 0.0, "native", True, None)
        assert_is_root(root, a, truth_of(a))
        eye = torch.eye(n, dtype=dtype)
        unit = reference.resolution(n, dtype)
        # n rotations and reflections, each of which rounds like one product.
        assert float((vectors.mT @ vectors - eye).abs().max()) <= 2 * unit * math.sqrt(n)
        rebuilt = (vectors * roots.square().unsqueeze(-2)) @ vectors.mT
        size = torch.linalg.matrix_norm(a, 2)
        assert (torch.linalg.matrix_norm(rebuilt - a, 2) <= 4 * unit * size).all()
        assert torch.equal(roots, reference.resolved(roots))


@pytest.mark.backend("native")
def test_against_scipy() -> None:
    for n in (2, 5, 12):
        a = draw(n)
        for method in METHODS:
            theirs = scipy.linalg.sqrtm(a.numpy(force=True))
            assert np.abs(sqrtm(a, method=method).numpy(force=True) - theirs).max() < 1e-13
        inverse = np.linalg.inv(scipy.linalg.sqrtm(a.numpy(force=True)))
        assert np.abs(inv_sqrtm(a).numpy(force=True) - inverse).max() < 1e-13


@pytest.mark.backend("native")
def test_against_many_digits() -> None:
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(40):
        for seed, kind in enumerate(["flat", "clustered", "one huge"]):
            a = draw(5, kind, seed=seed)
            values, vectors = mpmath.eigsy(mpmath.matrix(a.tolist()))
            truth = vectors * mpmath.diag([mpmath.sqrt(value) for value in values]) * vectors.T
            truth = torch.tensor(np.array(truth.tolist(), dtype=float))
            for method in METHODS:
                assert_is_root(sqrtm(a, method=method), a, truth)


@pytest.mark.backend("native")
@given(
    n=st.integers(1, 64),
    kind=st.sampled_from(SPECTRA),
    batch=st.lists(st.integers(0, 5), max_size=2).map(tuple),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_spectrum_size_batch_and_scale(
    n: int, kind: str, batch: tuple[int, ...], dtype: torch.dtype, exponent: int, seed: int
) -> None:
    a = (draw(n, kind, batch, seed) * 10.0**exponent).to(dtype)
    for method in ("native", "eigh"):
        assert_is_root(sqrtm(a, method=method), a, truth_of(a))


@pytest.mark.parametrize("method", METHODS)
def test_inverse_root(method: str) -> None:
    for n in (1, 3, 8, 33):
        for eps in (0.0, 0.5):
            a = draw(n, "clustered", (2,))
            inverse = ops.root(a, inverse=True, eps=eps, method=method)
            eye = torch.eye(n, dtype=a.dtype)
            # Condition number at most 4, and n sums of n terms.
            assert float((inverse @ (a + eps * eye) @ inverse - eye).abs().max()) <= 16 * n * torch.finfo(a.dtype).eps
            assert torch.equal(inverse, inverse.mT)
    assert torch.equal(inv_sqrtm(draw(5), eps=0.5), ops.root(draw(5), inverse=True, eps=0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    a = draw(9).to(dtype)
    a = (a + a.mT) / 2
    assert torch.equal(sqrtm(a), sqrtm(a.float()).to(dtype))
    assert torch.equal(inv_sqrtm(a), inv_sqrtm(a.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["eigh", "native"])  # the squares of "newton-schulz" leave the range
def test_scales_at_the_ends_of_the_range(method: str, dtype: torch.dtype) -> None:
    a = draw(6).to(dtype)
    for exponent in (-120, -60, 60, 120) if dtype == torch.float32 else (-1000, -500, 500, 1000):
        scaled = sqrtm(torch.ldexp(a, torch.tensor(exponent)), method=method)
        assert_is_root(torch.ldexp(scaled, torch.tensor(-exponent // 2)), a, truth_of(a))


@pytest.mark.backend("native")
def test_a_matrix_does_not_depend_on_its_neighbours_nor_on_threads() -> None:
    for dtype in DTYPES:
        a = torch.cat([draw(13, kind, (9,)) for kind in SPECTRA]).to(dtype)
        together = sqrtm(a, method="native")
        for k in (0, 20, 53):
            assert torch.equal(together[k], sqrtm(a[k], method="native"))
            assert torch.equal(together[k], sqrtm(a.flip(0), method="native").flip(0)[k])
        try:
            for threads in (2, 3, 8):
                torch.set_num_threads(threads)
                assert torch.equal(sqrtm(a, method="native"), together)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("method", METHODS)
def test_strides(method: str) -> None:
    a = draw(6, batch=(4, 3))
    expected = sqrtm(a, method=method)
    strided = a.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)  # columns first, and batches exchanged
    assert not strided.is_contiguous()
    assert torch.equal(sqrtm(strided, method=method), expected)
    every_other = a.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(sqrtm(every_other, method=method), expected)
    images = a.contiguous(memory_format=torch.channels_last)
    assert torch.equal(sqrtm(images, method=method), expected)
    assert torch.equal(sqrtm(a[:1].expand(5, 3, 6, 6), method=method)[4], expected[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3, 3), (2, 0, 0), (2, 0, 3, 3)])
def test_empty(method: str, shape: tuple[int, ...]) -> None:
    a = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    root = sqrtm(a, method=method)
    assert root.shape == shape
    root.sum().backward()
    assert a.grad is not None
    assert a.grad.shape == shape


@pytest.mark.backend("native")
def test_only_the_symmetric_part_counts() -> None:
    a = draw(5)
    skewed = a.clone()
    skewed[1, 3] += 1e-8
    skewed[3, 1] -= 1e-8
    for method in METHODS:
        assert float((sqrtm(skewed, method=method) - sqrtm(a, method=method)).abs().max()) < 1e-14


@pytest.mark.backend("native")
def test_auto() -> None:
    a, large = draw(5), draw(65)
    assert torch.equal(sqrtm(a), sqrtm(a, method="native"))
    assert torch.equal(sqrtm(large), sqrtm(large, method="eigh"))
    with use_backend("reference"):
        assert torch.equal(sqrtm(a), sqrtm(a, method="eigh"))


# ---- derivatives ----


def symmetric(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """gradcheck moves one entry at a time."""
    return lambda b: function(reference.symmetric_part(b))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["flat", "clustered"])
def test_derivatives(method: str, kind: str) -> None:
    a = draw(4, kind, (2,)).requires_grad_()
    function = symmetric(lambda b: sqrtm(b, method=method))
    assert torch.autograd.gradcheck(function, a)
    assert torch.autograd.gradgradcheck(function, a)
    function = symmetric(lambda b: ops.root(b, inverse=True, eps=0.1, method=method))
    assert torch.autograd.gradcheck(function, a)
    assert torch.autograd.gradgradcheck(function, a)


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_at_equal_eigenvalues(method: str) -> None:
    a = (4 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(symmetric(lambda b: sqrtm(b, method=method)), a)
    assert torch.autograd.gradgradcheck(symmetric(lambda b: sqrtm(b, method=method)), a)
    grad = torch.autograd.grad(sqrtm(a, method=method).sum(), a)[0]
    assert float((grad - 0.25).abs().max()) < 4e-15  # 1 / (2 + 2); "newton-schulz" rounds in some 20 steps


@pytest.mark.parametrize("method", ["eigh", "native"])
def test_derivatives_where_eigenvalues_are_zero(method: str) -> None:
    # x x^T has rank 2. Its root has a derivative along x, but for the root's rounding in the kernel, which x removes.
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sqrtm(x @ x.mT, method=method) @ x, x)
    # Where there is none, the solution of least norm.
    for a in (torch.zeros(3, 3, dtype=torch.float64), torch.diag(torch.tensor([4.0, 0, 0], dtype=torch.float64))):
        a.requires_grad_()
        grad = torch.autograd.grad(sqrtm(a, method=method).sum(), a)[0]
        top = float(a.detach().amax())
        expected = torch.zeros(3, 3, dtype=torch.float64)
        if top:
            expected[0, :] = expected[:, 0] = 0.5
            expected[0, 0] = 0.25
        assert float((grad - expected).abs().max()) < 1e-15


def derivatives(function: Callable[[Tensor], Tensor], x: Tensor, along: Tensor, weights: Tensor) -> list[float]:
    """Of orders 1 to 3 along a direction, of a weighted sum."""
    x = x.clone().requires_grad_()
    value, seen = (function(x) * weights).sum(), []
    for _ in range(3):
        value = (torch.autograd.grad(value, x, create_graph=True)[0] * along).sum()
        seen.append(float(value.detach()))
    return seen


@pytest.mark.parametrize("method", ["eigh", "native"])
@pytest.mark.parametrize(("n", "rank"), [(3, 1), (4, 2), (5, 3)])
def test_every_derivative_along_matrices_of_a_rank(n: int, rank: int, method: str) -> None:
    """The kernel turns: half of the digits of the root are lost in it, and so are some of the third derivative's."""
    torch.manual_seed(5)
    x, along, weights = (torch.randn(n, k, dtype=torch.float64) for k in (rank, rank, n))
    ours = derivatives(lambda x: sqrtm(x @ x.mT, method=method), x, along, weights)
    # With regular matrices only, whose derivatives the tests above compare with differences.
    expected = derivatives(lambda x: x @ inv_sqrtm(x.mT @ x) @ x.mT, x, along, weights)
    assert ours[:2] == pytest.approx(expected[:2], rel=1e-9, abs=1e-9)
    assert ours[2] == pytest.approx(expected[2], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("m", "n", "rank"), [(3, 3, 1), (6, 4, 2)])
def test_every_derivative_of_a_polar_decomposition_along_matrices_of_a_rank(m: int, n: int, rank: int) -> None:
    torch.manual_seed(6)
    x, along = (torch.randn(m + n, rank, dtype=torch.float64) for _ in range(2))
    weights = torch.randn(n, n, dtype=torch.float64)

    def by_regular_matrices(x: Tensor) -> Tensor:
        # z y^T = z s q^T, with orthonormal columns of q and s = (y^T y)^(1/2).
        z, y = x[:m], x[m:]
        s, q = sqrtm(y.mT @ y), y @ inv_sqrtm(y.mT @ y)
        return q @ sqrtm(s @ z.mT @ z @ s) @ q.mT

    ours = derivatives(lambda x: polar(x[:m] @ x[m:].mT)[1], x, along, weights)
    assert ours == pytest.approx(derivatives(by_regular_matrices, x, along, weights), rel=1e-9, abs=1e-9)


def test_third_derivative_of_a_number() -> None:
    x = torch.tensor([[2.25]], dtype=torch.float64, requires_grad=True)
    for function, power in ((sqrtm, 0.5), (inv_sqrtm, -0.5)):
        value, factor = function(x).sum(), 1.0
        for order in range(3):
            value = torch.autograd.grad(value, x, create_graph=True)[0].sum()
            factor *= power - order
            assert float(value.detach()) == pytest.approx(factor * 2.25 ** (power - order - 1), rel=1e-12)


def test_gradient_equals_that_of_the_reference_in_float32() -> None:
    a = draw(21, batch=(5,))
    weights = torch.randn(5, 21, 21, dtype=torch.float64)
    truth = a.clone().requires_grad_()
    (sqrtm(truth, method="eigh") * weights).sum().backward()
    narrow = a.float().requires_grad_()
    (sqrtm(narrow) * weights.float()).sum().backward()
    assert narrow.grad is not None
    assert truth.grad is not None
    # Four products of 21 terms; eigenvalues of at least 0.5 divide by at least 1.
    error = (narrow.grad.double() - truth.grad).abs().max() / truth.grad.abs().max()
    assert float(error) <= 4 * 21 * torch.finfo(torch.float32).eps


def test_function_transforms() -> None:
    a = draw(4)
    gradient = torch.func.grad(lambda b: sqrtm(reference.symmetric_part(b)).pow(3).sum())(a)
    leaf = a.clone().requires_grad_()
    expected = torch.autograd.grad(sqrtm(leaf).pow(3).sum(), leaf)[0]
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-14)


def test_memory_for_derivatives_only_where_wanted() -> None:
    a = draw(6)
    assert [x.numel() for x in torch.ops.lipgan.matrix_sqrt_fwd(a, False, 0.0, "auto", False, None)] == [36, 0, 0]
    assert [x.numel() for x in torch.ops.lipgan.matrix_sqrt_fwd(a, False, 0.0, "auto", True, None)] == [36, 6, 36]


@pytest.mark.hardware
@pytest.mark.parametrize("method", METHODS)
def test_opcheck(method: str) -> None:
    a = draw(4, batch=(2,))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for inverse, wanted in ((False, True), (True, False)):
        arguments = (a, inverse, 0.1, method, wanted, None)
        torch.library.opcheck(torch.ops.lipgan.matrix_sqrt_fwd.default, arguments, test_utils=checks)
    root, roots, vectors = torch.ops.lipgan.matrix_sqrt_fwd(a, False, 0.0, method, True, None)
    arguments = (torch.randn_like(a), root, roots, vectors, None)
    torch.library.opcheck(torch.ops.lipgan.matrix_sqrt_bwd.default, arguments, test_utils=checks)


@pytest.mark.hardware
def test_compiles_to_one_graph() -> None:
    a = draw(5).requires_grad_()
    compiled = torch.compile(lambda b: sqrtm(b).square().sum(), fullgraph=True, backend="aot_eager")
    value = compiled(a)
    assert float(value.detach()) == pytest.approx(float(a.detach().diagonal().sum()), rel=1e-13)
    grad = torch.autograd.grad(value, a)[0]
    assert torch.allclose(grad, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="a must be finite"):
        compiled(torch.full((5, 5), math.nan, dtype=torch.float64))


# ---- bad input ----


def with_entry(value: float, row: int = 1, column: int = 2) -> Tensor:
    a = draw(3)
    a[row, column] = value
    return a


@pytest.mark.parametrize("function", [sqrtm, inv_sqrtm])
@pytest.mark.parametrize(
    ("a", "error", "message"),
    [
        (np.eye(3), TypeError, "a must be a tensor, got ndarray"),
        (torch.eye(3, dtype=torch.int64), TypeError, "a must have a real floating-point dtype, got torch.int64"),
        (torch.eye(3, dtype=torch.complex128), TypeError, "got torch.complex128"),
        (torch.ones(3), ValueError, r"a must have at least two dimensions, got shape \(3,\)"),
        (torch.ones(3, 2), ValueError, r"a must be square, got shape \(3, 2\)"),
        (with_entry(math.nan), ValueError, "a must be finite, got 1 entries that are NaN or infinite"),
        (with_entry(-math.inf, 0, 0), ValueError, "a must be finite, got 1 entries"),
        (with_entry(5.0), ValueError, r"a must be symmetric, got max\|a - a\^T\| = "),
        (
            torch.diag(torch.tensor([1.0, -0.5])),
            ValueError,
            "a must be positive semi-definite, got the eigenvalues -0.5",
        ),
        (-torch.eye(2), ValueError, "a must be positive semi-definite, got the eigenvalues -1 to -1"),
    ],
)
def test_bad_matrices(function: Callable[[Tensor], Tensor], a: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(a)
    if function is sqrtm and isinstance(a, Tensor):
        with pytest.raises(error, match=message):
            sqrtm(a, method="eigh")
    if isinstance(a, Tensor) and a.ndim == 2 and a.shape[0] == a.shape[1] and a.is_floating_point():
        good = torch.eye(a.shape[0], dtype=a.dtype)
        with pytest.raises(error, match=message):
            function(torch.stack([good] * 9 + [a]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: sqrtm(draw(3), method="fast"),
            ValueError,
            "method must be one of auto, eigh, native, newton-schulz, got",
        ),
        pytest.param(
            lambda: sqrtm(draw(65), method="native"),
            ValueError,
            r"serves n up to 64, got shape \(65, 65\)",
            marks=pytest.mark.backend("native"),
        ),
        (
            lambda: inv_sqrtm(draw(3, "deficient")),
            ValueError,
            "a must be positive definite beyond rounding with eps = 0",
        ),
        (lambda: inv_sqrtm(torch.zeros(2, 2)), ValueError, "got the eigenvalues 0 to 0"),
        (lambda: inv_sqrtm(draw(3), eps=-1.0), ValueError, "eps must be finite and not negative, got -1.0"),
        (lambda: inv_sqrtm(draw(3), eps=math.nan), ValueError, "eps must be finite and not negative, got nan"),
        (lambda: inv_sqrtm(draw(3), eps="1"), TypeError, "eps must be a number, got '1'"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.backend("native")
def test_negative_eigenvalues_of_rounding_count_as_zero() -> None:
    values = torch.tensor([1.0, 1e-3, -1e-9], dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    for method in ("eigh", "native"):
        root = sqrtm(reference.symmetric_part((q * values) @ q.mT), method=method)
        assert float((root - (q * values.clamp_min(0).sqrt()) @ q.mT).abs().max()) < 1e-13


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "native", lambda: None)
    _backend._resolve.cache_clear()
    try:
        assert torch.equal(sqrtm(draw(3)), sqrtm(draw(3), method="eigh"))
        with pytest.raises(UnavailableError, match=r"lipgan\._C was not built"):
            sqrtm(draw(3), method="native")
    finally:
        _backend._resolve.cache_clear()


@pytest.mark.backend("native")
def test_the_native_module_refuses_what_it_cannot_serve() -> None:
    for bad in (torch.ones(3), torch.ones(2, 3), torch.eye(65), torch.eye(3, dtype=torch.float16)):
        with pytest.raises(ValueError, match="a must be"):
            _C.matrix_sqrt_fwd(bad, False, 0.0, 1e-6, True, 1)
