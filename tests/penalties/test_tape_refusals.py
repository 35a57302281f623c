"""What the tape refuses, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tape_critics import VECTORS, after_linear, assert_same, run, samples, stack
from torch import Tensor, nn

import lipgan
from lipgan.penalties import UnsupportedCriticError, explain


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class SquareByNumPy(Square):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.as_tensor(x.numpy(force=True) ** 2)


class DoubleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Own(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("function", [Square, SquareByNumPy, DoubleInPlace, Reversal])
def test_own_functions_are_refused_and_leave_no_trace(function: type[torch.autograd.Function], last: bool) -> None:
    def build() -> nn.Module:
        body = [
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Dropout(0.3),
            lipgan.spectral_norm(nn.Linear(6, 1)),
            Own(function),
        ]
        return nn.Sequential(*body) if last else stack(*body, nn.Linear(1, 2))

    real, fake = samples(VECTORS)
    name = "4" if last else "body.4"
    with pytest.raises(UnsupportedCriticError, match=rf"'{name} \(Own\)'.*{function.__name__}"):
        run(build, real, fake, "fused")
    assert_same(run(build, real, fake, "auto"), run(build, real, fake, "autograd"), 0.0)
    critic = build().double()
    before = {name: buffer.clone() for name, buffer in critic.state_dict().items()}
    state = torch.get_rng_state()
    assert f"{name} (Own)" in str(explain(critic, real))
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in critic.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_generator_of_its_own_is_put_back_too() -> None:
    generator = torch.Generator().manual_seed(5)

    def noisy(h: Tensor) -> Tensor:
        return Square.apply(h * torch.rand(h.shape, generator=generator, dtype=h.dtype))

    real, fake = samples(VECTORS)
    ours = run(after_linear(noisy), real, fake, "auto")
    generator.manual_seed(5)
    assert_same(ours, run(after_linear(noisy), real, fake, "autograd"), 0.0)


def stale_view(h: Tensor) -> Tensor:
    h = h * 1
    view = h[:, ::2]
    h.mul_(2)
    return view


def hooked(h: Tensor) -> Tensor:
    h = h * 1
    h.register_hook(lambda grad: 2 * grad)
    return h


def operand_changed_as_data(h: Tensor) -> Tensor:
    y = torch.nn.functional.leaky_relu(h)  # of which the tape reads the result, and autograd the operand
    h.data.mul_(-2)
    return y + h.tanh()


def result_changed_as_data(h: Tensor) -> Tensor:
    y = h.exp()
    y.data.mul_(2)
    return y * y


def view_transposed_in_place(h: Tensor) -> Tensor:
    h = h * 1
    view = h.view(-1, 2, 3)
    view.transpose_(1, 2)
    return view.sin() * torch.arange(6.0).view(3, 2) + h.sum(1)[:, None, None]


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a view whose base changed": (stale_view, "changed in place by another name"),
    "an operand changed as data": (operand_changed_as_data, "another name, such as .data"),
    "a result changed as data": (result_changed_as_data, "another name, such as .data"),
    "a view transposed in place": (view_transposed_in_place, "shape of a view in place"),
    "a hook on a tensor": (hooked, "hook"),
    "complex numbers": (lambda h: (h * 1j).exp().real, "complex"),
    "complex numbers by conversion": (lambda h: h.to(torch.complex128).exp().real, "hides"),
    "a Fourier transform": (lambda h: torch.fft.rfft(h).abs(), "complex"),
    "draws from probabilities": (lambda h: h.gather(1, torch.multinomial(h.softmax(1), 2)), "random"),
    "a gradient inside": (lambda h: torch.autograd.grad(h.tanh().sum(), h, create_graph=True)[0], "hides"),
    "memory": (lambda h: h.as_strided((3, 3), (6, 2)), "memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_served_by_auto(name: str) -> None:
    function, words = REFUSED[name]
    real, fake = samples(VECTORS)
    with pytest.raises(UnsupportedCriticError, match=words):
        run(after_linear(function), real, fake, "fused")
    ours, theirs = (run(after_linear(function), real, fake, engine) for engine in ("auto", "autograd"))
    assert_same(ours, theirs, 0.0)


def test_a_refusal_survives_a_critic_that_catches_everything() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * grad * x

    def critic(x: Tensor) -> Tensor:
        try:
            return Square.apply(x).sum(1)  # type: ignore[no-any-return, no-untyped-call]
        except Exception:
            return x.sum(1)

    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.raises(UnsupportedCriticError, match="Square"):
        lipgan.gradient_penalty(critic, x, kind="r1", engine="fused")
    # |grad|^2 / 2 = |2 x|^2 / 2
    penalty = lipgan.gradient_penalty(critic, x, kind="r1", weight=1.0)
    assert penalty.item() == pytest.approx(2 * x.square().sum(1).mean().item())


def test_hooks_on_the_gradients_of_modules_are_refused() -> None:
    def build() -> nn.Module:
        critic = stack(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        critic.get_submodule("body.1").register_full_backward_hook(lambda *_: None)
        return critic

    real, fake = samples(VECTORS)
    with pytest.raises(UnsupportedCriticError, match=r"'body.1 \(Tanh\)'"):
        run(build, real, fake, "fused")
