"""`lipgan.gradient_penalty` in a training step: graphs, hooks, modes of autograd."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from penalty_critics import ENGINES, FAKE, REAL, Conditional, assert_same, draws, grads_of, image_critic, samples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lipgan import gradient_penalty
from lipgan.penalties import explain
from lipgan.penalties.precomputed import with_gradients


@pytest.mark.parametrize("engine", ENGINES)
def test_weighted_sum_and_accumulation(engine: str) -> None:
    critic = image_critic()

    def penalty(kind: str = "r1") -> Tensor:
        return gradient_penalty(critic, REAL, FAKE, kind=kind, engine=engine)

    score = grads_of(critic(REAL).mean(), critic)
    r1, r2 = grads_of(penalty("r1"), critic), grads_of(penalty("r2"), critic)
    mixed = grads_of(critic(REAL).mean() + 0.25 * penalty("r1") - 3 * penalty("r2"), critic)
    assert_same(mixed, [s + 0.25 * a - 3 * b for s, a, b in zip(score, r1, r2, strict=True)], 1e-12)
    score_and_penalty = grads_of(critic(REAL).mean() + penalty("r1") / 2, critic)
    (penalty("r1") / 2).backward()
    accumulated = [p.grad for p in critic.parameters()]
    assert_same(accumulated, [s + r for s, r in zip(score, r1, strict=True)], 1e-12)
    assert_same(score_and_penalty, [s + r / 2 for s, r in zip(score, r1, strict=True)], 1e-12)


def test_accumulated_gradients_are_nobody_elses() -> None:
    """A gradient that an optimizer changes in place must not be the tensor that a second backward pass reads."""
    critic = image_critic()
    penalty = gradient_penalty(critic, REAL, kind="r1", engine="fused")
    critic.zero_grad()
    penalty.backward(retain_graph=True)
    once = [p.grad.clone() for p in critic.parameters()]
    for p in critic.parameters():
        p.grad.zero_()
    penalty.backward(retain_graph=True)
    penalty.backward()
    assert_same([p.grad for p in critic.parameters()], [2 * g for g in once], 1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        penalty.backward()


def test_a_penalty_is_changed_in_place() -> None:
    """As any result of an operation, which a view that a function of autograd has made could not be."""
    critic = image_critic()
    grads = []
    for factor in (1, 3):
        critic.zero_grad()
        penalty = gradient_penalty(critic, REAL, kind="r1", engine="fused")
        penalty *= factor
        penalty.backward()
        grads.append([p.grad.clone() for p in critic.parameters()])
    assert_same(grads[1], [3 * g for g in grads[0]], 1e-12)


def test_a_backward_hands_its_gradients_over() -> None:
    """It copies none, and holds none of them any more."""
    parameter, grad = torch.zeros(3, requires_grad=True), torch.ones(3)
    place, gone = grad.data_ptr(), weakref.ref(grad)
    penalty = with_gradients(torch.zeros(()), [parameter], [grad])
    del grad
    penalty.backward()
    assert parameter.grad is not None
    assert parameter.grad.data_ptr() == place
    parameter.grad = None
    assert gone() is None


def test_create_graph_is_refused() -> None:
    critic = image_critic()
    parameters = list(critic.parameters())
    penalty = gradient_penalty(critic, REAL, kind="r1", engine="fused")
    with pytest.raises(RuntimeError, match=r"create_graph=True .* use engine='autograd'"):
        torch.autograd.grad(penalty, parameters, create_graph=True)
    twice = gradient_penalty(critic, REAL, kind="r1", engine="autograd")
    grads = torch.autograd.grad(twice, parameters, create_graph=True, allow_unused=True)
    assert any(g is not None and g.requires_grad for g in grads)


def test_autograd_grad_and_zeros_for_biases() -> None:
    critic = image_critic()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    penalty = gradient_penalty(critic, REAL, kind="r1", engine="fused")
    parameters = list(critic.parameters())
    grads = torch.autograd.grad(penalty, parameters, retain_graph=True)
    assert grads[-1].abs().max() == 0, "the last bias moves no slope"
    assert grads[-1].shape == parameters[-1].shape
    assert grads[1].abs().max() > 0, "the first bias moves that of SiLU"
    with pytest.raises(RuntimeError, match="allow_unused"):
        torch.autograd.grad(penalty, [*parameters, unused], retain_graph=True)
    *again, nothing = torch.autograd.grad(penalty, [*parameters, unused], allow_unused=True, retain_graph=True)
    assert nothing is None
    assert_same(again, list(grads), 0)
    batched = torch.autograd.grad(penalty, parameters, torch.tensor([1.0, -2.0]).double(), is_grads_batched=True)
    assert_same([b[1] for b in batched], [-2 * g for g in grads], 1e-14)


def test_all_gradients_are_scaled_in_one_call() -> None:
    """A GPU needs one launch in the place of one for each parameter."""
    calls: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    critic = image_critic()
    penalty = gradient_penalty(critic, REAL, kind="r1", engine="fused")
    expected = torch.autograd.grad(penalty, list(critic.parameters()), retain_graph=True)
    with Counting():
        grads = torch.autograd.grad(penalty, list(critic.parameters()), torch.tensor(3.0, dtype=torch.float64))
    assert calls.count("_foreach_mul") == 1
    assert "mul" not in calls
    assert_same(list(grads), [3.0 * g for g in expected], 1e-15)


@pytest.mark.parametrize("frozen", [(0,), (1, 3), (0, 1, 2, 3), (4, 5), (5,)])
def test_partly_frozen_parameters(frozen: tuple[int, ...]) -> None:
    critic = image_critic()
    expected = grads_of(gradient_penalty(critic, REAL, kind="r1", engine="autograd"), critic)
    for k, parameter in enumerate(critic.parameters()):
        parameter.requires_grad_(k not in frozen)
        parameter.grad = None
    gradient_penalty(critic, REAL, kind="r1", engine="fused").backward()
    for k, (parameter, grad) in enumerate(zip(critic.parameters(), expected, strict=True)):
        if k in frozen:
            assert parameter.grad is None
        else:
            assert_same([parameter.grad], [grad])


def test_frozen_critic() -> None:
    critic = image_critic()
    expected = gradient_penalty(critic, REAL, kind="r1").item()
    critic.requires_grad_(False)
    penalty = gradient_penalty(critic, REAL, kind="r1", engine="fused")
    assert not penalty.requires_grad
    assert penalty.item() == expected
    trainable = torch.ones((), dtype=torch.float64, requires_grad=True)
    (trainable + penalty).backward()
    assert trainable.grad == 1


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_value_only(context: Callable[[], Any], engine: str) -> None:
    critic = image_critic()
    expected = gradient_penalty(critic, REAL, FAKE, generator=draws(), engine=engine)
    with context():
        made_here = FAKE * 1
        penalty = gradient_penalty(critic, REAL, made_here, generator=draws(), engine=engine)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        assert explain(critic, made_here) is None
    assert not penalty.requires_grad
    assert penalty == expected
    assert all(p.grad is None for p in critic.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_and_labels_made_in_inference_mode(engine: str) -> None:
    critic = Conditional().double()
    with torch.inference_mode():
        fake, labels, shared = samples(4, 5), torch.tensor([0, 1, 2, 1]), samples(6)
    args = (labels, shared)
    penalty = gradient_penalty(critic, fake, kind="r1", critic_args=args, engine=engine)
    ordinary = tuple(arg.clone() for arg in args)
    expected = gradient_penalty(critic, fake.clone(), kind="r1", critic_args=ordinary, engine=engine)
    assert_same(grads_of(penalty, critic), grads_of(expected, critic), 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_gradient_to_the_samples_but_to_tensors_in_the_arguments(engine: str) -> None:
    critic = Conditional().double()
    real, fake = samples(4, 5).requires_grad_(), samples(4, 5, seed=8).requires_grad_()
    leaf = samples(4, 6).requires_grad_()
    made = 2 * leaf
    labels = torch.tensor([0, 1, 2, 1])
    penalty = gradient_penalty(critic, real, fake * 1, critic_args=(labels, made), generator=draws(), engine=engine)
    penalty.backward()
    assert real.grad is None
    assert fake.grad is None
    # Central differences of the value: steps of 1e-6 leave errors of about 1e-9.
    direction = samples(4, 6, seed=12)

    def value(step: float) -> float:
        args = (labels, 2 * (leaf.detach() + step * direction))
        return gradient_penalty(critic, real, fake, critic_args=args, generator=draws(), engine=engine).item()

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    assert abs(float((leaf.grad * direction).sum()) - slope) < 1e-6 * (1 + abs(slope))
