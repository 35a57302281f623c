"""What is remembered of a critic that the tape could not follow, and for how long."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from penalty_critics import ENGINES, FLAT, assert_same, draws, grads_of, samples
from torch import Tensor, nn

from lipgan import gradient_penalty
from lipgan.penalties import engines, explain
from lipgan.penalties.tape import Tape


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class Switched(nn.Module):
    """Hides what it computes as long as ``opaque`` is set."""

    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.opaque = opaque

    def forward(self, x: Tensor) -> Tensor:
        return Opaque.apply(x) if self.opaque else x * x  # type: ignore[no-any-return, no-untyped-call]


class Training(Switched):
    """Hides what it computes in training."""

    def __init__(self) -> None:
        super().__init__(True)

    def forward(self, x: Tensor) -> Tensor:
        return Opaque.apply(x) if self.training else x * x  # type: ignore[no-any-return, no-untyped-call]


def critic_with(module: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), module, nn.Linear(6, 1)).double()


def served_by(critic: nn.Module, x: Tensor = FLAT, engine: str = "auto", **options: Any) -> str:
    penalty = gradient_penalty(critic, x, kind="r1", engine=engine, **options)
    theirs = gradient_penalty(critic, x, kind="r1", engine="autograd", **options)
    assert_same(grads_of(penalty, critic), grads_of(theirs, critic))
    return "fused" if "Precomputed" in type(penalty.grad_fn).__name__ else "autograd"


def hook(*_: Any) -> None:
    pass


def remove_hook(critic: nn.Sequential) -> None:
    critic.handle.remove()


def without_flag(critic: nn.Sequential) -> None:
    critic[1].opaque = False


def replaced(critic: nn.Sequential) -> None:
    critic[1] = nn.Tanh()


def with_backward_hook() -> nn.Sequential:
    critic = critic_with(nn.Tanh())
    object.__setattr__(critic, "handle", critic[1].register_full_backward_hook(hook))
    return critic


def with_forward_hook() -> nn.Sequential:
    critic = critic_with(nn.Tanh())
    handle = critic[1].register_forward_hook(lambda module, args, output: Opaque.apply(output))
    object.__setattr__(critic, "handle", handle)
    return critic


ENDS: dict[str, tuple[Callable[[], nn.Sequential], Callable[[Any], Any]]] = {
    "training": (lambda: critic_with(Training()), lambda critic: critic.eval()),
    "a backward hook that is removed": (with_backward_hook, remove_hook),
    "a forward hook that is removed": (with_forward_hook, remove_hook),
    "a flag": (lambda: critic_with(Switched(True)), without_flag),
    "a module that is replaced": (lambda: critic_with(Switched(True)), replaced),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_refusal_ends_with_its_cause(name: str, tapes: list[Tape]) -> None:
    build, end = ENDS[name]
    critic = build()
    tried = []
    for _ in range(3):
        gradient_penalty(critic, FLAT, kind="r1")
        tried.append(len(tapes))
    assert tried == [1, 1, 1], "the same cause is not tried again"
    assert explain(critic, FLAT) is not None
    end(critic)
    for _ in range(2):
        assert served_by(critic) == "fused"
    assert explain(critic, FLAT) is None


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_are_left_to_autograd_unless_asked_for(kind: type[nn.RNNBase], tapes: list[Tape]) -> None:
    torch.manual_seed(1)
    layer, readout = kind(3, 4, batch_first=True).double(), nn.Linear(4, 1).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)

    def scores(x: Tensor) -> Tensor:
        return readout(layer(x)[0][:, -1])

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.readout = layer, readout

        def forward(self, x: Tensor) -> Tensor:
            return scores(x)

    critic = Recurrent()
    assert served_by(critic, x) == "autograd"
    assert not tapes
    assert served_by(critic, x, engine="fused") == "fused"
    reason = explain(critic, x)
    assert reason is not None
    assert f"module 'layer ({kind.__name__})': engine 'auto' takes autograd, which is faster" in reason
    assert explain(scores, x) is None, "the tape follows it; a function is not looked into"


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_plan_serves_recurrent_layers(kind: type[nn.RNNBase], tapes: list[Tape]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer, self.readout = kind(3, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.readout(self.layer(x)[0][:, -1])  # type: ignore[no-any-return]

    critic = Recurrent().double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert [served_by(critic, x) for _ in range(4)] == ["autograd", "fused", "fused", "fused"]
    assert len(tapes) == 1, "recorded at the second call, a plan from the third"


def test_a_refusal_of_some_arguments_is_none_of_others() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = critic_with(nn.Tanh())

        def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
            return Opaque.apply(self.body(x)) if hidden else self.body(x)  # type: ignore[no-any-return, no-untyped-call]

    critic = Either()
    for _ in range(2):
        assert served_by(critic, critic_args=(True,)) == "autograd"
        assert served_by(critic, critic_args=(False,)) == "fused"
        assert served_by(critic) == "fused"


def test_a_function_that_was_refused_is_not_tried_again(tapes: list[Tape]) -> None:
    module = critic_with(Switched(True))
    by, tried = 1.0, []
    for change in (None, None, None, "the constant", None, "the module", None):
        by = 2.0 if change == "the constant" else by
        if change == "the module":
            module[1].opaque = False  # type: ignore[assignment]
        before = len(tapes)
        values = []
        for engine in ("auto", "autograd"):  # of a function that is made anew
            values.append(gradient_penalty(lambda x, by=by: module(x) * by, FLAT, kind="r1", engine=engine).detach())
        torch.testing.assert_close(*values)
        tried.append(len(tapes) - before)
    assert tried[0] == 1
    assert tried[2] == 0
    assert tried[3] == 1, "another function"
    assert tried[5] == 1, "another module"


def test_findings_are_bounded_and_end_with_the_critic() -> None:
    critic = critic_with(Switched(True))
    for k in range(100):
        critic[1].name = f"state {k}"
        gradient_penalty(critic, FLAT, kind="r1")
    findings = engines._refused._findings
    assert len(findings[critic]) == 32
    before = len(findings)
    del critic
    gc.collect()
    assert len(findings) == before - 1


# ---- samples of a class of their own ----


class WithMeta(Tensor):
    """Carries something along, as MONAI's MetaTensor does."""

    meta: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls):
            result.meta = next((a.meta for a in args if hasattr(a, "meta")), {})
        return result


def with_meta(x: Tensor) -> WithMeta:
    result = x.as_subclass(WithMeta)
    result.meta = {"affine": torch.eye(4)}
    return result


@pytest.mark.parametrize("kind", ["wgan-gp", "r1", "r1+r2", "dragan"])
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_subclasses_that_carry_metadata_are_served_as_their_data(engine: str, kind: str) -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = critic_with(nn.Tanh())

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.body(x) * scale

    critic, fake, scale = Conditional(), samples(4, 5, seed=9), torch.ones(4, 1, dtype=torch.float64)
    assert explain(critic, with_meta(FLAT), critic_args=(with_meta(scale),)) is None
    results = []
    for wrap in (with_meta, lambda x: x):
        penalty = gradient_penalty(
            *(critic, wrap(FLAT), wrap(fake)), kind=kind, engine=engine, generator=draws(), critic_args=(wrap(scale),)
        )
        results.append([penalty.detach().as_subclass(Tensor), *grads_of(penalty, critic)])
        assert "Precomputed" in type(penalty.grad_fn).__name__ or engine == "autograd"
    assert_same(*results, 1e-12)
    assert served_by(critic, critic_args=(scale,)) == "fused"


def test_a_subclass_within_the_critic_falls_back_for_as_long_as_it_is_there() -> None:
    critic = critic_with(nn.Tanh())
    plain = critic[0].weight.detach().clone()
    critic[0].weight = nn.Parameter(with_meta(plain))
    assert gradient_penalty(critic, FLAT, kind="r1").item() > 0
    critic[0].weight = nn.Parameter(plain)
    assert served_by(critic) == "fused"
