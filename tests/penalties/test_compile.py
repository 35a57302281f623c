"""`lipgan.gradient_penalty` under torch.compile."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from penalty_critics import FAKE, REAL, assert_same, draws, grads_of, image_critic, step
from torch import Tensor, nn

import lipgan
from lipgan import gradient_penalty
from lipgan.penalties import LazyRegularization, explain


def step_with_backward(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    scores = critic(fake).mean() - critic(real).mean()
    loss = 2 * (scores + gradient_penalty(critic, real, fake, generator=generator))
    loss.backward()
    return loss.detach()


def a_function() -> Any:
    """A critic that is no module."""
    critic = image_critic()
    return lambda x: critic(x)


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step(backend: str, dynamo: Any) -> None:
    eager = image_critic()
    critic = copy.deepcopy(eager)
    compiled = torch.compile(step_with_backward, backend=backend)
    for network in (eager, critic):
        network.zero_grad()
    generator = torch.Generator()
    for round_ in range(3):
        if round_ == 1:
            dynamo.utils.counters.clear()
        expected = step_with_backward(eager, REAL, FAKE, draws(round_))
        found = compiled(critic, REAL, FAKE, generator.manual_seed(round_))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        ours, theirs = ([p.grad for p in network.parameters()] for network in (critic, eager))
        assert_same(ours, theirs)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 0, "the second and third step compile nothing"


def test_what_breaks_the_graph(dynamo: Any) -> None:
    """A penalty of a function does, once, with its reason; what is before and behind it is compiled."""
    found = dynamo.explain(step)(a_function(), REAL, FAKE, draws())
    assert found.graph_break_count == 1
    assert found.graph_count == 2
    (broken,) = found.break_reasons
    assert "lipgan.gradient_penalty runs outside of the compiled graph here" in broken.reason
    with pytest.raises(torch._dynamo.exc.Unsupported, match="or compile without fullgraph"):
        torch.compile(step, backend="eager", fullgraph=True)(a_function(), REAL, FAKE, draws())


def test_the_backward_of_the_penalty_is_not_compiled(dynamo: Any) -> None:
    found = dynamo.explain(step_with_backward)(a_function(), REAL, FAKE, draws())
    assert found.graph_count == 3  # before the penalty, until the call of backward, and behind it
    assert [("lipgan" in b.reason, "backward()" in b.reason) for b in found.break_reasons] == [
        (True, False),
        (False, True),
    ]


def test_interpolation_does_not_break_the_graph(dynamo: Any) -> None:
    def mixed(real: Tensor, fake: Tensor) -> Tensor:
        return lipgan.interpolate(real, fake) * 2

    compiled = torch.compile(mixed, backend="aot_eager", fullgraph=True)
    for n in (6, 4, 3):  # the second time for batches of any size
        real, fake = REAL[:n], FAKE[:n]
        eps = ((compiled(real, fake) / 2 - fake) / (real - fake)).flatten(1)
        torch.testing.assert_close(eps, eps[:, :1].expand_as(eps), rtol=0, atol=1e-9)


@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "a layer", "a function"])
@pytest.mark.parametrize("engine", ["fused", "auto", "autograd"])
def test_compiled_critic_in_an_eager_step(how: str, engine: str, dynamo: Any) -> None:
    plain = image_critic()
    critic: Any = copy.deepcopy(plain)
    module = critic
    if how == "torch.compile":
        critic = torch.compile(critic, backend="aot_eager")
    elif how == "module.compile":
        critic.compile(backend="aot_eager")
    elif how == "a layer":
        critic[3] = torch.compile(critic[3], backend="aot_eager")
    else:
        critic = torch.compile(lambda x: module(x), backend="aot_eager")
    for _ in range(2):
        critic(REAL).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = gradient_penalty(critic, REAL, FAKE, generator=draws(), engine=engine)
            if engine == "fused":
                assert explain(critic, REAL) is None
        theirs = gradient_penalty(plain, REAL, FAKE, generator=draws(), engine="autograd")
        assert_same([ours.detach(), *grads_of(ours, module)], [theirs.detach(), *grads_of(theirs, plain)])


@pytest.mark.slow
def test_compiled_lazy_regularization_does_not_compile_for_every_step(dynamo: Any) -> None:
    critic = image_critic()
    lazy = LazyRegularization(gradient_penalty, every=4)

    def loss(real: Tensor) -> Tensor:
        return critic(real).mean() + lazy(critic, real, kind="r1")

    compiled = torch.compile(loss, backend="eager")
    expected = critic(REAL).mean() + 4 * gradient_penalty(critic, REAL, kind="r1")
    for k in range(20):
        value = compiled(REAL)
        torch.testing.assert_close(value, expected if k % 4 == 0 else critic(REAL).mean())
    assert lazy.step == 20
    assert dynamo.utils.counters["stats"]["unique_graphs"] <= 12
