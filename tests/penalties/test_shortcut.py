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
from lipgan.objectives import losses

# A plan stands for plain tensors; those of a device that is written in Python are of a class of their own.
pytestmark = pytest.mark.hardware


def perceptron() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1)).double()


def curved() -> nn.Sequential:
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 1)).double()


def smooth() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def apart() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 1)).double()


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests of the calls that went the long way."""
    made: list[Any] = []
    request = sys.modules["lipgan.penalties.request"].request

    def noted(*arguments: Any) -> Any:
        made.append(request(*arguments))
        return made[-1]

    for module in ("gradient_penalty", "critic_loss"):
        monkeypatch.setattr(sys.modules[f"lipgan.penalties.{module}"], "request", noted)
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", "0")
    return made


def outcome(critic: nn.Module, real: Tensor, fake: Tensor | None, seed: int = 0, **options: Any) -> list[Tensor]:
    """Values, gradients, buffers and random state of one call; ``loss`` among the options is of a loss with penalty."""
    critic.zero_grad()
    torch.manual_seed(seed)
    function = lipgan.critic_loss if "loss" in options else lipgan.gradient_penalty
    result = function(critic, real, fake, generator=draws(seed), **options)
    value, *others = result if "loss" in options else (result,)
    assert not any(other.requires_grad for other in others)
    if value.requires_grad:
        value.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in critic.parameters()]
    return [value.detach(), *others, *grads, *(buffer.clone() for buffer in critic.buffers()), torch.get_rng_state()]


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


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        *((smooth, "r1"), (smooth, "r2"), (smooth, "r1+r2"), (smooth, "wgan-gp"), (smooth, "dragan"), (smooth, "max")),
        (apart, "r1+r2"),
    ],
)
@pytest.mark.parametrize(
    "loss", ["hinge", "non-saturating", losses.get("relativistic").critic_loss, lambda r, f: (f - r).exp().mean()]
)
def test_a_loss_takes_it_from_the_third_call_on(
    make: Callable[[], nn.Module], kind: str, loss: Any, long_ways: list[Any]
) -> None:
    critic, (real, fake) = make(), POINTS if make is smooth else (REAL, FAKE)
    for seed in range(5):
        agree(critic, real, fake, kind=kind, seed=seed, loss=loss)
        with torch.no_grad():
            for p in critic.parameters():
                p.mul_(1.1)
    by_us = [asked for asked in long_ways if asked.execution.engine == "auto"]
    assert len(by_us) == (1 if make is smooth else 2)


def test_each_function_is_called_anew(long_ways: list[Any]) -> None:
    """Functions that differ go the same short way; what else they depend on gets its gradients each time."""
    critic, (real, fake) = smooth(), POINTS
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    ours: list[Any] = []
    for power in (1, 2, 3, 2):

        def loss(real_scores: Tensor, fake_scores: Tensor, power: int = power) -> Tensor:
            return (factor * (fake_scores - real_scores)).pow(power).mean()

        results = []
        for engine in ("auto", "autograd"):
            step = lipgan.critic_loss(critic, real, fake, loss, kind="r1", engine=engine)
            grads = torch.autograd.grad(step.total, [factor, *critic.parameters()], allow_unused=True)
            results.append([*step, *(torch.zeros(1).double() if grad is None else grad for grad in grads)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a.detach(), b.detach().reshape(a.shape), rtol=1e-10, atol=1e-12)
        ours.append(results[0][5])
    assert torch.equal(ours[1], ours[3])
    assert not torch.equal(ours[0], ours[1])
    assert len([asked for asked in long_ways if asked.execution.engine == "auto"]) == 1
    for bad, sentence in ((lambda r, f: r - f, "loss must return a 0-dim"), (lambda r, f: 1.0, "got 1.0")):
        with pytest.raises(ValueError, match=sentence):
            lipgan.critic_loss(critic, real, fake, bad, kind="r1")


def test_a_function_of_a_critic_that_is_not_trained(long_ways: list[Any]) -> None:
    critic, (real, fake) = smooth().requires_grad_(False), POINTS
    for _ in range(3):
        agree(critic, real, fake, kind="r1", loss=lambda r, f: (f - r).exp().mean())
    with torch.no_grad():
        for _ in range(3):
            agree(critic, real, fake, kind="wgan-gp", loss=lambda r, f: (f - r).exp().mean())


def test_critics_whose_losses_go_the_long_way(long_ways: list[Any]) -> None:
    """A critic that draws numbers, one whose penalty is taken elsewhere, one that couples samples, and no penalty."""
    for make, kind in ((perceptron, "r1"), (apart, "r1"), (apart, "wgan-gp"), (curved, "r1+r2"), (smooth, None)):
        critic, (real, fake) = make(), (REAL, FAKE) if make in (apart, curved) else POINTS
        for seed in range(3):
            agree(critic, real, fake, kind=kind, seed=seed, loss="minimax")
    assert len(long_ways) == 30


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"loss": "hinge", "kind": "r1+r2"}], ids=["penalty", "loss"])
def test_what_is_not_the_same(options: dict[str, Any], long_ways: list[Any]) -> None:
    """Each goes the long way, and gets what it asks for."""
    critic, (real, fake) = perceptron().eval(), POINTS
    agree(critic, real, fake, **options)

    def differs(around: AbstractContextManager[Any] | None = None, **changes: Any) -> None:
        before = len(long_ways)
        agree(critic, **{"real": real, "fake": fake, **options, **changes}, around=around)
        assert len(long_ways) == before + 2  # one of them is autograd's

    differs(real=real[:3], fake=fake[:3])
    differs(real=real.T.contiguous().T)
    differs(real=real.float().double().requires_grad_())
    differs(weight=3)
    differs(target=0.0)
    differs(kind="lp")
    if options:
        differs(loss="least-squares")
        differs(kind="r2")
        differs(loss=lambda real, fake: losses.get("hinge").critic_loss(real, fake))
        differs(real=real.float())
    else:
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


def test_the_penalty_of_a_batch_is_not_that_of_half_of_one(long_ways: list[Any]) -> None:
    """The samples of a loss with R1 are as many as those of a penalty of a batch twice as large."""
    critic, real, fake = apart(), REAL, FAKE
    twice = torch.cat([real, fake]), torch.cat([fake, real])
    for _ in range(3):
        agree(critic, *twice, kind="r1")
        agree(critic, *twice, kind="r1", loss="hinge")
        agree(critic, real, fake, kind="r1", loss="hinge")
        agree(critic, real, fake, kind="r1+r2")
        agree(critic, real, fake, kind="r1+r2", loss="hinge")


def test_losses_of_images_in_channels_last(long_ways: list[Any]) -> None:
    critic, last = apart(), torch.channels_last
    for _ in range(4):
        agree(critic, REAL, FAKE, kind="r1+r2", loss="hinge")
    for _ in range(4):
        agree(critic, REAL.to(memory_format=last), FAKE.to(memory_format=last), kind="r1+r2", loss="hinge")
    assert len([asked for asked in long_ways if asked.execution.engine == "auto"]) == 4


def test_a_loss_of_a_critic_that_is_not_trained(long_ways: list[Any]) -> None:
    critic, (real, fake) = smooth().requires_grad_(False), POINTS
    for _ in range(3):
        agree(critic, real, fake, kind="r1", loss="hinge")
        lipgan.critic_loss(critic, real, fake, "hinge", kind="r1").total.backward()


class Doubled(torch.overrides.TorchFunctionMode):
    """In which a sum is twice what it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is nn.functional.linear else result


def test_a_mode_of_functions(long_ways: list[Any]) -> None:
    critic, (real, fake) = perceptron().eval(), POINTS
    for options in ({}, {"loss": "hinge", "kind": "r1+r2"}):
        agree(critic, real, fake, **options)
        before = len(long_ways)
        agree(critic, real, fake, around=Doubled(), **options)
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


def test_bad_input_behind_a_good_loss(long_ways: list[Any]) -> None:
    (real, fake), options = POINTS, {"loss": "hinge", "kind": "r1", "weight": 1.0}
    critic, nan = smooth(), float("nan")
    for _ in range(2):
        lipgan.critic_loss(critic, real, fake, **options)
    for error, words, changes in (
        (ValueError, "real must not contain NaN", {"real": torch.full_like(real, nan)}),
        (ValueError, "fake must not contain NaN", {"fake": torch.full_like(fake, nan)}),
        (ValueError, "fake must have the shape of real", {"fake": fake[:3]}),
        (TypeError, "fake must be a tensor", {"fake": None}),
        (TypeError, "weight must be a number, got True", {"weight": True}),
        (ValueError, "unknown loss", {"loss": "hing"}),
        (TypeError, "critic_args must be a list or tuple", {"critic_args": real}),
    ):
        with pytest.raises(error, match=words):
            lipgan.critic_loss(critic, **{"real": real, "fake": fake, **options, **changes})


def test_it_does_not_keep_a_critic(long_ways: list[Any]) -> None:
    critic = apart()
    for _ in range(3):
        lipgan.gradient_penalty(critic, REAL, kind="r1")
        lipgan.critic_loss(critic, REAL, FAKE, "hinge", kind="r1+r2")
    assert len(long_ways) == 4
    long_ways.clear()
    gone = weakref.ref(critic)
    del critic
    gc.collect()
    assert gone() is None
