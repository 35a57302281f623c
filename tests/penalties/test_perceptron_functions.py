"""The closed form of a perceptron that a function applies: the numbers are autograd's, also after a change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from penalty_critics import samples
from torch import Tensor, nn

import lipgan
from lipgan.penalties import perceptron
from lipgan.penalties.tape import Tape

# A plan stands for plain tensors; those of a device that is written in Python are of a class of their own.
pytestmark = pytest.mark.hardware

X, FAKE = samples(6, 2, 3), samples(6, 2, 3, seed=8)


class Program:
    """A training program that holds its critic, its parts one by one, and more."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.net: Any = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.net.double()
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.layers, self.options = [self.net[0], self.net[2], self.net[4]], {"slope": 0.3}
        self.slope, self.bend = 0.1, torch.tanh

    def score(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))  # type: ignore[no-any-return]

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x.view(len(x), -1)).squeeze(1)  # type: ignore[no-any-return]

    def score_by_layers(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        for layer in self.layers[:-1]:
            h = F.leaky_relu(layer(h), self.options["slope"])
        return self.layers[-1](h)  # type: ignore[no-any-return]


def judge(net: Any, slope: float, bend: Any, x: Tensor) -> Tensor:
    return net[4](bend(net[2](F.leaky_relu(net[0](x.flatten(1)), slope))))  # type: ignore[no-any-return]


def _lambda(program: Program) -> Any:
    net = program.net
    return lambda x: net(x.flatten(1))


def _closure(program: Program) -> Any:
    net, slope, bend = program.net, program.slope, program.bend

    def critic(x: Tensor) -> Tensor:
        return judge(net, slope, bend, x)

    return critic


def _partial(program: Program) -> Any:
    return functools.partial(judge, program.net, program.slope, program.bend)


CRITICS: dict[str, Callable[[Program], Any]] = {
    "lambda": _lambda,
    "closure": _closure,
    "partial": _partial,
    "bound method": lambda program: program.score,
    "object": lambda program: program,
    "bound method of a list": lambda program: program.score_by_layers,
}


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of a closed form."""
    calls: list[str] = []

    def note(name: str, real: Any) -> None:
        def noted(*args: Any) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(perceptron.Perceptron, name, noted)

    for name in ("solve", "solve_with_loss"):
        note(name, getattr(perceptron.Perceptron, name))
    return calls


def agree(critic: Callable[[], Any], program: Program, kind: str = "r1", loss: str | None = None) -> Tensor:
    outcomes = []
    parameters = [*program.net.parameters()]
    for engine in ("fused", "autograd"):
        torch.manual_seed(0)
        if loss is None:
            value = lipgan.gradient_penalty(critic(), X, FAKE, kind=kind, engine=engine)
        else:
            value = lipgan.critic_loss(critic(), X, FAKE, loss, kind=kind, engine=engine).total
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        zeros = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
        outcomes.append([value.detach(), *zeros])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    return outcomes[0][0]


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize(
    ("kind", "loss"), [("r1", None), ("wgan-gp", None), ("r1", "hinge"), ("r1+r2", "hinge"), ("wgan-gp", "hinge")]
)
@pytest.mark.parametrize("name", CRITICS)
def test_a_function_of_a_perceptron(
    name: str,
    kind: str,
    loss: str | None,
    check: str,
    tapes: list[Tape],
    solved: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", check)
    program = Program()
    by_a_list = name == "bound method of a list"  # which a look alone might change: it takes a plan first
    for k in range(4):
        before, n = len(solved), len(tapes)
        agree(lambda: CRITICS[name](program), program, kind, loss)
        expected = not by_a_list or (k > 1 - int(check) and (kind, loss) != ("r1", "hinge"))
        assert (len(solved) > before) == expected
        assert check == "1" or not expected or len(tapes) == n


def _net(program: Program) -> None:
    program.net[1] = nn.SiLU()


def _weights(program: Program) -> None:
    with torch.no_grad():
        program.net[0].weight.mul_(2)


def _replaced(program: Program) -> None:
    program.net[0] = program.layers[0] = nn.Linear(6, 8).double()


def _slope(program: Program) -> None:
    program.slope = program.options["slope"] = 0.6


def _bend(program: Program) -> None:
    program.bend = torch.sin


def _hook(program: Program) -> None:
    program.net[0].register_forward_hook(lambda module, args, out: 2 * out)


def _order(program: Program) -> None:
    program.layers[1] = program.net[2] = nn.Linear(8, 8, bias=False).double()


def _another(program: Program) -> None:
    other = Program()
    other.net[0].weight.data.mul_(3)
    program.net, program.layers = other.net, other.layers


OF_ALL = [_weights, _replaced, _hook, _order, _another]
CHANGES = {name: [*OF_ALL, _net] if name in ("lambda", "bound method", "object") else OF_ALL for name in CRITICS}
CHANGES["closure"] = CHANGES["partial"] = [*OF_ALL, _slope, _bend]
CHANGES["bound method of a list"] = [*OF_ALL, _slope]


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize(("name", "change"), [(name, change) for name in CRITICS for change in CHANGES[name]])
def test_a_function_of_a_perceptron_that_changes(
    name: str,
    change: Callable[[Program], None],
    check: str,
    tapes: list[Tape],
    solved: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = Program()
    for _ in range(3):
        before = agree(lambda: CRITICS[name](program), program)
    assert solved
    assert len(tapes) <= 2
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", check)
    change(program)
    for _ in range(3):
        assert not torch.equal(before, agree(lambda: CRITICS[name](program), program)), "the change changes nothing"


def test_a_frozen_weight_of_a_function(tapes: list[Tape], solved: list[str]) -> None:
    program = Program()
    for k in range(4):
        if k == 2:
            program.net[2].weight.requires_grad_(False)
        value = lipgan.gradient_penalty(lambda x: program.net(x.flatten(1)), X, kind="r1", engine="fused")
        value.backward()
        assert len(solved) == k + 1
    grad = program.net[2].weight.grad
    program.net.zero_grad()
    assert grad is not None
    lipgan.gradient_penalty(program, X, kind="r1", engine="fused").backward()
    assert program.net[2].weight.grad is None


def test_a_function_that_leaves_something_behind_is_never_run_for_a_look(tapes: list[Tape], solved: list[str]) -> None:
    program = Program()
    seen: list[Any] = []
    counts = {"calls": 0}

    def appending(x: Tensor) -> Tensor:
        seen.append(len(x))
        return program.net(x.flatten(1))  # type: ignore[no-any-return]

    def counting(x: Tensor) -> Tensor:
        counts["calls"] += 1
        return program.net(x.flatten(1))  # type: ignore[no-any-return]

    for k in range(1, 6):
        for critic in (appending, counting):
            lipgan.gradient_penalty(critic, X, kind="r1", engine="fused")
        assert (len(seen), counts["calls"]) == (k, k)
    assert not solved


def test_what_is_no_perceptron(tapes: list[Tape], solved: list[str]) -> None:
    program = Program()
    critics = [
        lambda x: program.net(x.flatten(1)) * 2,
        lambda x: program.net(x.flatten(1)).sin(),
        lambda x: program.net(x.flatten(1).flip(0)),
        lambda x: program.net(x.flatten(1)) + program.net(-x.flatten(1)),
        lambda x: program.net(x.transpose(1, 2).flatten(1)),
    ]
    for critic in critics:
        for _ in range(4):
            agree(lambda critic=critic: critic, program)  # type: ignore[misc]
    assert not solved
