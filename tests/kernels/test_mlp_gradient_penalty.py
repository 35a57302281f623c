"""The Triton kernels of mlp_gradient_penalty, in Triton's interpreter; tests/ops/test_mlp_gradient_penalty.py and its
smooth twin compare the op with autograd."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from lipgan.kernels import mlp_gradient_penalty as kernels
from lipgan.kernels.activations import CURVES, activated
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lipgan.bench import overhead
from lipgan.reference import mlp_gradient_penalty as reference

pytestmark = pytest.mark.interpreter

CONSTANTS = {"softplus": (1.5, 3.0, 0.0), "elu": (1.25, 0.875, 0.75)}
EXTREMES = [0.0, -0.0, 1e-30, -1e-30, 19.0, -19.0, 40.0, -40.0, 120.0, -120.0, 800.0, -800.0, 1e30, -1e30]
EXTREMES += [math.inf, -math.inf, math.nan]


@triton.jit
def _activated_kernel(z, out, c0: tl.float64, c1: tl.float64, c2: tl.float64, CURVE: tl.constexpr, N: tl.constexpr):
    T: tl.constexpr = z.dtype.element_ty
    at = tl.arange(0, N)
    a, m, bend = activated(tl.load(z + at), tl.full([], c0, T), tl.full([], c1, T), tl.full([], c2, T), CURVE)
    tl.store(out + at, a)
    tl.store(out + N + at, m)
    tl.store(out + 2 * N + at, bend)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, at infinite z
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curve", CURVES)
def test_activations(curve: str, dtype: torch.dtype) -> None:
    z = torch.cat([torch.tensor(EXTREMES), torch.linspace(-9.03, 9.03, 128 - len(EXTREMES))]).to(dtype)
    out = torch.empty(3, 128, dtype=dtype)
    constants = CONSTANTS.get(curve, (0.0, 0.0, 0.0))
    _activated_kernel[(1,)](z, out, *constants, CURVE=curve, N=128)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for ours, theirs in zip(out, reference.activate(curve, z.double(), constants), strict=True):
        # The z of the largest numbers leave float32 in the formulas of either; what is below its normal numbers is 0.
        size = torch.where(theirs.isfinite(), theirs.abs(), 0.0).clamp_max(torch.finfo(dtype).max)
        far = z.double().abs().clamp(1.0, 1e4) ** (3 if "gelu" in curve else 1)
        bound = 8 * eps * far * size + eps * far * (z.abs() < 50) + 4 * tiny * z.double().abs().clamp(1.0, 1e30)
        same = (ours.double() == theirs) | (ours.isnan() & theirs.isnan())
        assert (same | ((ours.double() - theirs).abs() <= bound)).all(), (ours, theirs)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(outcome: tuple[Tensor, Tensor, list[Tensor], list[Tensor]]) -> list[Tensor]:
    penalty, norms, grads, bias_grads = outcome
    return [penalty, norms, *grads, *bias_grads]


def check(arguments: tuple[Any, ...]) -> None:
    """A call against the reference, in float64, and against itself."""
    ours = kernels.mlp_gradient_penalty_fwd(*arguments)
    for one, other in zip(flat(ours), flat(reference.mlp_gradient_penalty_fwd(*arguments)), strict=True):
        assert one.shape == other.shape
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-11 * max(1.0, float(other.abs().max())))
    again = kernels.mlp_gradient_penalty_fwd(*arguments)
    assert all(map(torch.equal, flat(ours), flat(again))), "two calls give different bits"


@pytest.mark.usefixtures("poisoned_outputs")
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_critic(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    batch, hidden = data.draw(st.integers(1, 40)), len(widths) - 1
    loss, smooth = data.draw(st.booleans()), data.draw(st.booleans())
    known = loss and data.draw(st.booleans())
    first = data.draw(st.integers(0, batch - 1)) if loss else 0
    last = data.draw(st.integers(first + 1, batch)) if loss else batch
    curves = [data.draw(st.sampled_from(["", *CURVES])) if smooth else "" for _ in range(hidden)]
    slopes = [data.draw(st.sampled_from([0.0, 0.2, 1.0, 1.5])) for _ in range(hidden)]
    kind = data.draw(st.sampled_from(["two-sided", "one-sided", "squared", "max"]))
    x = draw(0, batch, widths[0])
    weights = [draw(k, b, a) / math.sqrt(a) for k, (a, b) in enumerate(zip(widths, [*widths[1:], 1], strict=True))]
    biases = [draw(9 + k, width) if data.draw(st.booleans()) else None for k, width in enumerate([*widths[1:], 1])]
    scales = [
        2.0 * (draw(30 + k, batch, width) > 0).double() if not known and data.draw(st.booleans()) else None
        for k, width in enumerate(widths[1:])
    ]
    constants = [number for curve in curves for number in CONSTANTS.get(curve, (0.0, 0.0, 0.0))]
    given_activations: list[Tensor] = []
    a = x
    for k in range(hidden if known else 0):
        z = torch.nn.functional.linear(a, weights[k], biases[k])
        a = reference.activate(curves[k], z, constants[3 * k : 3 * k + 3])[0] if curves[k] else None  # type: ignore[assignment]
        a = torch.nn.functional.leaky_relu(z, slopes[k]) if a is None else a
        given_activations.append(z if curves[k] else a)
    arguments = (
        x, weights, biases, slopes, scales, kind, 10.0 / 3.0, 0.7, draw(50, batch) if loss else None,
        given_activations, first, last, curves, constants,
    )  # fmt: skip
    check(arguments)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("curves", [["", ""], ["tanh", ""], ["", "tanh"]])
def test_every_pass(curves: list[str], loss: bool) -> None:
    weights, scales = [draw(1, 5, 3), draw(2, 6, 5), draw(3, 1, 6)], [None, 2.0 * (draw(4, 9, 6) > 0).double()]
    first, last = (2, 7) if loss else (0, 9)
    check((
        draw(0, 9, 3), weights, [draw(5, 5), None, None], [0.2, 0.1], scales, "two-sided", 10.0 / 3.0, 0.7,
        draw(7, 9) if loss else None, [], first, last, curves, [0.0] * 6,
    ))  # fmt: skip


def test_without_a_loss_only_the_samples_with_a_penalty_count() -> None:
    x, weights, scale = draw(0, 9, 3), [draw(1, 5, 3), draw(2, 1, 5)], draw(3, 9, 5)
    tail = "squared", 1.0, 0.0, None, []
    for curves in ([], ["tanh"]):
        of = curves, [0.0] * 3 * len(curves)
        part = kernels.mlp_gradient_penalty_fwd(x, weights, [None, None], [0.2], [scale], *tail, 2, 6, *of)
        alone = kernels.mlp_gradient_penalty_fwd(x[2:6], weights, [None, None], [0.2], [scale[2:6]], *tail, 0, 4, *of)
        assert all(map(torch.equal, flat(part), flat(alone)))


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


def launches(curves: Sequence[str], loss: bool) -> tuple[int, int]:
    """Launches of Triton and products of PyTorch for a perceptron 2-128-128-128-1; all else makes memory or views."""
    sizes = [2, 128, 128, 128, 1]
    weights = [torch.empty(b, a) for a, b in itertools.pairwise(sizes)]
    biases = [torch.empty(b) for b in sizes[1:]]
    x, w = torch.empty(256, 2), torch.empty(256) if loss else None
    arguments = (
        x, weights, biases, [0.2] * 3, [None] * 3, "two-sided", 10.0, 1.0, w, [], 0, 256,
        curves, [0.0] * 3 * len(curves),
    )  # fmt: skip
    with overhead.without_launches() as launched:
        kernels.mlp_gradient_penalty_fwd(*arguments)  # makes the ticket
        launched.clear()
        with _Operations() as mode:
            kernels.mlp_gradient_penalty_fwd(*arguments)
    products = sum(mode.names.pop(name, 0) for name in ("mm.out", "mm.default"))
    # Nothing that waits for a GPU, copies from or to it, or launches.
    free = {"new_empty.default", "empty.memory_format", "empty_like.default", "as_strided.default", "t.default"}
    assert set(mode.names) <= free | {"squeeze.dim", "detach.default"}
    return len(launched), products


def test_a_call_is_few_launches_and_can_be_captured() -> None:
    assert launches([], loss=False) == (10, 12)
    assert launches([], loss=True) == (11, 12)
    assert launches(["tanh"] * 3, loss=False) == (13, 14)
    assert launches(["tanh"] * 3, loss=True) == (13, 14)


def test_what_does_not_fit_is_refused() -> None:
    x, w = torch.randn(6, 4), [torch.randn(7, 4), torch.randn(1, 7)]

    def call(kind: str = "max", loss: Tensor | None = None, last: int = 6, **changes: Any) -> None:
        arguments = {"x": x, "weights": w, "biases": [None, None], "slopes": [0.0], "scales": [None], **changes}
        known, curves = arguments.pop("known", []), arguments.pop("curves", [])
        constants = arguments.pop("constants", [0.0] * 3 * len(curves))
        kernels.mlp_gradient_penalty_fwd(*arguments.values(), kind, 1.0, 1.0, loss, known, 0, last, curves, constants)

    call()
    ones = torch.ones(6, 7)
    for changes, message in (
        ({"x": x[:, :3]}, "weight must hold 21 elements, got 28"),
        ({"x": x[:0]}, "x must hold at least one sample"),
        ({"x": x[0]}, "x must have 2 dimensions"),
        ({"x": x.half()}, "x must be float32 or float64"),
        ({"weights": [w[0], w[1][:, :6]]}, "weight must hold 7 elements, got 6"),
        ({"weights": [w[0], torch.ones(2, 7)]}, "the last weight must have one row"),
        ({"weights": [w[0][:0], w[1][:, :0]]}, "a weight must not be empty"),
        ({"weights": [w[0], w[1][0]]}, "a weight must have 2 dimensions"),
        ({"weights": [w[0].double(), w[1]]}, "weight has a dtype"),
        ({"weights": [], "biases": [], "slopes": [], "scales": []}, "at least one layer"),
        ({"biases": [torch.ones(6), None]}, "bias must hold 7 elements, got 6"),
        ({"biases": [torch.ones(7, device="meta"), None]}, "bias must be on the device of x, cpu, got meta"),
        ({"weights": [w[0].to("meta"), w[1]]}, "weight must be on the device of x, cpu, got meta"),
        ({"biases": [None]}, "differ in length"),
        ({"slopes": []}, "differ in length"),
        ({"scales": [torch.ones(5, 7)]}, "scale must hold 42 elements, got 35"),
        ({"scales": [ones.double()]}, "scale has a dtype"),
        ({"kind": "three-sided"}, "kind must be one of two-sided, one-sided, squared, max, got 'three-sided'"),
        ({"last": 7}, "first and last must be of samples"),
        ({"last": 0}, "first and last must be of samples"),
        ({"loss": torch.ones(5)}, "score_grads must hold 6 elements, got 5"),
        ({"known": [ones, ones]}, "differ in length"),
        ({"known": [ones[:5]]}, "activation must hold 42 elements, got 35"),
        ({"known": [ones], "scales": [ones]}, "must have no scale, and a slope that is not negative"),
        ({"known": [ones], "slopes": [-1.0]}, "must have no scale, and a slope that is not negative"),
        ({"curves": ["tanh", "tanh"]}, "differ in length"),
        ({"curves": ["tanh"], "constants": []}, "constants must hold 3 numbers for each curve, got 0"),
        ({"curves": ["mish"]}, "a curve must be one of tanh, sigmoid, .* or empty, got 'mish'"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)  # type: ignore[arg-type]
