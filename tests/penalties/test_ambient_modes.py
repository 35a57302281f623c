"""Modes of PyTorch around a penalty: the numbers of autograd's double backward within them, or one error that says why.

Each is entered when a plan, or a closed form, of the critic is there already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from penalty_critics import samples
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lipgan
from lipgan.penalties.engines import UnsupportedCriticError
from lipgan.penalties.tape import Tape

# A plan stands for plain tensors; those of a device that is written in Python are of a class of their own.
pytestmark = pytest.mark.hardware

X, FAKE = samples(6, 5), samples(6, 5, seed=8)


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.softplus(self.first(x)) * torch.ones(6, dtype=x.dtype, device=x.device)).sin()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(6, 1))


CRITICS = {"smooth": Smooth, "perceptron": perceptron}


class Logged(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Doubled(TorchFunctionMode):
    """Makes other numbers of what a critic calls, and of what a tape might."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        changed = (F.linear, torch.mm, torch.addmm, torch.mul, Tensor.mul, Tensor.mm, Tensor.t, torch.sigmoid, torch.t)
        return 2 * result if func in changed else result


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def doubling() -> Any:
    return saved_tensors_hooks(lambda t: t, lambda t: 2 * t if t.is_floating_point() else t)


def keeping() -> Any:
    return saved_tensors_hooks(lambda t: t, lambda t: t)


def textbook(critic: Any) -> Tensor:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.div(gradient.flatten(1).square().sum(1).mean(), 0.2)


def outcome(value: Tensor, critic: nn.Module) -> list[Tensor]:
    parameters = [*critic.parameters()]
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    zeros = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
    return [value.detach(), *zeros]


def prepared(name: str) -> nn.Module:
    """A critic of which there is a plan, or a closed form."""
    torch.manual_seed(1)
    critic = CRITICS[name]().double()
    for _ in range(3):
        lipgan.gradient_penalty(critic, X, kind="r1", engine="fused")
    return critic


def agree(name: str, critic: nn.Module, mode: Callable[[], Any], engine: str) -> None:
    outcomes = []
    for penalty in (lambda: lipgan.gradient_penalty(critic, X, kind="r1", engine=engine), lambda: textbook(critic)):
        torch.manual_seed(0)
        with mode():
            outcomes.append(outcome(penalty(), critic))
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


GRAPH = torch.autograd.graph
SERVED: dict[str, tuple[Callable[[], Any], bool]] = {
    # whether a plan or a closed form serves; else the tape
    "save_on_cpu": (GRAPH.save_on_cpu, True),
    "no hooks on saved tensors": (lambda: GRAPH.disable_saved_tensors_hooks("none here"), True),
    "mutation allowed": (GRAPH.allow_mutation_on_saved_tensors, False),
    "anomalies": (torch.autograd.detect_anomaly, True),
    "a mode of functions": (Logged, False),
    "another mode of functions": (Doubled, False),
    "a mode of operations": (Watched, False),
    "a default device": (lambda: torch.device("cpu"), True),
    "another default device": (lambda: torch.device("meta"), True),
    "a default dtype": (lambda: default_dtype(torch.float64), True),
    "deterministic": (deterministic, True),
    "no denormals": (flushing, True),
    "a level of dual numbers": (forward_ad.dual_level, False),
}


@pytest.mark.cpu
@pytest.mark.parametrize("mode", SERVED)
@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_what_is_served_within_a_mode(name: str, mode: str, tapes: list[Tape]) -> None:
    entered, planned = SERVED[mode]
    critic = prepared(name)
    for k in range(3):
        before = len(tapes)
        agree(name, critic, entered, "fused")
        if k == 2:  # where a mode belongs to what a plan is for, it has one of its own
            assert (len(tapes) == before) == planned
    agree(name, critic, entered, "auto")
    before = len(tapes)
    agree(name, critic, contextlib.nullcontext, "fused")
    assert len(tapes) == before, "the plan was lost"


@pytest.mark.cpu
@pytest.mark.parametrize("hooks", [doubling, keeping])
@pytest.mark.parametrize("name", CRITICS)
def test_hooks_on_saved_tensors_are_autograds(name: str, hooks: Callable[[], Any], tapes: list[Tape]) -> None:
    critic = prepared(name)
    before = len(tapes)
    outcomes = []
    for engine in ("auto", "autograd"):
        torch.manual_seed(0)
        with hooks():
            value = lipgan.gradient_penalty(critic, X, kind="r1", engine=engine)
            total = lipgan.critic_loss(critic, X, FAKE, "hinge", kind="r1", engine=engine).total
            outcomes.append([*outcome(value, critic), *outcome(total, critic)])
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)
    assert len(tapes) == before
    with hooks():
        for options in ({"engine": "fused"}, {"compile": True}):
            with pytest.raises(UnsupportedCriticError, match="hooks on saved tensors"):
                lipgan.gradient_penalty(critic, X, kind="r1", **options)  # type: ignore[arg-type]
    torch.manual_seed(0)
    plain = lipgan.gradient_penalty(critic, X, kind="r1", engine="fused").detach()
    assert len(tapes) == before, "the plan was lost"
    assert torch.allclose(plain, outcomes[0][0], rtol=1e-9) == (hooks is keeping)


@pytest.mark.parametrize("hooks", [doubling, keeping])
def test_hooks_on_saved_tensors_in_a_critic(hooks: Callable[[], Any], tapes: list[Tape]) -> None:
    class Critic(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            with hooks():
                h = F.softplus(h)
            return self.last(h).sin()

    torch.manual_seed(1)
    critic = Critic().double()
    with pytest.raises(UnsupportedCriticError, match="hooks on saved tensors"):
        lipgan.gradient_penalty(critic, X, kind="r1", engine="fused")
    for _ in range(3):
        ours, theirs = (
            outcome(lipgan.gradient_penalty(critic, X, kind="r1", engine=engine), critic)
            for engine in ("auto", "autograd")
        )
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


ENGINES = ["auto", "fused", "autograd"]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CRITICS)
def test_weights_with_tangents_are_refused(name: str, engine: str, trained: bool) -> None:
    critic = prepared(name)
    with forward_ad.dual_level():
        dual = {
            key: forward_ad.make_dual(p.detach().requires_grad_(trained), torch.ones_like(p))
            for key, p in critic.named_parameters()
        }
        with pytest.raises(RuntimeError, match="critic must not depend on dual tensors"):
            lipgan.gradient_penalty(lambda x: functional_call(critic, dual, (x,)), X, kind="r1", engine=engine)
        value = lipgan.gradient_penalty(critic, forward_ad.make_dual(X, torch.ones_like(X)), kind="r1", engine=engine)
        assert forward_ad.unpack_dual(value).tangent is None  # no gradient flows to samples


def test_a_weight_that_gets_a_tangent(tapes: list[Tape]) -> None:
    class Critic(Smooth):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(6, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale.sum()

    critic = Critic().double()
    for _ in range(3):
        lipgan.gradient_penalty(critic, X, kind="r1", engine="fused")
    with forward_ad.dual_level():
        critic.scale = forward_ad.make_dual(critic.scale, torch.ones(6, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="critic must not depend on dual tensors"):
            lipgan.gradient_penalty(critic, X, kind="r1", engine="fused")


TRANSFORMS: dict[str, Callable[[Any, Any], Any]] = {
    "grad": lambda penalty, parameters: torch.func.grad(lambda p: penalty(X, p))(parameters),
    "jvp": lambda penalty, parameters: torch.func.jvp(lambda p: penalty(X, p), (parameters,), (parameters,)),
    "vmap": lambda penalty, parameters: torch.func.vmap(lambda x: penalty(x, parameters))(torch.stack([X, X])),
    "jacrev": lambda penalty, parameters: torch.func.jacrev(lambda x: penalty(x, parameters))(X),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(transform: str, engine: str) -> None:
    critic = prepared("smooth")
    parameters = {key: p.detach() for key, p in critic.named_parameters()}

    def penalty(x: Tensor, p: Any) -> Tensor:
        return lipgan.gradient_penalty(lambda x: functional_call(critic, p, (x,)), x, kind="r1", engine=engine)

    def loss(x: Tensor, p: Any) -> Tensor:
        return lipgan.critic_loss(critic, x, x, "hinge", kind="r1", engine=engine).total

    for function in (penalty, loss):
        with pytest.raises(RuntimeError, match=r"within a transform of torch\.func"):
            TRANSFORMS[transform](function, parameters)


@pytest.mark.parametrize("name", CRITICS)
def test_another_default_dtype_between_calls(name: str, tapes: list[Tape]) -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = CRITICS[name]()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x * torch.tensor([1.5]) * torch.ones(5))  # type: ignore[no-any-return]

    torch.manual_seed(1)
    critic = Critic()
    x = X.float()
    for dtype in (torch.float32, torch.float64, torch.float32, torch.float64):
        for _ in range(3):
            with default_dtype(dtype):
                outcomes = []
                for engine in ("fused", "autograd"):
                    torch.manual_seed(0)
                    with contextlib.suppress(RuntimeError):  # float64 samples do not fit float32 weights
                        outcomes.append(lipgan.gradient_penalty(critic, x, kind="r1", engine=engine).detach())
            assert len(outcomes) == 2 * (dtype is torch.float32)
            if outcomes:
                torch.testing.assert_close(*outcomes, rtol=1e-4, atol=0.0)
