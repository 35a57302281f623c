"""Penalties within functions that torch.compile traces as one graph."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from penalty_critics import FAKE, REAL, Conditional, samples
from torch import Tensor, nn

import lipgan
from lipgan.penalties import traced

pytestmark = pytest.mark.skipif(
    not traced.SERVES, reason="this torch cannot have a penalty in its graph, and breaks it"
)


def curved() -> nn.Sequential:
    """A critic with what a forward pass changes: dropout draws, batch norm and spectral norm keep what they see."""
    torch.manual_seed(1)
    return nn.Sequential(
        lipgan.spectral_norm(nn.Conv2d(3, 4, 3, padding=1)),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * 16, 1),
    ).double()


def plain() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 1)).double()


def perceptron() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1)).double()


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


Loss = Callable[..., Tensor]


def outcome(critic: nn.Module, loss: Loss, seed: int, *args: Any) -> list[Tensor]:
    """Value, gradients, buffers and random state."""
    critic.zero_grad()
    torch.manual_seed(seed)
    value = loss(critic, *args)
    value.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in critic.parameters()]
    return [value.detach(), *grads, *(buffer.clone() for buffer in critic.buffers()), torch.get_rng_state()]


def agree(critic: nn.Module, loss: Loss, compiled: Loss, *args: Any, seed: int = 0) -> None:
    other = copy.deepcopy(critic)
    for a, b in zip(outcome(critic, compiled, seed, *args), outcome(other, loss, seed, *args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def penalized(critic: nn.Module, real: Tensor, fake: Tensor, weight: float = 10.0, **options: Any) -> Tensor:
    """A loss with passes through the critic before and behind its penalty."""
    before = critic(fake).mean()
    penalty = lipgan.gradient_penalty(critic, real, fake, weight=weight, **options)
    return before - critic(real).mean() + penalty


@pytest.mark.parametrize(("make", "backend"), [(curved, "eager"), (curved, "aot_eager"), (plain, "aot_eager")])
def test_a_step_is_one_graph(make: Callable[[], nn.Module], backend: str, dynamo: Any) -> None:
    critic = make()
    compiled = torch.compile(penalized, backend=backend, fullgraph=True)
    for seed in range(3):  # the tape, a recording, a plan
        agree(critic, penalized, compiled, REAL, FAKE, seed=seed)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("make", [curved, plain])  # of the second Inductor copies a weight to another layout
def test_a_step_by_inductor(make: Callable[[], nn.Module]) -> None:
    critic = make()
    # Its own random numbers would not be those of an eager step.
    compiled = torch.compile(penalized, fullgraph=True, options={"fallback_random": True})
    for seed in range(3):
        agree(critic, penalized, compiled, REAL, FAKE, seed=seed)


@pytest.mark.parametrize(("kind", "engine"), [("r1+r2", "fused"), ("dragan", "fused"), ("r1+r2", "autograd")])
def test_kinds_and_engines(engine: str, kind: str) -> None:
    def loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        return lipgan.gradient_penalty(critic, real, fake, kind=kind, engine=engine)

    critic = plain()
    agree(critic, loss, torch.compile(loss, backend="aot_eager", fullgraph=True), REAL, FAKE)


def test_a_perceptron_in_closed_form_and_with_another_weight() -> None:
    critic, x, y = perceptron(), samples(6, 5), samples(6, 5, seed=9)
    compiled = torch.compile(penalized, backend="aot_eager", fullgraph=True)
    for weight in (10.0, 10.0, 3.0, 2.0):
        agree(critic, penalized, compiled, x, y, weight)


@pytest.mark.parametrize(("make", "kind"), [(curved, None), (curved, "r1"), (plain, "r1"), (plain, "wgan-gp")])
def test_a_loss_by_name_is_one_graph(make: Callable[[], nn.Module], kind: str | None) -> None:
    def loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        step = lipgan.critic_loss(critic, real, fake, "non-saturating", kind=kind)
        assert not step.real_scores.requires_grad
        return step.total + 0 * (step.loss + step.penalty + step.real_scores.sum() + step.fake_scores.sum())

    critic = make()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        agree(critic, loss, compiled, REAL, FAKE, seed=seed)


def by_function(critic: nn.Module, real: Tensor, fake: Tensor, **options: Any) -> Tensor:
    def loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        return nn.functional.softplus(fake_scores - real_scores.mean()).mean() + real_scores.square().mean()

    step = lipgan.critic_loss(critic, real, fake, loss, **options)
    assert not step.real_scores.requires_grad
    return step.total + 0 * (step.loss + step.penalty + step.real_scores.sum() + step.fake_scores.sum())


@pytest.mark.parametrize(
    ("make", "kind", "backend"),
    [
        *((curved, None, "aot_eager"), (curved, "r1", "eager"), (curved, "r1", "aot_eager")),
        *((plain, "r1+r2", "aot_eager"), (curved, "wgan-gp", "aot_eager"), (plain, "r2", "aot_eager")),
    ],
)
def test_a_loss_that_is_a_function_is_in_the_graph(
    make: Callable[[], nn.Module], kind: str | None, backend: str, dynamo: Any
) -> None:
    critic = make()
    compiled = torch.compile(functools.partial(by_function, kind=kind), backend=backend, fullgraph=True)
    for seed in range(3):
        agree(critic, functools.partial(by_function, kind=kind), compiled, REAL, FAKE, seed=seed)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_loss_that_learns_and_is_scaled() -> None:
    """What a loss depends on beside the scores gets its gradients, and a scaled loss has scaled ones."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.critic, self.scale = plain(), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def loss(both: Learned, real: Tensor, fake: Tensor, factor: float) -> Tensor:
        weights = torch.linspace(1.0, 2.0, len(real), dtype=torch.float64)
        step = lipgan.critic_loss(
            both.critic, real, fake, lambda a, b: (both.scale * weights[:, None] * (b - a)).exp().mean(), kind="r1"
        )
        return factor * step.total

    both = Learned()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for factor in (1.0, 2.0**16, 0.0):
        agree(both, loss, compiled, REAL, FAKE, factor)
    assert both.scale.grad is not None
    with torch.no_grad():
        assert torch.equal(compiled(both, REAL, FAKE, 1.0), loss(both, REAL, FAKE, 1.0))


@pytest.mark.parametrize("step", [penalized, functools.partial(by_function, kind="wgan-gp")])
def test_a_generator_that_is_kept(step: Loss, dynamo: Any) -> None:
    critic, generator = curved(), torch.Generator()
    states = []

    def loss(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
        return step(critic, real, fake, generator=generator)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        for run in (compiled, loss):
            generator.manual_seed(seed)
            kept = copy.deepcopy(critic.state_dict())
            states.append([*outcome(critic, run, seed, REAL, FAKE, generator), generator.get_state()])
            if run is compiled:
                critic.load_state_dict(kept)
        torch.testing.assert_close(states[-2], states[-1], rtol=1e-11, atol=1e-13)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_generators_that_come_one_after_the_other(dynamo: Any) -> None:
    """They are traced anew a few times, and then break the graph."""
    critic = plain()
    compiled = torch.compile(penalized, backend="eager")
    for seed in range(8):
        ours, theirs = (
            run(critic, REAL, FAKE, generator=torch.Generator().manual_seed(seed)) for run in (compiled, penalized)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
        if seed == 5:
            dynamo.utils.counters.clear()
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 0
    dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="one of few that are used again"):
        torch.compile(penalized, backend="eager", fullgraph=True)(critic, REAL, FAKE, generator=torch.Generator())


def test_arguments_of_the_critic() -> None:
    critic, x = Conditional().double(), samples(6, 5)
    labels, shared = torch.tensor([0, 1, 2, 0, 1, 2]), samples(6, seed=8)

    def loss(critic: nn.Module, x: Tensor, labels: Tensor, shared: Tensor, scale: float) -> Tensor:
        return lipgan.gradient_penalty(critic, x, kind="r1", critic_args=(labels, shared, scale))

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for scale in (1.0, 2.0):
        agree(critic, loss, compiled, x, labels, shared, scale)
    agree(critic, loss, compiled, x, labels.flip(0), shared, 2.0)


def test_another_critic_and_a_changed_one() -> None:
    """What was traced for one critic serves no other, and what changes in a critic counts at once."""
    compiled = torch.compile(penalized, backend="aot_eager", fullgraph=True)
    first, second = plain(), plain()
    with torch.no_grad():
        second[0].weight.mul_(2)
    for critic in (first, second, first):
        agree(critic, penalized, compiled, REAL, FAKE)
    first[1] = nn.Tanh()
    agree(first, penalized, compiled, REAL, FAKE)
    first[0].bias.requires_grad_(False)
    agree(first, penalized, compiled, REAL, FAKE)
    agree(first, penalized, compiled, REAL[:4], FAKE[:4])
    first[0].weight = nn.Parameter(first[0].weight.detach() / 2)
    agree(first, penalized, compiled, REAL, FAKE)


def test_a_hook_that_comes_later() -> None:
    """For which dynamo itself traces nothing anew."""

    def loss(critic: nn.Module, real: Tensor) -> Tensor:
        return lipgan.gradient_penalty(critic, real, kind="r1")

    critic = plain()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    agree(critic, loss, compiled, REAL)
    critic[1].register_forward_hook(lambda module, args, output: output.square())
    agree(critic, loss, compiled, REAL)


def test_two_critics_and_two_penalties_in_one_graph() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = plain(), curved()

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    def loss(both: Both, real: Tensor, fake: Tensor) -> Tensor:
        one = lipgan.gradient_penalty(both.one, real, fake)
        two = lipgan.gradient_penalty(both.two, real, kind="r1")
        return one + two + lipgan.gradient_penalty(both, fake, kind="r1")

    critic = Both()
    agree(critic, loss, torch.compile(loss, backend="aot_eager", fullgraph=True), REAL, FAKE)


def test_the_value_alone() -> None:
    critic = curved()
    other = copy.deepcopy(critic)

    def value(critic: nn.Module, x: Tensor) -> Tensor:
        return lipgan.gradient_penalty(critic, x, kind="r1")

    with torch.no_grad():
        torch.manual_seed(0)
        ours = torch.compile(value, backend="aot_eager", fullgraph=True)(critic, REAL)
        torch.manual_seed(0)
        theirs = value(other, REAL)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
    for a, b in zip(critic.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaled_loss(dtype: torch.dtype) -> None:
    def loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            penalty = lipgan.gradient_penalty(critic, real, fake, kind="r1")
        return 2.0**16 * penalty

    critic = plain().float()
    agree(critic, loss, torch.compile(loss, backend="aot_eager", fullgraph=True), REAL.float(), FAKE.float())


def test_gradients_accumulate_over_calls() -> None:
    critic = plain()
    compiled = torch.compile(penalized, backend="aot_eager", fullgraph=True)

    def twice(loss: Loss) -> list[Tensor]:
        critic.zero_grad()
        for x in (REAL, FAKE):
            torch.manual_seed(0)
            loss(critic, x, FAKE, kind="r1").backward()
        return [p.grad.clone() for p in critic.parameters() if p.grad is not None]

    for a, b in zip(twice(compiled), twice(penalized), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_errors_reach_the_caller() -> None:
    def loss(critic: nn.Module, x: Tensor, kind: str) -> Tensor:
        return lipgan.gradient_penalty(critic, x, kind=kind)

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'r3'"):
        compiled(plain(), REAL, "r3")
    with pytest.raises(ValueError, match="NaN"):
        compiled(plain(), REAL * float("nan"), "r1")


def test_a_critic_is_forgotten_with_its_graph(dynamo: Any) -> None:
    critic = plain()
    gc.collect()
    before = len(traced._operations)
    compiled = torch.compile(penalized, backend="eager", fullgraph=True)
    compiled(critic, REAL, FAKE).backward()
    assert len(traced._operations) == before + 1
    del critic
    dynamo.reset()
    gc.collect()
    assert len(traced._operations) == before


def test_other_parameters_than_those_that_were_traced_are_refused() -> None:
    critic = plain()
    others = [2 * p.detach() for p in critic.parameters()]
    identity, autocast = (id(critic), None), (False, torch.bfloat16)
    task = traced._key(lambda: (lambda *args: (), None), critic, None, identity, (), (), autocast)
    with pytest.raises(RuntimeError, match="others than those of this compiled function"):
        torch.ops.lipgan.critic_penalty(REAL, FAKE, [], others, [], [], task, 1.0, 1.0, True)


@pytest.mark.parametrize("what", ["function", "new generator", "several tensors", "argument with a gradient"])
def test_what_breaks_the_graph(what: str) -> None:
    critic = perceptron()
    x = samples(6, 5)

    def loss(x: Tensor) -> Tensor:
        if what == "function":
            return lipgan.gradient_penalty(lambda x: critic(x), x, kind="r1")
        if what == "new generator":
            return lipgan.gradient_penalty(critic, x, x + 1, generator=torch.Generator())
        if what == "several tensors":
            return lipgan.gradient_penalty(lambda a, b: critic(a + b), (x, x), kind="r1")
        return lipgan.gradient_penalty(Scaled(critic), x, kind="r1", critic_args=(scale,))

    class Scaled(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return scale * self.body(x)

    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"function|Generator"):
        torch.compile(loss, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    assert torch.compile(loss, backend="eager")(x).isfinite()
