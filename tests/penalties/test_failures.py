"""What a penalty leaves behind after an error, and beside other users of the same critic."""

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from penalty_critics import (
    ENGINES,
    FAKE,
    FLAT,
    REAL,
    active_modes,
    assert_same,
    draws,
    grads_of,
    image_critic,
    mlp,
    with_dropout,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lipgan import gradient_penalty
from lipgan.penalties import UnsupportedCriticError, explain


class Fails(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.first, self.error = nn.Linear(5, 3).double(), error

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.first(x)
        raise self.error


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("error", [KeyError("mine"), RuntimeError("mine"), KeyboardInterrupt(), StopIteration("mine")])
def test_an_exception_of_the_critic_passes_unchanged(error: BaseException, engine: str) -> None:
    critic = Fails(error)
    before = torch.is_grad_enabled(), active_modes()
    with pytest.raises(type(error)) as caught:
        gradient_penalty(critic, FLAT, kind="r1", engine=engine)
    assert caught.value is error
    assert (torch.is_grad_enabled(), active_modes()) == before
    # Nothing is recorded any more: what follows has no value of a tape.
    assert not hasattr(torch.relu(critic.h), "_lipgan_value")
    with pytest.raises(type(error)) as caught:
        explain(critic, FLAT)
    assert caught.value is error


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.as_tensor(x.numpy(force=True) ** 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Opaque.apply(x)


def test_unsupported_critic_is_named_and_served_by_autograd() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(5, 4), nn.Sequential(Squares()), nn.Linear(4, 1)).double()
    with pytest.raises(UnsupportedCriticError, match=r"module '1\.0 \(Squares\)': .*Opaque"):
        gradient_penalty(critic, FLAT, kind="r1", engine="fused")
    reason = explain(critic, FLAT)
    assert reason is not None
    assert "Opaque" in reason
    assert "Opaque" in (explain(lambda x: Opaque.apply(x).sum(1), FLAT) or "")
    results = []
    for engine in ("auto", "auto", "autograd"):
        penalty = gradient_penalty(critic, FLAT, kind="r1", engine=engine)
        results.append([penalty.detach(), *grads_of(penalty, critic)])
    assert_same(results[0], results[2], 0)
    assert_same(results[1], results[2], 0)


def test_a_penalty_within_a_critic() -> None:
    """Of other parameters: a term of the score that does not depend on the samples, by contract."""
    results = []
    for engine in ENGINES:
        outer, inner = image_critic(), with_dropout().eval()

        class Nested(nn.Module):
            def __init__(self, outer: nn.Module, inner: nn.Module, engine: str) -> None:
                super().__init__()
                self.outer, self.inner, self.engine = outer, inner, engine

            def forward(self, x: Tensor) -> Tensor:
                penalty = gradient_penalty(self.inner, x, kind="r1", engine=self.engine)
                return self.outer(x) * (1 + penalty)

        critic = Nested(outer, inner, engine)
        penalty = gradient_penalty(critic, REAL, FAKE, generator=draws(), engine=engine)
        results.append([penalty.detach(), *grads_of(penalty, critic)])
    assert_same(*results)
    assert all(g.abs().max() > 0 for g in results[0][-6:-5])


@pytest.mark.parametrize("shared", [False, True])
def test_two_threads_at_once(shared: bool) -> None:
    critics = [image_critic() for _ in range(2)]
    if shared:
        critics[1] = critics[0]
    parameters = [list(critic.parameters()) for critic in critics]
    batches = [REAL, FAKE]

    def grads(k: int) -> list[Tensor]:
        penalty = gradient_penalty(critics[k], batches[k], kind="r1", engine="fused")
        return list(torch.autograd.grad(penalty, parameters[k]))

    expected = [grads(k) for k in range(2)]
    failures: list[Any] = []
    start = threading.Barrier(2)

    def work(k: int) -> None:
        try:
            start.wait()
            for _ in range(30):
                assert_same(grads(k), expected[k], 0)
                assert explain(critics[k], batches[k]) is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_settings_of_the_process_outlast_threads_that_overlap() -> None:
    """The first to come makes them and the last to leave takes them back, whatever the order between."""
    inside, leave = threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        inside.set()
        assert leave.wait(20)
        return mlp(x)

    thread = threading.Thread(target=gradient_penalty, args=(slow, FLAT), kwargs={"kind": "r1"})
    flash = torch.backends.cuda.flash_sdp_enabled()
    thread.start()
    assert inside.wait(20)

    def quick(x: Tensor) -> Tensor:
        leave.set()
        thread.join()  # it leaves while this one is inside
        assert not torch.backends.cuda.flash_sdp_enabled()
        return mlp(x)

    gradient_penalty(quick, FLAT, kind="r1")
    assert torch.backends.cuda.flash_sdp_enabled() == flash


def test_under_the_flop_counter_and_the_profiler() -> None:
    critic = image_critic()
    expected = grads_of(gradient_penalty(critic, REAL, kind="r1", engine="fused"), critic)
    with FlopCounterMode(display=False) as unit:
        critic(REAL)
    with FlopCounterMode(display=False) as counter:  # it puts hooks on tensors, which only autograd serves
        penalty = gradient_penalty(critic, REAL, kind="r1")
    assert_same(grads_of(penalty, critic), expected)
    assert counter.get_total_flops() == 2 * unit.get_total_flops(), "forward and the slope"
    after = gradient_penalty(critic, REAL, kind="r1")
    assert type(after.grad_fn) is type(gradient_penalty(critic, REAL, kind="r1", engine="fused").grad_fn)
    with torch.profiler.profile() as profile:
        penalty = gradient_penalty(critic, REAL, kind="r1", engine="fused")
    assert_same(grads_of(penalty, critic), expected, 0)
    assert any("convolution" in event.key for event in profile.key_averages())


@pytest.mark.slow
def test_import_and_use_leave_the_compiler_alone() -> None:
    """Importing its machinery takes seconds, which a program that compiles nothing should not pay."""
    program = (
        "import sys, torch, lipgan;"
        "c = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.Linear(4, 1));"
        "x = torch.randn(2, 3);"
        "lipgan.gradient_penalty(c, x, x, engine='fused').backward();"
        "lipgan.gradient_penalty(c, x, x, engine='autograd').backward();"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
