"""The op polar_factor: the factor by products against that by singular values, and its gradient."""

import importlib
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import mpmath
import pytest
import scipy.linalg
import torch
from torch import Tensor

from lipgan.linalg import polar
from lipgan.ops import _backend, use_backend
from lipgan.ops.polar_factor import polar_factor
from lipgan.reference import polar_factor as by_products

op_module: Any = importlib.import_module("lipgan.ops.polar_factor")
pytestmark = pytest.mark.usefixtures("single_thread")

NATIVE = _backend.native()
SHAPES = [(1, 1), (5, 1), (12, 12), (40, 12), (9, 33), (3, 8, 6), (2, 5, 5), (65, 64)]


@pytest.fixture(params=["reference", *(NATIVE.supported_isas() if NATIVE is not None else [])])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """PyTorch's products, and those of every instruction set in C++."""
    before = NATIVE.isa() if NATIVE is not None else None
    try:
        if request.param == "reference":
            backend = "reference"
        else:
            assert NATIVE is not None
            NATIVE.set_isa(request.param)
            backend = "native"
        with use_backend(backend):
            yield request.param
    finally:
        if NATIVE is not None:
            NATIVE.set_isa(before)


def _by_products(a: Tensor, form: str) -> Tensor | None:
    """The factor of ``a [..., m, n]``, ``m >= n``, without the way of singular values."""
    if form == "reference" or a.device.type != "cpu":
        return by_products.polar_factor_fwd(a)
    module: Any = NATIVE
    u: Tensor | None = module.polar_factor_fwd(
        a, by_products.levels(a.dtype), by_products.schedule(), by_products.FURTHER, 1
    )
    return u


def _with_singular_values(shape: tuple[int, ...], values: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return (left * values) @ right


# What multiplies the number of a singular value, from 0 to 1, to give the value.
SPECTRA = {
    "orthogonal": lambda t: torch.ones_like(t),
    "near": lambda t: 1 + 0.1 * (t - 0.5),
    "scaled": lambda t: 1e-12 * (1 + 0.1 * t),
    "twice": lambda t: 1 + t,
    "far": lambda t: 0.02 + t**2,
    "one large": lambda t: torch.where(t == 1, 50.0, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_values_and_gradients(spectrum: str, shape: tuple[int, ...], dtype: torch.dtype, form: str) -> None:
    n = min(shape[-2:])
    values = SPECTRA[spectrum](torch.linspace(0, 1, n, dtype=torch.float64))
    condition = float(values.max() / values.min())
    a = _with_singular_values(shape, values).to(dtype).requires_grad_()
    tall = a if shape[-2] >= shape[-1] else a.mT
    assert _by_products(tall.detach(), form) is not None  # none of these takes the other way
    u = polar_factor(a)
    assert u.shape == a.shape
    assert u.dtype == dtype
    truth = a.detach().double().requires_grad_()
    expected, _ = polar(truth)
    grad = torch.randn(shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(u, a, grad.to(dtype))
    (true_gradient,) = torch.autograd.grad(expected, truth, grad.to(dtype).double())
    eps = torch.finfo(dtype).eps
    # docs/numerics/matrix_sqrt.md, "Orthogonal weights"
    assert float((u - expected).detach().norm()) <= 4 * n * condition * eps * math.prod(shape[:-2]) ** 0.5
    u = u.detach()
    wide = (u if shape[-2] >= shape[-1] else u.mT).double()
    off = (wide.mT @ wide - torch.eye(n, dtype=torch.float64)).norm()
    # Each entry is off by eps/2 of itself, and both factors are; in float64 the products' own rounding is more.
    assert float(off) <= (1.001 if dtype == torch.float32 else 4 * n**0.5) * (n * math.prod(shape[:-2])) ** 0.5 * eps
    error = float((gradient - true_gradient).norm())
    assert error <= 8 * n * condition**2 * eps * float(grad.norm()) / float(values.min())


def test_it_is_the_factor_of_scipy() -> None:
    a = torch.randn(14, 9, dtype=torch.float64)
    u, _ = scipy.linalg.polar(a.numpy(force=True))
    assert float((polar_factor(a) - torch.from_numpy(u).to(a)).abs().max()) < 1e-12


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (2, 5)], ids=str)
def test_every_derivative(shape: tuple[int, int]) -> None:
    a = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    # The gradient that is differentiated again is of another formula.
    u, weights = polar_factor(a), torch.randn(shape, dtype=torch.float64)
    once, again = (
        torch.autograd.grad(u, a, weights, create_graph=more, retain_graph=True)[0] for more in (False, True)
    )
    torch.testing.assert_close(again, once, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(polar_factor, a)
    assert torch.autograd.gradgradcheck(polar_factor, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_lost_rank_is_not_reached_and_served(rank: int, dtype: torch.dtype, form: str) -> None:
    a = (torch.randn(6, rank, dtype=torch.float64) @ torch.randn(rank, 4, dtype=torch.float64)).to(dtype)
    assert _by_products(a, form) is None
    a.requires_grad_()
    u = polar_factor(a)
    assert float((u.mT @ u - torch.eye(4, dtype=dtype)).norm()) < 40 * torch.finfo(dtype).eps
    (gradient,) = torch.autograd.grad(u, a, torch.randn_like(u))
    assert bool(gradient.isfinite().all())


def test_bad_input_and_no_numbers(form: str) -> None:
    with pytest.raises(ValueError, match="a must be finite"):
        polar_factor(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="a must be finite"):
        polar_factor(torch.tensor([[1.0, torch.inf], [0.0, 1.0]]))
    assert polar_factor(torch.zeros(0, 3, 2)).shape == (0, 3, 2)


def test_products_of_reduced_precision_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    forward = by_products.polar_factor_fwd

    def spy(a: Tensor) -> Tensor | None:
        seen.append(a.dtype)
        return forward(a)

    monkeypatch.setitem(op_module._FORWARD, "reference", spy)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        a = torch.randn(5, 4)
        with use_backend("reference"):
            assert polar_factor(a).dtype == torch.float32
        u = polar_factor(a)  # of products in C++, which are of full precision, where those serve
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen[:1] == [torch.float64]
    assert u.dtype == torch.float32
    assert float((u.mT @ u - torch.eye(4)).norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polynomials_miss_the_inverse_root_by_less_than_rounding(dtype: torch.dtype) -> None:
    rows = by_products.levels(dtype).tolist()
    radii = [row[0] for row in rows]
    assert radii == sorted(radii)
    for radius, terms, is_final, *coefficients in rows:
        assert not any(coefficients[int(terms) :])
        with mpmath.workdps(40):
            # Extrema lie between the extrema of a Chebyshev polynomial; the largest error is at the left end.
            errors = []
            for k in range(201):
                x = -radius * mpmath.cos(mpmath.pi * k / 200)
                sums = mpmath.polyval([mpmath.mpf(c) for c in reversed(coefficients)], x)
                errors.append(float(abs(sums * mpmath.sqrt(1 + x) - 1)))
        # What is left of singular values of 1 + x, and the rounding of coefficients.
        bound = torch.finfo(dtype).eps / 128 + 4e-16 if is_final else 1e-3
        assert max(errors) <= bound, (radius, terms)
        assert max(errors) >= bound / 40 or not is_final or dtype == torch.float64  # no smaller radius than need be


def test_matrices_that_do_not_lie_in_rows_and_those_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(3, 20, 14, dtype=torch.float64)
    expected, _ = polar(a)
    grad = torch.randn_like(a)
    wide = a.mT.contiguous().mT.requires_grad_()
    results = []
    for limit in (op_module.NATIVE_LIMIT, 13):
        monkeypatch.setattr(op_module, "NATIVE_LIMIT", limit)
        u = polar_factor(wide)
        results.append((u.detach(), torch.autograd.grad(u, wide, grad)[0]))
        torch.testing.assert_close(u, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)
    if NATIVE is not None and a.device.type == "cpu":
        assert not torch.equal(results[0][0], results[1][0])  # they are two ways


@pytest.mark.cpu
@pytest.mark.skipif(NATIVE is None, reason="lipgan._C was not built")
@pytest.mark.parametrize(("m", "n"), [(200, 200), (250, 190)])
def test_results_in_cpp_do_not_depend_on_the_number_of_threads(m: int, n: int) -> None:
    a = torch.eye(m, n) + torch.randn(m, n) / 40
    grad = torch.randn_like(a)
    arguments = by_products.levels(a.dtype), by_products.schedule(), by_products.FURTHER
    module: Any = NATIVE
    results = []
    for threads in (1, 2, 5):
        u = module.polar_factor_fwd(a, *arguments, threads)
        results.append((u, module.polar_factor_bwd(grad, u, a, 40, 1e-6, threads)))
    for u, to_a in results[1:]:
        assert torch.equal(u, results[0][0])
        assert torch.equal(to_a, results[0][1])


@pytest.mark.cpu
@pytest.mark.skipif(NATIVE is None, reason="lipgan._C was not built")
def test_the_module_refuses_what_its_kernels_do_not_take() -> None:
    module: Any = NATIVE
    a = torch.eye(3, 2)
    rest = by_products.levels(a.dtype), by_products.schedule(), 8, 1
    for bad in (a.mT, torch.zeros(4, 0), torch.zeros(3), torch.zeros(1030, 1025)):
        with pytest.raises(ValueError, match="a must be matrices of 1 to 1024 columns, and no fewer rows"):
            module.polar_factor_fwd(bad, *rest)
    with pytest.raises(ValueError, match="float32 or float64"):
        module.polar_factor_fwd(a.half(), *rest)
    with pytest.raises(ValueError, match="must not be empty"):
        module.polar_factor_fwd(a, torch.zeros(0, 15, dtype=torch.float64), by_products.schedule(), 8, 1)
    with pytest.raises(ValueError, match="u must hold 6 elements, got 4"):
        module.polar_factor_bwd(a, a[:2], a, 40, 1e-6, 1)
    assert op_module.NATIVE_LIMIT == 1024


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_compiled_without_a_break(precision: str, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    for table in (op_module._FORWARD, op_module._BACKWARD):
        function: Any = table["reference"]
        monkeypatch.setitem(table, "reference", lambda *a, f=function: (seen.append(a[0].dtype), f(*a))[1])
    torch._dynamo.reset()
    compiled = torch.compile(polar_factor, fullgraph=True, backend="aot_eager")
    a, weights = torch.randn(7, 4, requires_grad=True), torch.randn(7, 4)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        outcomes = []
        with use_backend(backend) if backend else nullcontext():
            for function in (compiled, polar_factor):
                u = function(a)
                assert u.dtype == torch.float32
                outcomes.append((u, *torch.autograd.grad(u, a, weights)))
    finally:
        torch.set_float32_matmul_precision(before)
    for ours, eager in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
    if backend:
        assert set(seen) == {torch.float32 if precision == "highest" else torch.float64}


def test_the_op_registers_well() -> None:
    a = torch.randn(6, 4)
    for op, arguments in (
        (torch.ops.lipgan.polar_factor_fwd.default, (a,)),
        (torch.ops.lipgan.polar_factor_bwd.default, (a, torch.linalg.qr(a)[0], a)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
