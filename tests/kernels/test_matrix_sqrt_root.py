"""The Triton kernel of square roots by Jacobi's method, in Triton's interpreter, against LAPACK in float64.

The bounds are those of docs/numerics/matrix_sqrt.md, as for the other forms of the op (tests/ops/test_matrix_sqrt.py).
"""

import math
from collections.abc import Callable

import pytest
import torch
from lipgan.kernels import config
from lipgan.kernels import matrix_sqrt as kernels
from lipgan.kernels.matrix_sqrt import root as root_module
from torch import Tensor

from lipgan.ops import matrix_sqrt as ops
from lipgan.reference import matrix_sqrt as reference

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("single_thread")]

DTYPES = [torch.float64, torch.float32]


def draw(values: Tensor, batch: int = 1, seed: int = 0) -> Tensor:
    """Matrices [batch, n, n] with these eigenvalues, in bases as good as random."""
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(batch, n, n, generator=generator, dtype=torch.float64))[0]
    return reference.symmetric_part((q * values) @ q.mT)


def spectra(n: int) -> Tensor:
    """[5, n]: even, over all digits of float64, in two clusters, of half of the rank, zero."""
    k = torch.arange(n, dtype=torch.float64)
    even = 1 - 0.5 * k / n
    digits = 10.0 ** (-16 * k / max(1, n - 1))
    clusters = torch.where(k < n / 2, 1.0, 0.25).double()
    return torch.stack([even, digits, clusters, torch.where(k < (n + 1) // 2, even, 0.0), 0 * k])


def forward(a: Tensor, inverse: bool = False, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels.matrix_sqrt_fwd(a, inverse, eps, reference.resolution(a.shape[-1], a.dtype), True)


def check(a: Tensor) -> None:
    """Root, roots, vectors and what was seen of matrices without negative eigenvalues."""
    n, unit = a.shape[-1], torch.finfo(a.dtype).eps
    before = a.clone()
    root, roots, vectors, seen = forward(a)
    assert torch.equal(a, before)
    for result, shape in ((root, a.shape), (roots, a.shape[:-1]), (vectors, a.shape)):
        assert result.shape == shape
        assert result.isfinite().all(), "an element was not written"
    assert torch.equal(root, root.mT)
    values, basis = torch.linalg.eigh(a.double())
    truth = (basis * values.clamp_min(0).sqrt().unsqueeze(-2)) @ basis.mT
    e = reference.resolution(n, a.dtype) * values[..., -1].clamp_min(0)
    bound = torch.minimum(e.sqrt(), e / (2 * values[..., 0].clamp_min(1e-300).sqrt()))
    rounding = 4 * math.sqrt(n) * unit * torch.linalg.matrix_norm(truth, 2)
    assert (torch.linalg.matrix_norm(root.double() - truth, 2) <= 2 * bound + rounding).all()
    eye = torch.eye(n, dtype=torch.float64)
    orthogonal = torch.linalg.matrix_norm(vectors.double().mT @ vectors.double() - eye, 2)
    assert float(orthogonal.max()) <= reference.resolution(n, a.dtype)
    # Roots and vectors are those of the root, but for what is not resolved.
    again = (vectors * roots.unsqueeze(-2)) @ vectors.mT
    unresolved = e.sqrt() + rounding
    assert (torch.linalg.matrix_norm(again.double() - root.double(), 2) <= unresolved).all()
    largest, difference, low, high, left = seen.double()
    flat = a.double().flatten(0, -3)
    assert torch.equal(largest, flat.abs().amax((-2, -1)))
    assert not difference.any()
    assert ((low - values[..., 0].flatten()).abs() <= e.flatten()).all()
    assert ((high - values[..., -1].flatten()).abs() <= e.flatten()).all()
    assert not left.any()


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_every_spectrum(n: int, dtype: torch.dtype) -> None:
    a = torch.cat([draw(values, seed=k) for k, values in enumerate(spectra(n))])
    check(a.to(dtype))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize(("n", "kind", "dtype"), [(16, 0, DTYPES[1]), (17, 3, DTYPES[0])])
def test_around_the_tiles(n: int, kind: int, dtype: torch.dtype) -> None:
    check(draw(spectra(n)[kind]).to(dtype))


@pytest.mark.usefixtures("poisoned_outputs")
def test_the_largest() -> None:
    """One rotation of an equal pair in a matrix whose other rows are done: the root is known."""
    a = torch.diag(torch.arange(1, 65, dtype=torch.float64) ** 2)
    a[5, 5] = a[60, 60] = 2.5
    a[5, 60] = a[60, 5] = 1.5  # eigenvalues 4 and 1
    expected = torch.diag(torch.arange(1, 65, dtype=torch.float64))
    expected[5, 5] = expected[60, 60] = 1.5
    expected[5, 60] = expected[60, 5] = 0.5
    root, _, _, seen = forward(a)
    assert float((root - expected).abs().max()) < 1e-15 * 64
    assert seen[:, 0].tolist() == [4096, 0, 1, 4096, 0]


def test_every_pair_meets_once_in_a_sweep() -> None:
    """One sweep of a matrix that has one entry beside its diagonal is enough, wherever that entry is."""
    n = 5
    for i in range(n):
        for p in range(i):
            a = torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64))
            a[i, p] = a[p, i] = 0.25
            root = forward(a)[0]
            assert float((root @ root - a).abs().max()) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    a = draw(spectra(3)[0]).to(dtype)
    expected = forward(a)[0]
    for exponent in (-120, 120) if dtype == torch.float32 else (-1000, 1000):
        scaled = forward(torch.ldexp(a, torch.tensor(exponent)))[0]
        assert torch.equal(torch.ldexp(scaled, torch.tensor(-exponent // 2)), expected)
    tiny = torch.full((1, 1), torch.finfo(dtype).smallest_normal / 8, dtype=dtype)
    assert float(forward(tiny)[0] / tiny.double().sqrt()) == pytest.approx(1, abs=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_and_shift(dtype: torch.dtype) -> None:
    a = draw(spectra(5)[2], 2).to(dtype)
    eye = torch.eye(5, dtype=dtype)
    for eps in (0.0, 0.5):
        inverse = forward(a, inverse=True, eps=eps)[0]
        assert float((inverse @ (a + eps * eye) @ inverse - eye).abs().max()) <= 16 * 5 * torch.finfo(dtype).eps
        root = forward(a, eps=eps)[0]
        assert float((root @ root - a - eps * eye).abs().max()) <= 16 * 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ],
    ids=["transposed", "sliced", "unaligned", "batches exchanged"],
)
def test_strides_change_no_bit(view: Callable[[Tensor], Tensor]) -> None:
    a = draw(spectra(4)[0], 4).reshape(2, 2, 4, 4)
    assert torch.equal(forward(view(a))[0], forward(a)[0])


def test_a_matrix_does_not_depend_on_its_neighbours() -> None:
    a = torch.cat([draw(values) for values in spectra(4)])
    together = forward(a)
    assert torch.equal(forward(a[1])[0], together[0][1])
    a[2, 1, 3] = math.nan
    a[3, 0, 0] = math.inf
    with_nan = forward(a)
    for k in (0, 1, 4):
        assert torch.equal(with_nan[0][k], together[0][k])
    assert with_nan[3][0].isnan().tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3, 3), (2, 0, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    root, roots, vectors, _ = forward(torch.empty(shape, dtype=torch.float64))
    assert (root.shape, roots.shape, vectors.shape) == (shape, shape[:-1], shape)


def test_no_spectrum_where_none_is_wanted() -> None:
    a = draw(spectra(3)[0], 2)
    root, roots, vectors, _ = kernels.matrix_sqrt_fwd(a, False, 0.0, 1e-15, False)
    assert torch.equal(root, forward(a)[0])
    assert (roots.shape, vectors.shape) == ((2, 0), (2, 0, 0))


def test_arguments_that_do_not_fit() -> None:
    for bad in (torch.ones(3), torch.ones(2, 3), torch.eye(65)):
        with pytest.raises(ValueError, match=r"square matrices of up to 64 rows, got shape"):
            forward(bad)
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.float16"):
        forward(torch.eye(2).half())
    assert root_module.LIMIT == ops.NATIVE_LIMIT


@pytest.mark.parametrize("n", range(1, 65))
def test_launch_shapes(n: int) -> None:
    tile = config.small_matrix_tile(n)
    assert tile.block_h == tile.block_w >= max(n, 16)
    assert tile.block_h < 2 * max(n, 16)
    assert tile.block_h**2 <= 16 * 32 * tile.num_warps, "numbers a thread"


# ---- the op ----


def test_the_op_and_its_gradients() -> None:
    a = draw(spectra(2)[2]).requires_grad_()

    def root(b: Tensor) -> Tensor:
        return ops.root(reference.symmetric_part(b), backend="triton")

    assert torch.autograd.gradcheck(root, a)
    assert torch.autograd.gradgradcheck(root, a)
    a = draw(spectra(5)[2], 2).requires_grad_()
    weights = torch.randn(2, 5, 5, dtype=torch.float64)
    grads = [
        torch.autograd.grad((ops.root(a, backend=backend) * weights).sum(), a)[0] for backend in ("triton", "reference")
    ]
    # Eigenvalues of at least 1/4 divide by at least 1; four products of 5 terms.
    assert float((grads[0] - grads[1]).abs().max()) <= 64 * torch.finfo(torch.float64).eps


def test_large_matrices_and_those_that_do_not_converge_take_eigh(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = draw(torch.linspace(0.5, 1, 65, dtype=torch.float64)), draw(spectra(4)[0])
    assert torch.equal(ops.root(large, backend="triton"), ops.root(large, method="eigh"))
    assert not torch.equal(ops.root(small, backend="triton"), ops.root(small, method="eigh"))
    monkeypatch.setattr(root_module, "SWEEPS", 1)
    assert float(forward(small)[3][4]) > 0
    assert torch.equal(ops.root(small, backend="triton"), ops.root(small, method="eigh"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, 1, math.nan), "a must be finite, got 1 entries that are NaN or infinite"),
        ((0, 0, -math.inf), "a must be finite, got 1 entries"),
        ((0, 1, 5.0), r"a must be symmetric, got max\|a - a\^T\| = "),
        ((2, 2, -0.5), "a must be positive semi-definite, got the eigenvalues -0.5"),
    ],
)
def test_bad_matrices(change: tuple[int, int, float], message: str) -> None:
    a = torch.eye(3).repeat(2, 1, 1)
    a[1, change[0], change[1]] = change[2]
    with pytest.raises(ValueError, match=message):
        ops.root(a, backend="triton")


def test_a_singular_matrix_has_no_inverse() -> None:
    with pytest.raises(ValueError, match="a must be positive definite beyond rounding with eps = 0"):
        ops.root(draw(spectra(4)[3]), inverse=True, backend="triton")


def test_negative_eigenvalues_of_rounding_count_as_zero() -> None:
    values = torch.tensor([1.0, 1e-3, -1e-9], dtype=torch.float64)
    a = draw(values)
    expected = ops.root(a, method="eigh")
    assert float((ops.root(a, backend="triton") - expected).abs().max()) < 1e-13
