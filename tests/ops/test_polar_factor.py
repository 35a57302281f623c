"""The op polar_factor: the factor by products against that by singular values, and its gradient."""

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from lipgan.linalg import polar
from lipgan.ops.polar_factor import polar_factor
from lipgan.reference import polar_factor as by_products

pytestmark = pytest.mark.usefixtures("single_thread")

SHAPES = [(1, 1), (5, 1), (12, 12), (40, 12), (9, 33), (3, 8, 6), (2, 5, 5)]


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
def test_values_and_gradients(spectrum: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n = min(shape[-2:])
    values = SPECTRA[spectrum](torch.linspace(0, 1, n, dtype=torch.float64))
    condition = float(values.max() / values.min())
    a = _with_singular_values(shape, values).to(dtype).requires_grad_()
    tall = a if shape[-2] >= shape[-1] else a.mT
    assert by_products.polar_factor_fwd(tall.detach()) is not None  # none of these takes the other way
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
    assert torch.autograd.gradcheck(polar_factor, a)
    assert torch.autograd.gradgradcheck(polar_factor, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_lost_rank_is_not_reached_and_served(rank: int, dtype: torch.dtype) -> None:
    a = (torch.randn(6, rank, dtype=torch.float64) @ torch.randn(rank, 4, dtype=torch.float64)).to(dtype)
    assert by_products.polar_factor_fwd(a) is None
    a.requires_grad_()
    u = polar_factor(a)
    assert float((u.mT @ u - torch.eye(4, dtype=dtype)).norm()) < 40 * torch.finfo(dtype).eps
    (gradient,) = torch.autograd.grad(u, a, torch.randn_like(u))
    assert bool(gradient.isfinite().all())


def test_bad_input_and_no_numbers() -> None:
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

    monkeypatch.setattr(by_products, "polar_factor_fwd", spy)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert polar_factor(torch.randn(5, 4)).dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [torch.float64]


def test_the_op_registers_well() -> None:
    a = torch.randn(6, 4)
    for op, arguments in (
        (torch.ops.lipgan.polar_factor_fwd.default, (a,)),
        (torch.ops.lipgan.polar_factor_bwd.default, (a, torch.linalg.qr(a)[0], a)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
