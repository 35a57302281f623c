"""The tape against independent truths, and in lower precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tape_critics import IMAGES, Function, Outcome, after_conv, assert_same, run, samples
from torch import Tensor, nn

import lipgan

# ---- independent truths ----


@pytest.mark.parametrize("target", [0.0, 1.0, 2.5])
def test_closed_form_of_a_linear_critic(target: float) -> None:
    real, fake = samples((5, 4))
    critic = nn.Linear(4, 1).double()
    flat = Function(lambda x: x + 0)  # keeps the special case of perceptrons away
    penalty = lipgan.gradient_penalty(
        nn.Sequential(flat, critic), real, fake, target=target, weight=3.0, engine="fused"
    )
    penalty.backward()
    w = critic.weight.detach()[0]
    assert penalty.item() == pytest.approx(3 * (w.norm().item() - target) ** 2, rel=1e-12)
    expected = 6 * (w.norm() - target) * w / w.norm()
    assert critic.weight.grad is not None
    torch.testing.assert_close(critic.weight.grad[0], expected, rtol=1e-12, atol=1e-13)
    assert critic.bias.grad is None or not critic.bias.grad.any()


def test_closed_form_of_a_quadratic_critic() -> None:
    # |(A + A^T) x|^2 / 2 and its derivative, symmetric in A.
    x, _ = samples((5, 4))
    critic = Function(lambda x, a: ((x @ a) * x).sum(1), (4, 4)).double()
    penalty = lipgan.gradient_penalty(critic, x, kind="r1", weight=1.0, engine="fused")
    penalty.backward()
    a = critic.tensors[0].detach()
    g = x @ (a + a.T)
    assert penalty.item() == pytest.approx(0.5 * g.square().sum(1).mean().item(), rel=1e-12)
    torch.testing.assert_close(critic.tensors[0].grad, (x.T @ g + g.T @ x) / 5, rtol=1e-12, atol=1e-12)


def test_finite_differences() -> None:
    x, _ = samples((2, 2, 5, 5))
    torch.manual_seed(0)
    critic = after_conv(nn.SiLU, lambda: nn.GroupNorm(2, 4), lambda: nn.Conv2d(4, 2, 3))().double()
    parameters = list(critic.parameters())

    def value() -> Tensor:
        return lipgan.gradient_penalty(critic, x, kind="r1", engine="fused")

    grads = torch.autograd.grad(value(), parameters)
    direction = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum(float((grad * along).sum()) for grad, along in zip(grads, direction, strict=True))
    values, step = [], 1e-4
    for factor in (-2, -1, 1, 2):
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.add_(along, alpha=factor * step)
            values.append(value().item())
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.sub_(along, alpha=factor * step)
    # Fourth order in the step: its error is near 1e-16 of the value over the step.
    difference = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    assert slope == pytest.approx(difference, rel=1e-7)


def test_sampling_on_a_grid_that_autograd_differentiates_once() -> None:
    grid = torch.linspace(-0.9, 0.9, 3 * 4 * 4 * 2, dtype=torch.float64).view(3, 4, 4, 2)
    basis = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6)
    matrices = torch.stack(
        [F.grid_sample(basis, g.expand(36, 4, 4, 2), align_corners=False).view(36, 16) for g in grid]
    )

    def sampled(x: Tensor) -> Tensor:
        return F.grid_sample(x, grid, align_corners=False)

    def as_product(x: Tensor) -> Tensor:
        return (x.flatten(2) @ matrices).view(3, -1, 4, 4)

    real, fake = samples(IMAGES)
    outcomes = [
        run(after_conv(lambda f=f: Function(f), lambda: nn.Conv2d(4, 3, 2)), real, fake, engine)
        for f, engine in ((sampled, "fused"), (as_product, "autograd"))
    ]
    assert_same(*outcomes)


# ---- lower precision ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_in_lower_precision(dtype: torch.dtype) -> None:
    build = after_conv(
        lambda: nn.GroupNorm(2, 4), nn.SiLU, lambda: nn.Conv2d(4, 8, 3, 2), nn.Flatten, lambda: nn.Linear(32, 3)
    )
    real, fake = samples(IMAGES)
    real, fake = real.to(dtype), fake.to(dtype)

    def outcome(engine: str, dtype: torch.dtype) -> Outcome:
        # The parameters of the float64 critic are those of the other, rounded.
        rounded = lambda: build().to(real.dtype)  # noqa: E731
        return run(rounded, real.to(dtype), fake.to(dtype), engine, dtype=dtype, kind="r1")

    truth, theirs, ours = outcome("autograd", torch.float64), outcome("autograd", dtype), outcome("fused", dtype)

    def error(outcome: Outcome) -> float:
        pairs = [(grad, exact) for grad, exact in zip(outcome.grads, truth.grads, strict=True)]
        return max(float((a.double() - b).abs().max()) for a, b in pairs if a is not None and b is not None)

    # The floor: some ten operations in sequence, each of a rounding.
    largest = max(float(grad.abs().max()) for grad in truth.grads if grad is not None)
    assert error(ours) <= 2 * error(theirs) + 10 * torch.finfo(dtype).eps * largest
    assert abs(float(ours.value) - float(truth.value)) <= 2 * abs(float(theirs.value) - float(truth.value)) + 10 * (
        torch.finfo(dtype).eps * float(truth.value)
    )
