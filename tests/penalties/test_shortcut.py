"""Calls of a penalty that are like an earlier one, which go a shorter way, and those that only look like it."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from penalty_critics import FAKE, REAL, draws, samples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lipgan

# A plan stands for plain tensors; those of a device that is written in Python are of a class of their own.
pytestmark = pytest.mark.hardware


def perceptron() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1)).double()


def curved() -> nn.Sequential:
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 1)).double()


def apart() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 1)).double()


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests of the calls that went the long way."""
    module = sys.modules["lipgan.penalties.gradient_penalty"]
    made: list[Any] = []
    request = module.request

    def noted(*arguments: Any) -> Any:
        made.append(request(*arguments))
        return made[-1]

    monkeypatch.setattr(module, "request", noted)
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", "0")
    return made


def outcome(critic: nn.Module, real: Tensor, fake: Tensor | None, seed: int = 0, **options: Any) -> list[Tensor]:
    """Value, gradients, buffers and random state of one call."""
    critic.zero_grad()
    torch.manual_seed(seed)
    value = lipgan.gradient_penalty(critic, real, fake, generator=draws(seed), **options)
    if value.requires_grad:
        value.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in critic.parameters()]
    return [value.detach(), *grads, *(buffer.clone() for buffer in critic.buffers()), torch.get_rng_state()]


def agree(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor | None,
    around: AbstractContextManager[Any] | None = None,
    **options: Any,
) -> None:
    """As by autograd, within a context that is entered for both."""
    other = copy.deepcopy(critic)
    with around or nullcontext():
        ours = outcome(critic, real, fake, **options)
        theirs = outcome(other, real, fake, **{**options, "engine": "autograd"})
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


POINTS = samples(6, 5), samples(6, 5, seed=9)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        *((perceptron, "wgan-gp"), (perceptron, "r2"), (perceptron, "r1+r2"), (perceptron, "dragan")),
        *((curved, "wgan-gp"), (curved, "r1"), (apart, "r1+r2"), (apart, "max")),
    ],
)
def test_it_is_taken_from_the_third_call_on(make: Callable[[], nn.Module], kind: str, long_ways: list[Any]) -> None:
    critic, (real, fake) = make(), POINTS if make is perceptron else (REAL, FAKE)
    for seed in range(5):
        agree(critic, real, fake, kind=kind, seed=seed)
        with torch.no_grad():
            for p in critic.parameters():
                p.mul_(1.1)
    by_us = [asked for asked in long_ways if asked.execution.engine == "auto"]
    assert len(by_us) == (1 if make is perceptron else 2)


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_what_is_not_the_same(long_ways: list[Any]) -> None:
    """Each goes the long way, and gets what it asks for."""
    critic, (real, fake) = perceptron().eval(), POINTS
    agree(critic, real, fake)

    def differs(around: AbstractContextManager[Any] | None = None, **changes: Any) -> None:
        before = len(long_ways)
        agree(critic, **{"real": real, "fake": fake, **changes}, around=around)
        assert len(long_ways) == before + 2  # one of them is autograd's

    differs(real=real[:3], fake=fake[:3])
    differs(real=real.T.contiguous().T)
    differs(real=real.float().double().requires_grad_())
    differs(weight=3)
    differs(target=0.0)
    differs(kind="lp")
    differs(fake=None, kind="r1")
    differs(engine="fused")
    differs(torch.autocast("cpu", torch.bfloat16))
    differs(torch.no_grad())
    differs(torch.inference_mode())
    differs(Passing())
    differs(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
    differs(torch.autograd.forward_ad.dual_level())
    critic.train()
    differs()
    critic[1] = nn.SiLU()
    differs()
    critic[0].bias.requires_grad_(False)
    differs()
    critic.register_forward_hook(lambda module, args, output: output * 2)
    differs()


class Doubled(torch.overrides.TorchFunctionMode):
    """In which a sum is twice what it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is nn.functional.linear else result


def test_a_mode_of_functions(long_ways: list[Any]) -> None:
    critic, (real, fake) = perceptron().eval(), POINTS
    agree(critic, real, fake)
    before = len(long_ways)
    agree(critic, real, fake, around=Doubled())
    assert len(long_ways) == before + 2


def test_bad_input_behind_a_good_one(long_ways: list[Any]) -> None:
    critic, (real, fake) = perceptron(), POINTS
    for _ in range(2):
        lipgan.gradient_penalty(critic, real, fake, weight=1.0)
    for error, words, changes in (
        (ValueError, "must not contain NaN", {"real": torch.full_like(real, float("nan"))}),
        (ValueError, "fake must have the shape of real", {"fake": fake[:3]}),
        (ValueError, "fake must be given", {"fake": None}),
        (TypeError, "weight must be a number, got True", {"weight": True}),
        (TypeError, "compile must be a bool", {"compile": 0}),
        (TypeError, "critic_args must be a list or tuple", {"critic_args": real}),
        (TypeError, "generator must be", {"generator": 3}),
    ):
        with pytest.raises(error, match=words):
            lipgan.gradient_penalty(critic, **{"real": real, "fake": fake, "weight": 1.0, **changes})


def test_it_does_not_keep_a_critic(long_ways: list[Any]) -> None:
    critic = apart()
    for _ in range(3):
        lipgan.gradient_penalty(critic, REAL, kind="r1")
    assert len(long_ways) == 2
    long_ways.clear()
    gone = weakref.ref(critic)
    del critic
    gc.collect()
    assert gone() is None
