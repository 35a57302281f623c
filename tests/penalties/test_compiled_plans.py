"""Penalties with ``compile=True``: plans that a compiler has compiled."""

from __future__ import annotations

import copy
import functools
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor
import torch._inductor.config
import torch.nn.functional as F
from penalty_critics import FAKE, REAL, draws, samples
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode

import lipgan
from lipgan.penalties.engines import UnsupportedCriticError

# A plan stands for plain tensors; those of a device that is written in Python are of a class of their own.
pytestmark = pytest.mark.hardware


def curved() -> nn.Sequential:
    """A critic with smooth activations, dropout and batch norm."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.SiLU(),
        nn.Dropout(0.3),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 1),
    ).double()


def independent() -> nn.Sequential:
    """A critic that judges each sample by itself, with maps that are linear piece by piece."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 16, 8), nn.ReLU(), nn.Linear(8, 1)
    ).double()


def smooth() -> nn.Sequential:
    torch.manual_seed(3)
    # With an activation at the end, or it would have a closed form.
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 1), nn.LeakyReLU(0.5)).double()


class Drawn(nn.Module):
    """Draws of several kinds, into memory that lies in different orders."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sin().transpose(1, 3)  # [B, 4, 4, 4], the channels last
        h = h * torch.rand_like(h) + torch.randn_like(h) * h
        h = torch.dropout(h.cos().mT, 0.3, True) + h * torch.bernoulli(h.sigmoid())
        mask, _ = torch.native_dropout(torch.ones_like(h), 0.2, True)
        return self.last((h * mask + h * torch.zeros_like(h).normal_(0.1, 0.3)).mean((1, 2)))


def drawn() -> nn.Module:
    torch.manual_seed(4)
    return Drawn().double()


class Pooled(nn.Module):
    """Averages, whose options are left to their defaults or are not, and an operation that C++ takes a detour to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sin()
        sums = F.avg_pool2d(h, 2).mean((2, 3)) + nn.AvgPool2d(3, 2, 1, count_include_pad=False)(h).sum((2, 3))
        sums = sums + F.avg_pool1d(h.flatten(2), 3).sum(2) + F.avg_pool3d(h[:, None], (1, 2, 3))[:, 0].sum((2, 3))
        return self.last(sums.cos() + F.interpolate(h, scale_factor=2, mode="bilinear").square().mean((2, 3)))


def pooled() -> nn.Module:
    torch.manual_seed(5)
    return Pooled().double()


CRITICS: dict[str, Callable[[], nn.Module]] = {
    **{"curved": curved, "independent": independent, "smooth": smooth, "drawn": drawn, "pooled": pooled}
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that were compiled: by a backend that takes no compiler of C++ and no seconds."""
    graphs: list[Any] = []
    guarded = torch.compile

    def by_aot(graph: Any, arguments: list[Tensor], *, options: Any) -> Any:
        graphs.append(graph)
        assert options["fallback_random"], "the numbers that are drawn are those of the operations"
        return aot_eager(graph, arguments)

    def by_dynamo(graph: Any, *, options: Any, **settings: Any) -> Any:
        graphs.append(graph)
        assert options["fallback_random"], "the numbers that are drawn are those of the operations"
        return guarded(graph, backend="aot_eager", **settings)

    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor, "compile", by_aot)
    monkeypatch.setattr(torch, "compile", by_dynamo)
    yield graphs
    torch._dynamo.reset()


def outcome(critic: nn.Module, run: Callable[[nn.Module], Tensor], seed: int) -> list[Tensor]:
    """Value, gradients, buffers and random state of one call."""
    critic.zero_grad()
    torch.manual_seed(seed)
    value = run(critic)
    value.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in critic.parameters()]
    return [value.detach(), *grads, *(buffer.clone() for buffer in critic.buffers()), torch.get_rng_state()]


def agree(critic: nn.Module, run: Callable[..., Tensor], calls: int = 3) -> None:
    """With ``compile=True`` as by autograd's double backward."""
    other = copy.deepcopy(critic)
    for seed in range(calls):
        ours = outcome(critic, functools.partial(run, seed=seed, compile=True), seed)
        theirs = outcome(other, functools.partial(run, seed=seed, engine="autograd"), seed)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("wgan-gp", "curved"), ("r1+r2", "curved"), ("r1+r2", "independent")),
        *(("max", "independent"), ("dragan", "smooth"), ("lp", "smooth"), ("wgan-gp", "drawn"), ("lp", "pooled")),
    ],
)
def test_penalties(kind: str, name: str, compiled: list[Any]) -> None:
    def run(critic: nn.Module, seed: int, **options: Any) -> Tensor:
        return lipgan.gradient_penalty(critic, REAL, FAKE, kind=kind, generator=draws(seed), **options)

    agree(CRITICS[name](), run)
    # "r1+r2" of a critic that couples samples is taken twice, by one plan.
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("loss", "kind", "name"),
    [
        *(("non-saturating", "r1", "independent"), ("wasserstein", "r1+r2", "smooth")),
        *(("hinge", "wgan-gp", "curved"), ("hinge", "r1", "curved")),
    ],
)
def test_losses(loss: str, kind: str, name: str, compiled: list[Any]) -> None:
    def run(critic: nn.Module, seed: int, **options: Any) -> Tensor:
        step = lipgan.critic_loss(critic, REAL, FAKE, loss, kind=kind, generator=draws(seed), **options)
        return step.total

    agree(CRITICS[name](), run)
    assert compiled, "nothing was compiled"


@pytest.mark.parametrize("name", CRITICS)
def test_autocast(name: str, compiled: list[Any]) -> None:
    critic = CRITICS[name]().float().eval()
    real, fake = REAL.float(), FAKE.float()

    def run(critic: nn.Module, **options: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return lipgan.critic_loss(critic, real, fake, "non-saturating", kind="r1", **options).total

    for seed in range(3):
        ours = outcome(critic, functools.partial(run, compile=True), seed)
        theirs = outcome(copy.deepcopy(critic), functools.partial(run, engine="fused"), seed)
        plain = outcome(copy.deepcopy(critic), lambda critic: lipgan.gradient_penalty(critic, real, kind="r1"), seed)
        largest = max(float(t.abs().max()) for t in theirs[:-1])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)
    assert compiled, "nothing was compiled"
    assert not torch.equal(ours[0], plain[0])


def test_it_is_compiled_once(compiled: list[Any]) -> None:
    critic = curved()
    for _ in range(4):
        lipgan.gradient_penalty(critic, REAL, kind="r1", compile=True).backward()
    assert len(compiled) == 1


def test_settings_that_code_depends_on(compiled: list[Any]) -> None:
    critic, threads = independent(), torch.get_num_threads()
    try:
        for n in (threads, threads + 1, threads, threads + 1):
            torch.set_num_threads(n)
            agree(critic, lambda critic, seed, **options: lipgan.gradient_penalty(critic, REAL, kind="r1", **options))
    finally:
        torch.set_num_threads(threads)
    assert len(compiled) == 2


class Shared(nn.Module):
    """A critic that changes a buffer, and reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(48, 1)
        self.register_buffer("level", torch.zeros(4))
        self.register_buffer("read", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.level[:2].add_(1.0)
        return torch.tanh(self.body(x.flatten(1) * (1 + 0.1 * self.read[0])))


def test_buffers_that_share_memory(compiled: list[Any]) -> None:
    torch.manual_seed(4)
    critic = Shared().double()

    def run(critic: nn.Module, **options: Any) -> list[Tensor]:
        return outcome(critic, lambda critic: lipgan.gradient_penalty(critic, REAL, kind="r1", **options), 0)

    def both() -> None:
        for _ in range(2):
            before = critic.level.clone()
            ours = run(critic, compile=True)
            critic.level.copy_(before)
            torch.testing.assert_close(ours, run(critic, engine="autograd"), rtol=1e-10, atol=1e-12)

    both()
    assert len(compiled) == 1
    # All that a plan compares of them is as before.
    critic.read = critic.level.view(4)
    both()
    assert len(compiled) == 2


@pytest.mark.parametrize("name", CRITICS)
def test_by_dynamo_where_there_is_no_other_way(name: str, compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._inductor, "compile")

    def loss(critic: nn.Module, seed: int, **options: Any) -> Tensor:
        return lipgan.critic_loss(critic, REAL, FAKE, "non-saturating", kind="r1", **options).total

    agree(CRITICS[name](), loss)
    assert len(compiled) == 2


def test_the_value_alone(compiled: list[Any]) -> None:
    critic = independent()
    with torch.no_grad():
        values = [lipgan.gradient_penalty(critic, REAL, kind="r1", compile=True) for _ in range(2)]
    expected = lipgan.gradient_penalty(critic, REAL, kind="r1", engine="autograd").detach()
    assert len(compiled) == 1
    for value in values:
        assert not value.requires_grad
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0.0)


def test_a_perceptron_has_its_closed_form(compiled: list[Any]) -> None:
    critic = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    x = samples(6, 5)
    ours = lipgan.gradient_penalty(critic, x, kind="r1", compile=True)
    torch.testing.assert_close(ours, lipgan.gradient_penalty(critic, x, kind="r1", engine="autograd"))
    assert compiled == []


def test_a_change_gets_a_plan_of_its_own(compiled: list[Any]) -> None:
    critic = curved()

    def run(critic: nn.Module, seed: int, **options: Any) -> Tensor:
        return lipgan.gradient_penalty(critic, REAL, kind="r1", **options)

    agree(critic, run, calls=2)
    critic[1] = nn.Tanh()
    agree(critic, run, calls=2)
    critic.eval()
    agree(critic, run, calls=2)
    critic[0].bias.requires_grad_(False)
    agree(critic, run, calls=2)
    half = REAL[:4]
    agree(critic, lambda critic, seed, **options: lipgan.gradient_penalty(critic, half, kind="r1", **options), calls=2)
    assert len(compiled) == 5


def test_under_the_profiler(compiled: list[Any]) -> None:
    def run(critic: nn.Module, seed: int, **options: Any) -> Tensor:
        return lipgan.gradient_penalty(critic, REAL, kind="r1", **options)

    for critic in (independent(), curved()):
        with torch.profiler.profile():
            agree(critic, run)
        agree(critic, run)
    assert len(compiled) == 2


def test_uncompiled_and_compiled_plans_stand_side_by_side(compiled: list[Any]) -> None:
    critic = independent()
    for _ in range(3):
        ways = [lipgan.gradient_penalty(critic, REAL, kind="r1", compile=how) for how in (False, True)]
        torch.testing.assert_close(*ways, rtol=1e-12, atol=0.0)
    assert len(compiled) == 1


@pytest.mark.cpu
def test_what_has_no_calls_from_cpp_is_called_from_python(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    by_aot, asked = torch._inductor.compile, list[bool]()

    def from_python(graph: Any, arguments: list[Tensor], *, options: dict[str, Any]) -> Any:
        asked.append(options.get("cpp_wrapper", False))
        if asked[-1]:
            raise NotImplementedError("a kernel without a way in from C++")
        return by_aot(graph, arguments, options=options)

    monkeypatch.setattr(torch._inductor, "compile", from_python)
    agree(curved(), lambda critic, seed, **options: lipgan.gradient_penalty(critic, REAL, kind="r1", **options))
    assert asked == [True, False]


# ---- what cannot be compiled ----


class Reading(nn.Module):
    """A critic whose operations depend on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum().item() > 0 else -self.body(x).square()


class Counting(nn.Module):
    """A critic with batch norm that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body, self.calls = nn.BatchNorm1d(5), nn.Linear(5, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.body(self.norm(x)))


def test_what_cannot_be_compiled_is_said(compiled: list[Any]) -> None:
    x = samples(6, 5)
    hooked = nn.Sequential(nn.Linear(5, 1), nn.Tanh()).double()
    hooked[0].register_forward_hook(lambda module, args, output: None)
    critics: list[tuple[Any, str]] = [
        (Reading().double(), "decides what is computed"),
        (Counting().double(), "changes calls"),
        (hooked, "has hooks"),
    ]
    for critic, reason in critics:
        with pytest.raises(UnsupportedCriticError, match=rf"cannot be compiled: .*{reason}.*; use compile=False"):
            lipgan.gradient_penalty(critic, x, kind="r1", compile=True)
    assert compiled == []


def test_nothing_is_changed_by_a_critic_that_is_refused(compiled: list[Any]) -> None:
    critic = Counting().double()
    before, state = copy.deepcopy(critic.state_dict()), torch.get_rng_state()
    with pytest.raises(UnsupportedCriticError, match="changes calls"):
        lipgan.gradient_penalty(critic, samples(6, 5), kind="r1", compile=True)
    for name, tensor in critic.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_result_of_the_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Any, arguments: list[Tensor], **settings: Any) -> Any:
        def run(*inputs: Tensor) -> Any:
            penalty, first, *grads = graph(*inputs)
            return penalty, first * 1.001, *grads

        return run

    monkeypatch.setattr(torch._inductor, "compile", wrong)
    critic = smooth()
    with pytest.raises(UnsupportedCriticError, match=r"gradient of the parameter of shape .* of Sequential differs"):
        lipgan.gradient_penalty(critic, REAL, kind="r1", compile=True)
    monkeypatch.undo()
    assert lipgan.gradient_penalty(critic, REAL, kind="r1").isfinite()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"compile": "cuda"}, ValueError, "compile must be one of False, True, 'cudagraph', got 'cuda'"),
        ({"compile": 1}, TypeError, "compile must be a bool or 'cudagraph', got 1"),
        ({"compile": None}, TypeError, "compile must be a bool or 'cudagraph', got None"),
        ({"compile": "cudagraph"}, ValueError, "compile 'cudagraph' needs samples on a GPU, got cpu"),
        (
            {"compile": True, "engine": "autograd"},
            ValueError,
            "compile must be False for engine 'autograd', got True",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        lipgan.gradient_penalty(independent(), REAL, kind="r1", **options)
    with pytest.raises(error, match=words):
        lipgan.critic_loss(independent(), REAL, FAKE, "hinge", kind="r1", **options)


def test_in_a_fresh_process() -> None:
    """What PyTorch imports late adds to the filters of warnings, which the code of a critic may read."""
    program = """
import contextlib, warnings
import torch
import lipgan
from lipgan.penalties.compiled import Compiled

Compiled.__call__ = lambda self, *arguments: self._graph(*arguments)  # which saves half a minute


@contextlib.contextmanager
def quiet(category=UserWarning):
    entry = ("ignore", None, category, None, 0)
    warnings.filters.insert(0, entry)
    yield
    warnings.filters.remove(entry)


class Critic(torch.nn.Linear):
    def forward(self, x):
        with quiet():
            return super().forward(x).sin()


lipgan.gradient_penalty(Critic(3, 1), torch.randn(2, 3), kind="r1", compile=True).backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


P = torch.rand(3, 4, 5, dtype=torch.float64).transpose(0, 2)
DRAWS: list[tuple[Callable[[], Any], Any, tuple[Any, ...]]] = [
    (lambda: torch.empty_like(P).bernoulli_(0.3), torch.ops.lipgan.draw.default, (P, "bernoulli_", [0.3])),
    (lambda: torch.zeros_like(P).normal_(1, 2), torch.ops.lipgan.draw.default, (P, "normal_", [1.0, 2.0])),
    (lambda: torch.rand_like(P), torch.ops.lipgan.draw.default, (P, "uniform_", [0.0, 1.0])),
    (lambda: torch.randn_like(P), torch.ops.lipgan.draw.default, (P, "normal_", [0.0, 1.0])),
    (lambda: torch.bernoulli(P), torch.ops.lipgan.bernoulli.default, (P,)),
    (lambda: torch.native_dropout(P, 0.3, True), torch.ops.lipgan.native_dropout.default, (P, 0.3, True)),
]


@pytest.mark.parametrize(("theirs", "op", "arguments"), DRAWS)
def test_draws_as_a_compiler_is_given_them(theirs: Callable[[], Any], op: Any, arguments: tuple[Any, ...]) -> None:
    """The numbers of PyTorch's draws, where they would lie, and a compiler is told so."""
    torch.manual_seed(1)
    expected = theirs()
    torch.manual_seed(1)
    ours = op(*arguments)
    with FakeTensorMode() as mode:
        told = op(*[mode.from_tensor(item) if isinstance(item, Tensor) else item for item in arguments])
    for a, b, c in zip(*([t] if isinstance(t, Tensor) else t for t in (expected, ours, told)), strict=True):
        assert torch.equal(a, b)
        assert (a.stride(), a.dtype) == (b.stride(), b.dtype) == (c.stride(), c.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["curved", "drawn", "pooled"])
def test_by_inductor(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("torch._inductor.ir"), "handlers", [caplog.handler])

    def loss(critic: nn.Module, seed: int, **options: Any) -> Tensor:
        return lipgan.critic_loss(critic, REAL, FAKE, "non-saturating", kind="r1", **options).total

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        agree(CRITICS[name](), loss)
    assert "c-shim" not in caplog.text  # a warning of the compiler's, which is of no use to anybody
    torch._dynamo.reset()
