"""The op mlp_gradient_penalty with smooth activations: against autograd's double backward, and the functions themselves
against mpmath."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate
from torch import Tensor

from lipgan.ops import _backend
from lipgan.ops.mlp_gradient_penalty import penalize, penalize_with_loss
from lipgan.reference.mlp_gradient_penalty import CURVES, activate

_C: Any = _backend.native()

BACKENDS = ["reference", "native", "triton"]
KINDS = ["two-sided", "one-sided", "squared", "max"]
WEIGHT, TARGET = 10.0 / 3.0, 0.7

# None is 1, so that one that is forgotten shows; float32 knows all of them.
CONSTANTS = {"softplus": (1.5, 3.0, 0.0), "elu": (1.25, 0.875, 0.75)}
PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda z: F.leaky_relu(z, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": lambda z: F.softplus(z, *CONSTANTS["softplus"][:2]),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda z: F.gelu(z, approximate="tanh"),
    "elu": lambda z: torch.ops.aten.elu(z, *CONSTANTS["elu"]),
}


def constants_of(curves: Sequence[str]) -> list[float]:
    return [number for curve in curves for number in CONSTANTS.get(curve, (0.0, 0.0, 0.0))]


@dataclass
class Critic:
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    scales: list[Tensor | None]
    curves: list[str]

    def to(self, dtype: torch.dtype) -> "Critic":
        biases, scales = ([None if t is None else t.to(dtype) for t in ts] for ts in (self.biases, self.scales))
        return Critic(self.x.to(dtype), [w.to(dtype) for w in self.weights], biases, scales, self.curves)

    def penalize(
        self,
        kind: str,
        backend: str = "native",
        score_grads: Tensor | None = None,
        penalized: range | None = None,
        known: Sequence[Tensor] = (),
    ) -> Any:
        lists = self.weights, self.biases, [0.2] * len(self.curves), self.scales
        options: Any = {"curves": self.curves, "constants": constants_of(self.curves), "backend": backend}
        if score_grads is None:
            return penalize(self.x, *lists, kind, WEIGHT, TARGET, **options)
        loss = score_grads, penalized or range(len(self.x))
        return penalize_with_loss(self.x, *lists, kind, WEIGHT, TARGET, *loss, activations=known, **options)

    def scores(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """``[B]``, and what the op takes of layers that are known."""
        a, known = x, []
        for w, b, scale, curve in zip(weights, biases, self.scales, self.curves, strict=False):
            z = F.linear(a, w, b)
            a = PHI[curve](z)
            known.append(z if curve else a)
            a = a if scale is None else a * scale
        return F.linear(a, weights[-1], biases[-1])[:, 0], known

    def textbook(self, kind: str, score_grads: Tensor | None, penalized: range) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Penalty, norms, and the gradients by weights and biases of the penalty and a loss, by double backward."""
        x = self.x.clone().requires_grad_()
        weights = [w.clone().requires_grad_() for w in self.weights]
        biases = [
            (torch.zeros(len(w), dtype=x.dtype) if b is None else b.clone()).requires_grad_()
            for w, b in zip(weights, self.biases, strict=True)
        ]
        scores, _ = self.scores(x, weights, biases)
        (g,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        norms = g[penalized.start : penalized.stop].norm(dim=1)
        if kind == "squared":
            penalty = WEIGHT * norms.square().mean() / 2
        elif kind == "max":
            penalty = WEIGHT * (norms.amax() - TARGET).square()
        else:
            excess = norms - TARGET if kind == "two-sided" else (norms - TARGET).clamp_min(0)
            penalty = WEIGHT * excess.square().mean()
        total = penalty if score_grads is None else penalty + (score_grads * scores).sum()
        parameters = [*weights, *biases]
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
        zeros = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
        return penalty.detach(), norms.detach(), zeros


def draw(widths: Sequence[int], batch: int, curves: Sequence[str], *, scaled: bool = False, seed: int = 0) -> Critic:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    pairs = list(zip(widths, [*widths[1:], 1], strict=True))
    weights = [(normal(after, before) * math.sqrt(2 / before)).float().double() for before, after in pairs]
    biases = [normal(after) if layer != 1 else None for layer, (_, after) in enumerate(pairs)]
    scales: list[Tensor | None] = [
        2.0 * torch.randint(0, 2, (batch, width), generator=generator).double() if scaled and layer % 2 == 0 else None
        for layer, width in enumerate(widths[1:])
    ]
    return Critic(normal(batch, widths[0]), weights, biases, scales, [*curves])


# Widths, batch, and which layers are smooth; the others are leaky ReLUs. No layer is so wide-ranging that it saturates:
# there PyTorch's derivatives are rounding.
SHAPES = [
    ([1, 1], 1, [0]),
    ([2, 5, 3], 7, [0, 1]),
    ([15, 16, 17], 6, [0]),
    ([31, 33, 1, 64], 5, [0]),
    ([3, 65, 2, 7, 11], 12, [0, 2]),
    ([2, 30, 530], 133, [0, 1]),
]


def layers(curve: str, hidden: int, places: Sequence[int]) -> list[str]:
    return [curve if layer in places else "" for layer in range(hidden)]


def check(critic: Critic, backend: str) -> None:
    batch = len(critic.x)
    loss = torch.randn(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = [range(batch), range(batch // 3, batch // 3 + 1), range(batch // 2, batch)]
    for number, (kind, score_grads) in enumerate(itertools.product(KINDS, (None, loss))):
        penalized = range(batch) if score_grads is None else parts[number // 2 % 3]
        known = (
            ()
            if score_grads is None or any(s is not None for s in critic.scales)
            else critic.scores(critic.x, critic.weights, critic.biases)[1]
        )
        penalty, norms, exact = critic.textbook(kind, score_grads, penalized)
        for given in {0, len(known)}:
            ours = critic.penalize(kind, backend, score_grads, penalized, known[:given])
            torch.testing.assert_close(ours[0], penalty, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(ours[1], norms, rtol=1e-11, atol=0.0)
            for grad, truth in zip([*ours[2], *ours[3]], exact, strict=True):
                assert grad.shape == truth.shape
                torch.testing.assert_close(grad, truth, rtol=0.0, atol=1e-11 * max(1.0, float(truth.abs().max())))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("curve", CURVES)
def test_native(isa: str, curve: str) -> None:
    for k, (widths, batch, places) in enumerate(SHAPES):
        check(draw(widths, batch, layers(curve, len(widths) - 1, places), scaled=k % 2 == 1), "native")


@pytest.mark.parametrize("curve", CURVES)
def test_reference(curve: str) -> None:
    for k, (widths, batch, places) in enumerate(SHAPES):
        check(draw(widths, batch, layers(curve, len(widths) - 1, places), scaled=k % 2 == 0), "reference")


# ---- float32 ----


def bound(critic: Critic, kind: str, score_grads: Tensor) -> tuple[list[float], float]:
    """What the terms of the gradients add up to without their signs, and the roundings of a term.

    A sum of n products is off by at most n eps times the sum of their sizes. An error of eps r in z, of the size r of
    z's own terms, is one of at most 1.5 beta^2 eps r in phi(z), phi'(z) and phi''(z), since their derivatives are at
    most that. So each step is bounded by itself over sizes, of values and of errors together, times the roundings so
    far.
    """
    wide = critic.to(torch.float64)
    steep = 1.5 * 1.5**2
    batch = len(wide.x)
    a, size, factors, bends, sizes = wide.x, wide.x.abs(), [], [], [wide.x.abs()]
    for w, b, curve in zip(wide.weights, wide.biases, wide.curves, strict=False):
        z = F.linear(a, w, b)
        off = F.linear(size, w.abs(), None if b is None else b.abs())
        a, m, bend = activate(curve, z, constants_of([curve]))
        factors.append(m.abs() + steep * off)
        bends.append(bend.abs() + steep * off)
        size = a.abs() + steep * off
        sizes.append(size)
    deltas, es = [torch.ones(batch, 1, dtype=torch.float64)], []
    for w, factor in zip(reversed(wide.weights[1:]), reversed(factors), strict=True):
        es.insert(0, deltas[0] @ w.abs())
        deltas.insert(0, es[0] * factor)
    g = deltas[0] @ wide.weights[0].abs()
    norms = critic.textbook(kind, None, range(batch))[1].double()
    # As in the other file: the cotangent's own errors.
    slope = 2 * WEIGHT * (norms + g.norm(dim=1) + TARGET) * (batch if kind == "max" else 1) / batch
    tangent = g * (slope * (1 + g.norm(dim=1) / norms) / norms).unsqueeze(1)
    tangents, seeds = [tangent], []
    for w, factor, bend, e in zip(wide.weights, factors, bends, es, strict=False):
        along = tangents[-1] @ w.abs().T
        seeds.append(bend * along * e)
        tangents.append(along * factor)
    adjoint = score_grads.double().abs().unsqueeze(1)
    grads, bias_grads = [], []
    for layer in range(len(wide.weights) - 1, -1, -1):
        grads.insert(0, float((deltas[layer].T @ tangents[layer] + adjoint.T @ sizes[layer]).max()))
        bias_grads.insert(0, float(adjoint.sum(0).max()))
        if layer > 0:
            adjoint = (adjoint @ wide.weights[layer].abs()) * factors[layer - 1] + seeds[layer - 1]
    return [*grads, *bias_grads], 4 * sum(w.shape[1] + 8 for w in wide.weights) + 2 * batch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("curve", [curve for curve in CURVES if curve != "elu"])  # whose phi'' jumps at 0
def test_float32(curve: str, backend: str) -> None:
    cases = [*itertools.product(("two-sided", "max"), (([2, 16, 16], 20), ([15, 33, 7], 9)))]
    # The interpreter takes a second for each.
    for kind, (widths, batch) in cases[-1:] if backend == "triton" else cases:
        critic = draw(widths, batch, [curve] * (len(widths) - 1)).to(torch.float32)
        loss = torch.randn(batch, generator=torch.Generator().manual_seed(2))
        ours, peer = critic.penalize(kind, backend, loss), critic.textbook(kind, loss, range(batch))
        truth = critic.to(torch.float64).textbook(kind, loss.double(), range(batch))
        scales, roundings = bound(critic, kind, loss)
        for grad, theirs, exact, scale in zip([*ours[2], *ours[3]], peer[2], truth[2], scales, strict=True):
            assert_as_accurate(grad, theirs, exact, roundings=roundings, scale=scale)


@pytest.mark.backend("native")
@pytest.mark.parametrize("curve", CURVES)
def test_error_at_larger_sizes(curve: str) -> None:
    # Among thousands of entries the largest error says how sums are rounded in general: no worse than PyTorch's.
    critic = draw([2, 128, 128], 256, [curve, curve]).to(torch.float32)
    truth = critic.to(torch.float64).textbook("two-sided", None, range(256))
    ours, peer = critic.penalize("two-sided"), critic.textbook("two-sided", None, range(256))
    assert_as_accurate(ours[0], peer[0], truth[0], roundings=8)
    assert_as_accurate(ours[1], peer[1], truth[1], roundings=8)
    for grad, theirs, exact in zip([*ours[2], *ours[3]], peer[2], truth[2], strict=True):
        assert_as_accurate(grad, theirs, exact, roundings=8)


# ---- the functions ----


def functions(curve: str, z: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """phi, phi' and phi'' of the op.

    A critic of one hidden layer with z as its biases and ones as weights, at x = 0: the gradient of a loss by the last
    weight is phi(z), that of the penalty without one v phi'(z), and that by the biases v phi''(z), v = |g|, of the kind
    "squared".
    """
    n, one = len(z), torch.ones(1, dtype=z.dtype)
    weights, biases = [z.new_ones(n, 1), z.new_ones(1, n)], [z, None]
    smooth: Any = {"curves": [curve], "constants": constants_of([curve]), "backend": backend}
    common = z.new_zeros(1, 1), weights, biases, [0.0], [None], "squared"
    values = penalize_with_loss(*common, 0.0, 0.0, one, range(1), **smooth)[2][1][0]
    _, norms, grads, bias_grads = penalize(*common, 1.0, 0.0, **smooth)
    return values, grads[1][0] / norms, bias_grads[0] / norms


TRUTHS: dict[str, Callable[[Any], Any]] = {
    "tanh": mpmath.tanh,
    "sigmoid": lambda z: 1 / (1 + mpmath.exp(-z)),
    "softplus": lambda z: z if 1.5 * z > 3 else mpmath.log1p(mpmath.exp(1.5 * z)) / 1.5,
    "silu": lambda z: z / (1 + mpmath.exp(-z)),
    "gelu": lambda z: z * mpmath.ncdf(z),
    "gelu-tanh": lambda z: z / (1 + mpmath.exp(-mpmath.sqrt(8 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3))),
    "elu": lambda z: 0.875 * z if z > 0 else 1.25 * 0.875 * mpmath.expm1(0.75 * z),
}


@pytest.mark.backend("native")
@pytest.mark.parametrize("curve", CURVES)
def test_functions_are_accurate(isa: str, curve: str) -> None:
    check_functions(curve, "native")


@pytest.mark.backend("triton")
@pytest.mark.parametrize("curve", CURVES)
def test_functions_of_triton_are_accurate(curve: str) -> None:
    check_functions(curve, "triton")


def check_functions(curve: str, backend: str) -> None:
    z = torch.cat([torch.linspace(-9.03, 9.03, 41), torch.tensor([1e-6, -1e-6, 0.3466, -0.3466, 0.41, 2.1])]).double()
    with mpmath.workdps(40):
        truth = [[mpmath.diff(TRUTHS[curve], mpmath.mpf(point), k) for k in range(3)] for point in z.tolist()]
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        with mpmath.workdps(40):
            # The z of float32 is another number.
            rounded = z.to(dtype).tolist()
            moved = [
                [t[0] + t[1] * (r - p), t[1] + t[2] * (r - p), t[2]]
                for t, r, p in zip(truth, map(mpmath.mpf, rounded), map(mpmath.mpf, z.tolist()), strict=True)
            ]
        for order, ours in enumerate(functions(curve, z.to(dtype), backend)):
            for point, value, exact in zip(rounded, ours.tolist(), moved, strict=True):
                # phi and phi' to their own size, but for the argument of an exponential, which is rounded too, and for
                # the terms of phi' that cancel; phi'' to eps.
                far = max(1.0, abs(point)) ** (3 if "gelu" in curve else 1)
                size = {0: abs(exact[0]), 1: max(abs(exact[1]), abs(point * exact[2])), 2: 1}[order]
                assert abs(value - exact[order]) <= 8 * eps * far * size + eps**2, (dtype, order, point)


EXTREMES = [0.0, -0.0, 1e-30, -1e-30, 19.0, -19.0, 40.0, -40.0, 120.0, -120.0, 800.0, -800.0, 1e30, -1e30]
EXTREMES += [math.inf, -math.inf, math.nan]


@pytest.mark.backend("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curve", CURVES)
def test_extreme_numbers(isa: str, curve: str, dtype: torch.dtype) -> None:
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    for z in EXTREMES:
        x, one = torch.full((1, 1), z, dtype=dtype), torch.ones(1, dtype=dtype)
        call = x, [one.view(1, 1)] * 2, [None, None], [0.0], [None], "squared", 1.0, 0.0
        smooth: Any = {"curves": [curve], "constants": constants_of([curve])}
        results = []
        for backend in ("native", "reference"):
            penalty, norms, grads, bias_grads = penalize_with_loss(*call, one, range(1), **smooth, backend=backend)
            results.append([penalty, norms, *grads, *bias_grads])
        for ours, theirs in zip(*results, strict=True):
            # What is below the smallest normal number is 0 in C++.
            torch.testing.assert_close(
                ours, theirs, rtol=300 * eps, atol=4 * tiny * max(1, min(abs(z), 1e30)), equal_nan=True
            )
        if math.isnan(z):
            assert results[0][0].isnan()
        if math.isfinite(z):
            assert all(result.isfinite().all() for result in results[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturation(backend: str) -> None:
    # 1 - tanh^2 would be 0 here, or rounding.
    z = torch.tensor([12.0, -12.0], dtype=torch.float64)
    values, slopes, bends = functions("tanh", z, backend)
    exact = 4 * math.exp(-24) / (1 + math.exp(-24)) ** 2
    torch.testing.assert_close(slopes, torch.full_like(z, exact), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(bends, -2 * torch.sign(z) * exact, rtol=1e-9, atol=0.0)
    assert values.tolist() == [math.tanh(12.0), -math.tanh(12.0)]
    # PyTorch's e^{beta z} would be infinite with this threshold.
    x = torch.full((1, 1), 2000.0, dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.float64)
    smooth: Any = {"curves": ["softplus"], "constants": [1.0, 1e4, 0.0], "backend": backend}
    *_, grads, _ = penalize_with_loss(
        x, [ones, ones], [None, None], [0.0], [None], "squared", 0.0, 0.0, ones[0], range(1), **smooth
    )
    assert grads[1].item() == 2000.0


@pytest.mark.backend("native")
@pytest.mark.parametrize("kind", KINDS)
def test_nan_propagates(kind: str) -> None:
    critic = draw([3, 17, 5], 6, ["silu", "tanh"])
    for layer in (None, 0, 1, 2):
        x, weights = critic.x.clone(), [weight.clone() for weight in critic.weights]
        (x if layer is None else weights[layer])[0, 1] = math.nan
        moved = Critic(x, weights, critic.biases, critic.scales, critic.curves)
        penalty, norms, *_ = moved.penalize(kind)
        assert penalty.isnan()
        assert norms.isnan().tolist() == [True] + [layer is not None] * 5


# ---- threads, and bad input ----


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.backend("native")
@pytest.mark.usefixtures("threads", "poisoned_outputs")
@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.parametrize(
    ("widths", "batch", "curves"),
    [
        ([3, 96, 100], 400, ["tanh", "gelu"]),
        ([130, 300, 301], 20, ["softplus", ""]),
        ([40, 500, 7, 90], 33, ["", "silu", ""]),
    ],
    ids=["by samples", "by columns", "narrow"],
)
def test_result_does_not_depend_on_the_number_of_threads(
    widths: list[int], batch: int, curves: list[str], with_loss: bool
) -> None:
    for dtype in (torch.float32, torch.float64):
        critic = draw(widths, batch, curves).to(dtype)
        loss = torch.randn(batch).to(dtype) if with_loss else None
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            penalty, norms, grads, bias_grads = critic.penalize("max", "native", loss, range(batch // 3, batch))
            results.append((penalty, norms, *grads, *bias_grads))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unknown_curves_are_refused(backend: str) -> None:
    critic = draw([3, 4], 2, ["mish"])
    with pytest.raises(ValueError, match=r"a curve must be one of tanh, sigmoid, .* or empty, got 'mish'"):
        critic.penalize("max", backend)


@pytest.mark.cpu
@pytest.mark.backend("native")
def test_native_module_refuses_lists_that_do_not_fit() -> None:
    critic = draw([3, 4], 2, ["tanh"])
    lists = critic.weights, critic.biases, [0.0], critic.scales
    for curves, constants, message in (
        (["tanh"], [], "constants must hold 3 numbers for each curve, got 0"),
        (["tanh", "tanh"], [0.0] * 6, "differ in length"),
        ([], [0.0] * 3, "constants must hold 3 numbers for each curve, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.mlp_gradient_penalty_fwd(critic.x, *lists, "max", 1.0, 1.0, None, [], 0, 2, curves, constants, 1)
