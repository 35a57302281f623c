"""The op mlp_gradient_penalty: every backend against PyTorch's double backward in float64, closed forms, bad input."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lipgan.ops import UnavailableError, _backend, empty_cache
from lipgan.ops.mlp_gradient_penalty import penalize, penalize_with_loss, serves

_C: Any = _backend.native()  # None where it was not built: its tests are skipped then

BACKENDS = ["reference", "native", "triton"]
KINDS = ["two-sided", "one-sided", "squared", "max"]
DTYPES = [torch.float32, torch.float64]

# Not float32 numbers, so that one that gets rounded to float32 on its way shows in float64.
WEIGHT, TARGET = 10.0 / 3.0, 0.7

# Widths before the last layer, and the batch. Around the lanes of a vector (2 to 16), the vectors (2 or 4) and the rows
# (6) of a tile; depths and batches beyond the 128 (or 64, or more) that a panel holds.
SHAPES = [
    ([1], 1),
    ([37], 9),
    ([1, 1], 1),
    ([2, 5, 3], 7),
    ([15, 16, 17], 6),
    ([31, 33, 1, 64], 5),
    ([3, 65, 2, 7, 11], 12),
    ([129, 140, 66], 13),
    ([2, 30, 530], 133),
]


@dataclass
class Critic:
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    slopes: list[float]
    scales: list[Tensor | None]

    def to(self, dtype: torch.dtype) -> "Critic":
        def move(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if tensor is None else tensor.to(dtype) for tensor in tensors]

        weights = [weight.to(dtype) for weight in self.weights]
        return replace(self, x=self.x.to(dtype), weights=weights, biases=move(self.biases), scales=move(self.scales))

    def penalize(self, kind: str, backend: str = "native") -> tuple[Tensor, Tensor, list[Tensor]]:
        lists = self.weights, self.biases, self.slopes, self.scales
        return penalize(self.x, *lists, kind, WEIGHT, TARGET, backend=backend)[:3]


def draw(
    widths: Sequence[int],
    batch: int,
    dtype: torch.dtype,
    *,
    slopes: Sequence[float] = (),
    scaled: Sequence[bool] = (),
    biased: bool = True,
    seed: int = 0,
) -> Critic:
    """A critic with gradients of norms around 1, and samples at which no rounding changes the sign of a z."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()

    depth = len(widths)
    slopes = list(slopes) or [(0.2, 0.0, 1.0)[layer % 3] for layer in range(depth - 1)]
    x = normal(batch, widths[0])
    weights, biases, scales = [], [], []
    a = x
    for layer, (before, width) in enumerate(zip(widths, [*widths[1:], 1], strict=True)):
        w = (normal(width, before) * math.sqrt(2 / before)).to(dtype).double()
        weights.append(w)
        biases.append(None)
        if layer == depth - 1:
            break
        z = a @ w.T
        if biased:
            # Of some biases, the one that leads furthest away from 0.
            candidates = torch.randn(32, width, generator=generator, dtype=torch.float64).to(dtype).double()
            margins = (z + candidates.unsqueeze(1)).abs().amin(1)
            b = candidates.gather(0, margins.argmax(0, keepdim=True))[0]
            z = z + b
            biases[-1] = b
        scale = None
        if scaled and scaled[layer]:
            scale = 2.0 * torch.randint(0, 2, z.shape, generator=generator).double()
        scales.append(scale)
        a = F.leaky_relu(z, slopes[layer]) * (1.0 if scale is None else scale)
        # Of z, sums of `before` products with numbers around 1 are rounded.
        assert not biased or z.abs().min() > 8 * before * torch.finfo(dtype).eps
    return Critic(x, weights, biases, slopes, scales).to(dtype)


def penalty_of(norms: Tensor, kind: str) -> Tensor:
    if kind == "squared":
        return WEIGHT * norms.square().mean() / 2
    if kind == "max":
        return WEIGHT * (norms.amax() - TARGET).square()
    excess = norms - TARGET if kind == "two-sided" else (norms - TARGET).clamp_min(0)
    return WEIGHT * excess.square().mean()


def scores_of(critic: Critic, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """``[B, 1]``, by PyTorch."""
    a = x
    for layer, weight in enumerate(weights):
        a = F.linear(a, weight, biases[layer])
        if layer < len(weights) - 1:
            scale = critic.scales[layer]
            a = F.leaky_relu(a, critic.slopes[layer]) * (1.0 if scale is None else scale)
    return a


def double_backward(critic: Critic, kind: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The textbook: differentiate the critic, then the penalty, in the dtype of the critic."""
    x = critic.x.clone().requires_grad_()
    weights = [weight.clone().requires_grad_() for weight in critic.weights]
    biases = [None if bias is None else bias.clone().requires_grad_() for bias in critic.biases]
    a = scores_of(critic, x, weights, biases)
    (g,) = torch.autograd.grad(a.sum(), x, create_graph=True)
    norms = g.norm(dim=1)
    penalty = penalty_of(norms, kind)
    grads = torch.autograd.grad(penalty, weights, retain_graph=True)
    reached = [bias for bias in biases if bias is not None]
    for grad in torch.autograd.grad(penalty, reached, allow_unused=True) if reached else ():
        assert grad is None or not grad.any(), "a bias has a gradient after all"
    return penalty.detach(), norms.detach(), list(grads)


def magnitudes(critic: Critic, kind: str) -> tuple[float, float, list[float], float]:
    """What the terms of penalty, norms and gradients add up to without their signs, and the roundings of a term.

    A sum of n products is off by at most n eps times the sum of their sizes, so every step is bounded by the same
    step over absolute values, times the roundings so far: d_l and 2 for each layer, in backward and in tangent, and the
    batch for a weight's gradient. An error of eps in terms of g of the size |g|_abs is a relative error of
    eps |g|_abs / |g| of n and of 1 / n, and an absolute one of eps |g|_abs of n - target.
    """
    wide = critic.to(torch.float64)
    batch = len(wide.x)
    factors, a = [], wide.x
    for w, b, slope, scale in zip(wide.weights, wide.biases, wide.slopes, wide.scales, strict=False):
        z = F.linear(a, w, b)
        factors.append(torch.where(z > 0, 1.0, slope) * (1.0 if scale is None else scale))
        a = z * factors[-1]
    deltas, delta, signed = [], torch.ones(batch, 1, dtype=torch.float64), torch.ones(batch, 1, dtype=torch.float64)
    for layer in range(len(wide.weights) - 1, -1, -1):
        deltas.insert(0, delta)
        factor = factors[layer - 1] if layer > 0 else torch.ones(())
        delta, signed = (delta @ wide.weights[layer].abs()) * factor.abs(), (signed @ wide.weights[layer]) * factor
    norms, sizes = signed.norm(dim=1), delta.norm(dim=1)
    amplified = torch.where(norms > 0, sizes / norms, 1.0)
    slope = WEIGHT * (norms + sizes) / batch if kind == "squared" else 2 * WEIGHT * (norms + sizes + TARGET) / batch
    if kind == "max":
        slope = slope * batch
    tangent = delta * (slope * (1 + amplified) / torch.where(norms > 0, norms, 1.0)).unsqueeze(1)
    grads = []
    for layer, w in enumerate(wide.weights):
        grads.append(float((deltas[layer].T @ tangent).max()))
        if layer < len(factors):
            tangent = (tangent @ w.abs().T) * factors[layer].abs()
    roundings = 2 * sum(w.shape[1] + 2 for w in wide.weights) + batch + 8
    penalty = WEIGHT * float((sizes + TARGET).square().max()) * 2
    return penalty, float(sizes.max()), grads, roundings


def compare(critic: Critic, kind: str, ours: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    truth = double_backward(critic.to(torch.float64), kind)
    peer = double_backward(critic, kind)
    penalty, norms, grads, roundings = magnitudes(critic, kind)
    assert_as_accurate(ours[0], peer[0], truth[0], roundings=roundings, scale=penalty)
    assert_as_accurate(ours[1], peer[1], truth[1], roundings=roundings, scale=norms)
    for weight, grad, theirs, exact, scale in zip(critic.weights, ours[2], peer[2], truth[2], grads, strict=True):
        assert grad.is_contiguous()
        assert grad.shape == weight.shape
        assert_as_accurate(grad, theirs, exact, roundings=roundings, scale=scale)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("widths", "batch"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native(isa: str, dtype: torch.dtype, widths: list[int], batch: int, kind: str) -> None:
    critic = draw(widths, batch, dtype, scaled=[layer % 2 == 0 for layer in range(len(widths))])
    before = critic.to(torch.float64)
    compare(critic, kind, critic.penalize(kind))
    after = critic.to(torch.float64)
    assert torch.equal(before.x, after.x), "an input was changed"
    assert all(map(torch.equal, before.weights, after.weights)), "an input was changed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("widths", "batch"), SHAPES[:6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype: torch.dtype, widths: list[int], batch: int, kind: str) -> None:
    critic = draw(widths, batch, dtype, scaled=[layer % 2 == 1 for layer in range(len(widths))])
    compare(critic, kind, critic.penalize(kind, "reference"))


@pytest.mark.backend("triton")
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("widths", "batch"), SHAPES[:-1])
def test_triton(dtype: torch.dtype, widths: list[int], batch: int) -> None:
    critic = draw(widths, batch, dtype, scaled=[layer % 2 == 0 for layer in range(len(widths))])
    before = critic.to(torch.float64)
    for kind in ("two-sided", "max"):
        compare(critic, kind, critic.penalize(kind, "triton"))
    after = critic.to(torch.float64)
    assert torch.equal(before.x, after.x), "an input was changed"
    assert all(map(torch.equal, before.weights, after.weights)), "an input was changed"


@pytest.mark.backend("native")
@pytest.mark.parametrize(("widths", "batch", "scaled"), [([2, 128, 128, 128], 256, False), ([640, 256, 256], 50, True)])
def test_error_at_the_sizes_of_the_benchmark(widths: list[int], batch: int, scaled: bool) -> None:
    # Among thousands of entries, the largest error says how sums are rounded in general: no worse than PyTorch's, and
    # without the room that a bound of the worst case leaves.
    critic = draw(widths, batch, torch.float32, slopes=[0.2] * (len(widths) - 1), scaled=[scaled] * len(widths))
    ours, peer = critic.penalize("two-sided"), double_backward(critic, "two-sided")
    truth = double_backward(critic.to(torch.float64), "two-sided")
    assert_as_accurate(ours[0], peer[0], truth[0], roundings=4)
    assert_as_accurate(ours[1], peer[1], truth[1], roundings=4)
    for grad, theirs, exact in zip(ours[2], peer[2], truth[2], strict=True):
        assert_as_accurate(grad, theirs, exact, roundings=4)


@pytest.mark.backend("native")
@given(
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    batch=st.integers(1, 40),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    threads=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_any_critic(
    widths: list[int], batch: int, data: st.DataObject, dtype: torch.dtype, kind: str, threads: int, seed: int
) -> None:
    hidden = len(widths) - 1
    slopes = data.draw(st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0, 1.5]), min_size=hidden, max_size=hidden))
    scaled = data.draw(st.lists(st.booleans(), min_size=hidden, max_size=hidden))
    critic = draw(widths, batch, dtype, slopes=slopes, scaled=scaled, seed=seed)
    before = torch.get_num_threads()
    _C.poison_outputs(True)
    torch.set_num_threads(threads)
    try:
        dense = critic.penalize(kind)
        # The same values behind other strides.
        strided = replace(
            critic,
            x=critic.x.T.contiguous().T,
            weights=[weight.T.contiguous().T for weight in critic.weights],
            biases=[None if bias is None else bias.repeat_interleave(2)[::2] for bias in critic.biases],
            scales=[None if scale is None else scale.T.contiguous().T for scale in critic.scales],
        ).penalize(kind)
    finally:
        torch.set_num_threads(before)
        _C.poison_outputs(False)
    compare(critic, kind, dense)
    for one, other in zip((*dense[:2], *dense[2]), (*strided[:2], *strided[2]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.backend("native")
@pytest.mark.usefixtures("threads", "poisoned_outputs")
@pytest.mark.parametrize("kind", ["two-sided", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("widths", "batch"),
    [([3, 96, 100], 400), ([130, 300, 301], 20), ([40, 500, 7, 90], 33)],
    ids=["by samples", "by columns", "narrow"],
)
def test_result_does_not_depend_on_the_number_of_threads(
    widths: list[int], batch: int, dtype: torch.dtype, kind: str
) -> None:
    critic = draw(widths, batch, dtype)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        penalty, norms, grads = critic.penalize(kind)
        results.append((penalty, norms, *grads))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    compare(critic, kind, (results[0][0], results[0][1], list(results[0][2:])))


# ---- with a loss ----


def textbook_with_loss(
    critic: Critic, kind: str, score_grads: Tensor, penalized: range
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The penalty, and the gradients of the penalty of some samples plus <score_grads, scores>, by autograd."""
    x = critic.x.clone().requires_grad_()
    weights = [weight.clone().requires_grad_() for weight in critic.weights]
    biases = [
        (torch.zeros(len(w), dtype=x.dtype) if b is None else b.clone()).requires_grad_()
        for w, b in zip(weights, critic.biases, strict=True)
    ]
    a = scores_of(critic, x, weights, biases)
    (g,) = torch.autograd.grad(a.sum(), x, create_graph=True)
    penalty = penalty_of(g[penalized.start : penalized.stop].norm(dim=1), kind)
    grads = torch.autograd.grad(penalty + (score_grads * a[:, 0]).sum(), [*weights, *biases])
    return penalty.detach(), [*grads[: len(weights)]], [*grads[len(weights) :]]


def activations_of(critic: Critic) -> list[Tensor]:
    """Of a critic without scales."""
    activations, a = [], critic.x
    for weight, bias, slope in zip(critic.weights, critic.biases, critic.slopes, strict=False):
        a = F.leaky_relu(F.linear(a, weight, bias), slope)
        activations.append(a)
    return activations


def with_loss(
    critic: Critic, kind: str, score_grads: Tensor, penalized: range, backend: str, activations: Sequence[Tensor] = ()
) -> Any:
    lists = critic.weights, critic.biases, critic.slopes, critic.scales
    options: Any = {"activations": activations, "backend": backend}
    return penalize_with_loss(critic.x, *lists, kind, WEIGHT, TARGET, score_grads, penalized, **options)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("known", [False, True], ids=["computed", "known"])
@pytest.mark.parametrize("backend", ["reference", "native"])  # "triton": tests/kernels/test_mlp_gradient_penalty.py
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("widths", "batch"), SHAPES)
def test_a_loss_comes_along(widths: list[int], batch: int, kind: str, backend: str, known: bool) -> None:
    scaled = [layer % 2 == 0 and not known for layer in range(len(widths))]
    critic = draw(widths, batch, torch.float64, scaled=scaled)
    score_grads = torch.randn(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    activations = activations_of(critic) if known else ()
    parts = {(0, batch), (0, (batch + 1) // 2), (batch // 2, batch), (batch // 3, batch // 3 + 1)}
    for first, last in parts:
        penalty, norms, grads, bias_grads = with_loss(
            critic, kind, score_grads, range(first, last), backend, activations
        )
        truth, weights, biases = textbook_with_loss(critic, kind, score_grads, range(first, last))
        assert norms.shape == (last - first,)
        torch.testing.assert_close(penalty, truth, rtol=1e-11, atol=0.0)
        for ours, theirs in zip([*grads, *bias_grads], [*weights, *biases], strict=True):
            scale = max(1.0, float(theirs.abs().max()))
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-11 * scale)


@pytest.mark.backend("native")
@pytest.mark.usefixtures("threads", "poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("widths", "batch"),
    [([3, 96, 100], 400), ([130, 300, 301], 20), ([40, 500, 7, 90], 33)],
    ids=["by samples", "by columns", "narrow"],
)
@pytest.mark.parametrize("known", [False, True], ids=["computed", "known"])
def test_with_a_loss_too_the_threads_do_not_count(
    widths: list[int], batch: int, dtype: torch.dtype, known: bool, isa: str
) -> None:
    critic = draw(widths, batch, dtype)
    score_grads = torch.randn(batch, dtype=dtype)
    activations = activations_of(critic) if known else ()  # once: PyTorch's products may depend on the threads
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        part = range(batch // 3, batch)
        penalty, norms, grads, bias_grads = with_loss(critic, "max", score_grads, part, "native", activations)
        results.append((penalty, norms, *grads, *bias_grads))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    wide = critic.to(torch.float64)
    _, weights, biases = textbook_with_loss(wide, "max", score_grads.double(), range(batch // 3, batch))
    for ours, theirs in zip(results[0][2:], [*weights, *biases], strict=True):
        bound = {torch.float32: 1e-4, torch.float64: 1e-12}[dtype] * max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours.double(), theirs, rtol=0.0, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_without_a_derivative_adds_nothing(backend: str) -> None:
    critic = draw([4, 7, 5], 6, torch.float64, slopes=[0.2, 0.2])
    penalty, norms, grads = critic.penalize("two-sided", backend)
    zeros = torch.zeros(6, dtype=torch.float64)
    with_zeros = with_loss(critic, "two-sided", zeros, range(6), backend)
    assert all(map(torch.equal, (penalty, norms, *grads), (*with_zeros[:2], *with_zeros[2])))
    assert not any(grad.any() for grad in with_zeros[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_critic_has_a_closed_form(backend: str) -> None:
    # Also a critic without activations: the product of its weights.
    critic = draw([5, 4, 3], 6, torch.float64, slopes=[1.0, 1.0])
    w = critic.weights[2] @ critic.weights[1] @ critic.weights[0]
    expected = WEIGHT * (w.norm() - TARGET) ** 2
    for x, weights in ((critic.x, critic.weights), (critic.x, [w])):
        hidden = len(weights) - 1
        penalty, norms, grads, _ = penalize(
            x,
            weights,
            [None] * (hidden + 1),
            [1.0] * hidden,
            [None] * hidden,
            "two-sided",
            WEIGHT,
            TARGET,
            backend=backend,
        )
        assert torch.allclose(penalty, expected, rtol=1e-13)
        assert torch.allclose(norms, w.norm().expand(6), rtol=1e-13)
    assert torch.allclose(grads[0], 2 * WEIGHT * (w.norm() - TARGET) * w / w.norm(), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(backend: str, kind: str) -> None:
    critic = draw([3, 6, 4], 5, torch.float64)
    _, _, grads = critic.penalize(kind, backend)
    for layer, grad in enumerate(grads):
        direction = torch.randn_like(grad)

        def moved(step: float, layer: int = layer, direction: Tensor = direction) -> Tensor:
            weights = list(critic.weights)
            weights[layer] = weights[layer] + step * direction
            return replace(critic, weights=weights).penalize(kind, backend)[0]

        # A step of 1e-5 leaves an error of about 1e-10 in each of its two parts, truncation and rounding.
        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert abs(float(slope - (grad * direction).sum())) <= 1e-8 * float(1 + slope.abs())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_norms_are_safe(backend: str, kind: str, dtype: torch.dtype) -> None:
    critic = draw([4, 20, 18], 8, dtype, slopes=[0.0, 0.0])
    # Samples 2 and 5 have no active unit left in the first layer: their gradient is zero.
    scale = torch.ones(8, 20, dtype=dtype)
    scale[[2, 5]] = 0
    critic = replace(critic, scales=[scale, None])
    penalty, norms, grads = critic.penalize(kind, backend)
    assert norms[[2, 5]].tolist() == [0, 0]
    assert norms[[0, 1, 3, 4, 6, 7]].all()
    alive = torch.tensor([0, 1, 3, 4, 6, 7])
    others = replace(critic, x=critic.x[alive], scales=[scale[alive], None]).penalize(kind, backend)
    # A mean over 8 where the others have a mean over 6; the zero norms themselves add (0 - target)^2.
    share = 1.0 if kind == "max" else 6 / 8
    for grad, theirs in zip(grads, others[2], strict=True):
        assert torch.allclose(grad, theirs * share, rtol=1e-4, atol=1e-6)
    assert torch.allclose(penalty, penalty_of(norms, kind), rtol=1e-5)
    zero = replace(critic, weights=[torch.zeros_like(weight) for weight in critic.weights])
    penalty, norms, grads = zero.penalize(kind, backend)
    assert not norms.any()
    assert torch.allclose(penalty, penalty_of(norms, kind), rtol=1e-6)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_derivative_at_zero_is_the_slope(backend: str, slope: float) -> None:
    # Without biases every z at x = 0 is 0, exactly.
    critic = draw([3, 7, 5], 4, torch.float64, slopes=[slope, slope])
    critic = replace(critic, x=torch.zeros_like(critic.x), biases=[None, None, None])
    _, norms, _ = critic.penalize("two-sided", backend)
    w = critic.weights
    assert torch.allclose(norms, ((w[2] @ w[1] @ w[0]).norm() * slope**2).expand(4), rtol=1e-13)
    if slope > 0:
        compare(critic, "two-sided", critic.penalize("two-sided", backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_share_the_maximum(backend: str) -> None:
    critic = draw([3, 17], 4, torch.float32)
    doubled = replace(critic, x=critic.x.repeat(2, 1))
    for one, other in zip(critic.penalize("max", backend)[2], doubled.penalize("max", backend)[2], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-200), (torch.float64, 1e200)],
)
def test_norms_far_from_one(backend: str, dtype: torch.dtype, size: float) -> None:
    critic = draw([5, 9], 4, dtype)
    _, norms, _ = critic.penalize("two-sided", backend)
    large = replace(critic, weights=[critic.weights[0], critic.weights[1] * size])
    _, scaled, grads = large.penalize("one-sided", backend)
    assert torch.allclose(scaled / size, norms, rtol=1e-5 if dtype == torch.float32 else 1e-13)
    if size < 1:
        assert not any(grad.any() for grad in grads)
        # Below the target, the two-sided gradient is that of -2 target |g| / B: it does not depend on the size.
        _, _, grads = large.penalize("two-sided", backend)
        directions = replace(critic, weights=[critic.weights[0], critic.weights[1] * 1e-9]).penalize(
            "two-sided", backend
        )[2]
        assert torch.allclose(grads[1], directions[1], rtol=1e-5)
        assert grads[1].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_propagates(backend: str, kind: str) -> None:
    critic = draw([3, 17, 5], 6, torch.float32, slopes=[0.0, 0.0])
    for layer in (None, 0, 1, 2):
        x, weights = critic.x.clone(), [weight.clone() for weight in critic.weights]
        (x if layer is None else weights[layer])[0, 1] = math.nan
        penalty, norms, _ = replace(critic, x=x, weights=weights).penalize(kind, backend)
        assert penalty.isnan()
        assert norms.isnan().tolist() == [True] + [layer is not None] * 5


def arguments(critic: Critic, loss: tuple[object, ...], backend: str | None, smooth: bool) -> tuple[object, ...]:
    lists = (critic.weights, critic.biases, critic.slopes, critic.scales)
    hidden = len(critic.slopes) if smooth else 0
    curves = [["tanh"] * hidden, [0.0] * 3 * hidden]
    return (critic.x, *lists, "two-sided", WEIGHT, TARGET, *loss, *curves, backend)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("widths", "scaled"), [([3], []), ([4, 7, 5], [True, False])])
@pytest.mark.parametrize("loss", [(None, [], 0, 6), (torch.ones(6), [], 2, 5)], ids=["penalty", "with loss"])
@pytest.mark.parametrize("smooth", [False, True], ids=["piecewise linear", "smooth"])
def test_opcheck(
    backend: str | None, widths: list[int], scaled: list[bool], loss: tuple[object, ...], smooth: bool
) -> None:
    critic = draw(widths, 6, torch.float32, scaled=scaled)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    op = torch.ops.lipgan.mlp_gradient_penalty_fwd.default
    torch.library.opcheck(op, arguments(critic, loss, backend, smooth), test_utils=checks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_require_gradients(backend: str) -> None:
    critic = draw([4, 7], 6, torch.float32)
    critic = replace(critic, weights=[torch.nn.Parameter(weight) for weight in critic.weights])
    with torch.profiler.profile() as profile:
        traced = critic.penalize("two-sided", backend)
    assert "lipgan::mlp_gradient_penalty_fwd" in {event.key for event in profile.key_averages()}
    plain = critic.penalize("two-sided", backend)
    for one, other in zip((*plain[:2], *plain[2]), (*traced[:2], *traced[2]), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
        assert not other.requires_grad


@pytest.mark.backend("native")
def test_modes_see_the_op() -> None:
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names() as mode:
        draw([4, 7], 6, torch.float32).penalize("squared")
    assert "lipgan.mlp_gradient_penalty_fwd.default" in mode.names
    with FakeTensorMode():
        x, weights = torch.empty(6, 4), [torch.empty(7, 4), torch.empty(1, 7)]
        penalty, norms, grads, none = penalize(x, weights, [None, None], [0.0], [None], "squared", 1.0, 1.0)
        smooth = {"curves": ["tanh"], "constants": [0.0] * 3}
        *_, bias_grads = penalize(x, weights, [None, None], [0.0], [None], "squared", 1.0, 1.0, **smooth)
    assert [tuple(t.shape) for t in (penalty, norms, *grads)] == [(), (6,), (7, 4), (1, 7)]
    assert none == []
    assert [tuple(grad.shape) for grad in bias_grads] == [(7,), (1,)]


@pytest.mark.cpu
@pytest.mark.backend("native")
def test_native_module_refuses_what_a_kernel_could_not_survive() -> None:
    critic = draw([4, 7], 6, torch.float32, scaled=[True])
    x, w, b, s = critic.x, critic.weights, critic.biases, critic.scales

    def call(kind: str = "max", **changes: object) -> object:
        given = {"x": x, "weights": w, "biases": b, "slopes": [0.0], "scales": s, **changes}
        return penalize(*given.values(), kind, 1.0, 1.0, backend="native")  # type: ignore[arg-type]

    for changes, message in (
        ({"x": x[:, :3]}, "weight must hold 21 elements, got 28"),
        ({"x": x[:0]}, "x must hold at least one sample"),
        ({"x": x[0]}, "x must have 2 dimensions"),
        ({"weights": [w[0], w[1][:, :6]]}, "weight must hold 7 elements, got 6"),
        ({"weights": [w[0], torch.ones(2, 7)]}, "the last weight must have one row"),
        ({"weights": [w[0][:0], w[1][:, :0]]}, "a weight must not be empty"),
        ({"weights": [w[0], w[1][0]]}, "a weight must have 2 dimensions"),
        ({"weights": [w[0].double(), w[1]]}, "weight has a dtype"),
        ({"weights": [], "biases": [], "slopes": [], "scales": []}, "at least one layer"),
        ({"biases": [torch.ones(6), None]}, "bias must hold 7 elements, got 6"),
        ({"biases": [None]}, "differ in length"),
        ({"slopes": []}, "differ in length"),
        ({"scales": []}, "differ in length"),
        ({"scales": [torch.ones(5, 7)]}, "scale must hold 42 elements, got 35"),
        ({"scales": [torch.ones(6, 7).double()]}, "scale has a dtype"),
        ({"kind": "three-sided"}, "kind must be one of two-sided, one-sided, squared, max, got 'three-sided'"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)  # type: ignore[arg-type]
    for backend in BACKENDS:
        with pytest.raises(TypeError, match=r"x must be float32 or float64, got torch\.float16"):
            penalize(x.half(), w, b, [0.0], s, "max", 1.0, 1.0, backend=backend)
    with pytest.raises(TypeError, match="weight must be a tensor"):
        _C.mlp_gradient_penalty_fwd(x, [1.0, w[1]], b, [0.0], s, "max", 1.0, 1.0, None, [], 0, 6, [], [], 1)  # type: ignore[list-item]
    for first, last in ((0, 7), (-1, 6), (3, 3)):
        with pytest.raises(ValueError, match="first and last must be of samples"):
            _C.mlp_gradient_penalty_fwd(x, w, b, [0.0], s, "max", 1.0, 1.0, None, [], first, last, [], [], 1)
    with pytest.raises(ValueError, match="score_grads must hold 6 elements, got 5"):
        _C.mlp_gradient_penalty_fwd(x, w, b, [0.0], s, "max", 1.0, 1.0, torch.ones(5), [], 0, 6, [], [], 1)
    a = torch.ones(6, 7)
    for slope, scale, known, message in (
        (0.0, s[0], [a], "must have no scale, and a slope that is not negative"),
        (-1.0, None, [a], "must have no scale, and a slope that is not negative"),
        (0.0, None, [a, a], "differ in length"),
        (0.0, None, [a[:5]], "activation must hold 42 elements, got 35"),
        (0.0, None, [a.double()], "activation has a dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.mlp_gradient_penalty_fwd(x, w, b, [slope], [scale], "max", 1.0, 1.0, a[:, 0], known, 0, 6, [], [], 1)
    with pytest.raises(UnavailableError, match="backend 'cuda' cannot serve mlp_gradient_penalty on cpu"):
        critic.penalize("max", "cuda")


def test_serves_what_the_op_takes() -> None:
    assert serves(1, [1, 1], torch.float32, "cpu")
    assert serves(256, [2, 128, 128, 1], torch.float64, "cpu")
    for batch, widths, dtype in (
        (0, [2, 1], torch.float32),
        (4, [2, 3], torch.float32),
        (4, [0, 3, 1], torch.float32),
        (4, [2, 1], torch.bfloat16),
    ):
        assert not serves(batch, widths, dtype, "cpu")


@pytest.mark.backend("native")
def test_workspace_is_given_back() -> None:
    critic = draw([32, 64, 64], 200, torch.float32)
    empty_cache()
    critic.penalize("two-sided")
    kept = _C.cached_bytes()
    assert kept >= 3 * 200 * 128 * 4
    critic.penalize("two-sided")
    assert _C.cached_bytes() == kept
    assert empty_cache() == kept


@pytest.mark.backend("native")
def test_calls_from_several_threads_at_once() -> None:
    critics = [draw([30, 130, 70], 40, torch.float32, seed=seed) for seed in range(6)]
    expected = [critic.penalize("two-sided") for critic in critics]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for ours, first in zip(pool.map(lambda c: c.penalize("two-sided"), critics), expected, strict=True):
                assert all(map(torch.equal, (*ours[:2], *ours[2]), (*first[:2], *first[2])))
