"""`lipgan.gradient_penalty` as its users meet it: values, training conditions, bad input. The engine's own derivatives
are tested with the tape."""

import copy
import math
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from processes import leave
from tolerance import assert_as_accurate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import lipgan
from lipgan import gradient_penalty
from lipgan.penalties import LazyRegularization, UnsupportedCriticError, explain

ENGINES = ("fused", "autograd")
KINDS = ("wgan-gp", "lp", "dragan", "r1", "r2", "r1+r2", "max")
CPU = torch.device("cpu")


def image_critic() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(4 * 16, 8),
        nn.SiLU(),
        nn.Linear(8, 1),
    ).double()


class Conditional(nn.Module):
    """A critic with labels, a tensor that is the same for every sample, and one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 1)
        self.labels = nn.Embedding(3, 6)

    def forward(self, x: Tensor, labels: Tensor, shared: Tensor, scale: float = 1.0) -> Tensor:
        h = torch.tanh(self.first(x) + shared)
        return scale * (self.last(h).squeeze(1) + (h * self.labels(labels)).sum(1))


class Linear(nn.Module):
    """``score = <w, x>``, whose gradient is w for every sample."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.w = nn.Parameter(torch.randn(shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).flatten(1).sum(1)


class Quadratic(nn.Module):
    """``score = a |x|^2 / 2``, whose gradient is a x."""

    def __init__(self, a: float = 1.5) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x.square().flatten(1).sum(1) / 2


def samples(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


REAL, FAKE = samples(6, 3, 4, 4), samples(6, 3, 4, 4, seed=6)


def draws(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grads_of(loss: Tensor, module: nn.Module) -> list[Tensor]:
    """The gradients of a loss in a module's parameters, zeros where it does not depend on them."""
    module.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def assert_same(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-10) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * (1 + float(b.abs().max())))


def active_modes() -> int:
    return int(torch._C._len_torch_dispatch_stack())


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """No dispatch mode, setting of attention or of torch.compile outlives a call, whether it fails or not."""
    attention = torch.backends.cuda.flash_sdp_enabled()
    yield
    assert active_modes() == 0
    assert torch.backends.cuda.flash_sdp_enabled() == attention
    if "torch._dynamo" in sys.modules:
        assert torch._dynamo.eval_frame._stance.stance == "default"


# ---- values ----


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_critic_in_closed_form(kind: str, engine: str) -> None:
    critic = Linear((3, 4, 4))
    with torch.no_grad():
        critic.w.div_(critic.w.norm() / 1.7)  # above every target here, so that "lp" is not zero
    w, weight, target = critic.w.detach(), 3.0, 0.6
    penalty = gradient_penalty(
        critic, REAL, FAKE, kind=kind, weight=weight, target=target, engine=engine, generator=draws()
    )
    if kind in ("r1", "r2", "r1+r2"):
        factor = weight * (2 if kind == "r1+r2" else 1)
        value, slope = factor * 1.7**2 / 2, factor * w
    else:
        value, slope = weight * (1.7 - target) ** 2, 2 * weight * (1.7 - target) * w / 1.7
    assert penalty.shape == ()
    assert penalty.dtype == torch.float64
    torch.testing.assert_close(penalty.item(), value, rtol=1e-13, atol=0)
    assert_same(grads_of(penalty, critic), [slope], 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_sided_penalty_below_the_target_is_zero(engine: str) -> None:
    critic = Linear((5,))
    penalty = gradient_penalty(critic, samples(4, 5), samples(4, 5), kind="lp", target=1e3, engine=engine)
    assert penalty.item() == 0
    assert grads_of(penalty, critic)[0].abs().max() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_quadratic_critic_in_closed_form(engine: str) -> None:
    """Of gradients that differ from sample to sample: which mean, maximum or batch is taken shows."""
    critic, real, fake = Quadratic(), samples(5, 4), samples(5, 4, seed=8)
    a = 1.5
    norms = {"real": real.norm(dim=1), "fake": fake.norm(dim=1)}
    options: dict[str, Any] = {"weight": 2.0, "engine": engine}
    for kind, value in (
        ("r1", a**2 * norms["real"].square().mean()),
        ("r2", a**2 * norms["fake"].square().mean()),
        ("r1+r2", a**2 * (norms["real"].square().mean() + norms["fake"].square().mean())),
    ):
        penalty = gradient_penalty(critic, real, fake, kind=kind, **options)
        torch.testing.assert_close(penalty, value)
        assert_same(grads_of(penalty, critic), [2 * value / a])
    eps = torch.rand(5, generator=draws(), dtype=torch.float64)[:, None]
    n = a * (eps * real + (1 - eps) * fake).norm(dim=1)
    for kind, value, slope in (
        ("wgan-gp", 2 * (n - 0.5).square().mean(), (4 * (n - 0.5) * n / a).mean()),
        ("lp", 2 * (n - 2).clamp_min(0).square().mean(), (4 * (n - 2).clamp_min(0) * n / a).mean()),
        ("max", 2 * (n.max() - 0.5).square(), 4 * (n.max() - 0.5) * n.max() / a),
    ):
        target = 2.0 if kind == "lp" else 0.5
        assert kind != "lp" or 0 < (n > 2).sum() < 5
        penalty = gradient_penalty(critic, real, fake, kind=kind, target=target, generator=draws(), **options)
        torch.testing.assert_close(penalty, value)
        assert_same(grads_of(penalty, critic), [slope])


@pytest.mark.parametrize("engine", ENGINES)
def test_norms_of_pixels(engine: str) -> None:
    critic = Quadratic()
    penalty = gradient_penalty(critic, REAL, kind="dragan", norm="pixel", generator=draws(), engine=engine)
    noise = torch.rand(REAL.shape, generator=draws(), dtype=torch.float64)
    x = REAL + noise * REAL.std(correction=0) / 2
    n = 1.5 * x.norm(dim=1)
    assert n.shape == (6, 4, 4)
    torch.testing.assert_close(penalty, 10 * (n - 1).square().mean())
    assert_same(grads_of(penalty, critic), [(20 * (n - 1) * n / 1.5).mean()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["sample", "pixel"])
def test_engines_agree(kind: str, norm: str) -> None:
    critic = image_critic()
    results = []
    for engine in (*ENGINES, "auto"):
        options: dict[str, Any] = {"kind": kind, "norm": norm, "generator": draws(), "engine": engine}
        penalty = gradient_penalty(critic, REAL, FAKE, **options)
        results.append([penalty.detach(), *grads_of(penalty, critic)])
    assert_same(results[0], results[1])
    assert_same(results[2], results[0], 0)


class Seen(Linear):
    """Keeps what it was called with."""

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.detach().clone()
        return super().forward(x)


@pytest.mark.parametrize("engine", ENGINES)
def test_points(engine: str) -> None:
    critic = Seen((3, 4, 4))
    for kind, points in (("r1", REAL), ("r2", FAKE), ("r1+r2", torch.cat([REAL, FAKE]))):
        gradient_penalty(critic, REAL, FAKE, kind=kind, engine=engine)
        assert torch.equal(critic.x, points)
    for kind in ("wgan-gp", "lp", "max"):
        gradient_penalty(critic, REAL, FAKE, kind=kind, generator=draws(), engine=engine)
        eps = torch.rand(6, generator=draws(), dtype=torch.float64).view(6, 1, 1, 1)
        torch.testing.assert_close(critic.x, eps * REAL + (1 - eps) * FAKE)
        torch.testing.assert_close(critic.x, lipgan.interpolate(REAL, FAKE, generator=draws()), rtol=0, atol=0)
    gradient_penalty(critic, REAL, kind="dragan", generator=draws(), engine=engine)
    noise = (critic.x - REAL) / (0.5 * REAL.std(correction=0))
    torch.testing.assert_close(noise, torch.rand(REAL.shape, generator=draws(), dtype=torch.float64))


def test_one_uniform_number_for_each_sample() -> None:
    eps = lipgan.interpolate(torch.ones(2000, 3), torch.zeros(2000, 3), generator=draws())
    assert torch.equal(eps[:, :1].expand(-1, 3), eps)
    assert eps[:, 0].unique().numel() > 1900
    quantiles = eps[:, 0].sort().values
    # Kolmogorov-Smirnov: beyond 1.95 / sqrt(n) with probability 0.001; the seed is fixed.
    assert (quantiles - (torch.arange(2000) + 0.5) / 2000).abs().max() < 1.95 / math.sqrt(2000)


def test_generators() -> None:
    critic = image_critic()

    def value(generator: torch.Generator | None = None, engine: str = "fused") -> float:
        return gradient_penalty(critic, REAL, FAKE, generator=generator, engine=engine).item()

    state = torch.get_rng_state()
    assert value(draws(1)) == value(draws(1))
    assert value(draws(1)) != value(draws(2))
    assert torch.equal(torch.get_rng_state(), state), "with a generator the global one is not used"
    generator = draws(1)
    assert value(generator) != value(generator), "the generator goes on"
    torch.manual_seed(9)
    first = value()
    torch.manual_seed(9)
    assert value() == first


def with_dropout() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.SiLU(), nn.Dropout(0.4), nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 1)
    ).double()


@pytest.mark.parametrize("make", [image_critic, with_dropout])
@pytest.mark.parametrize("kind", ["wgan-gp", "dragan", "r1"])
def test_engines_draw_the_same_global_random_numbers(make: Callable[[], nn.Module], kind: str) -> None:
    critic, after, results = make(), [], []
    for engine in (*ENGINES, "auto"):
        torch.manual_seed(11)
        penalty = gradient_penalty(critic, REAL, FAKE, kind=kind, engine=engine)
        after.append(torch.rand(3))
        results.append([penalty.detach(), *grads_of(penalty, critic)])
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])
    assert_same(results[0], results[1])
    state = torch.get_rng_state()
    assert explain(critic, REAL) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", ["sample", "pixel"])
def test_r1_and_r2_in_one_batch_equal_two_calls(engine: str, norm: str) -> None:
    critic = Conditional().double()
    real, fake = samples(4, 5), samples(4, 5, seed=8)
    shared = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    args = (torch.tensor([0, 1, 2, 1]), shared, 0.7)
    options: dict[str, Any] = {"weight": 1.3, "engine": engine, "norm": norm, "critic_args": args}

    def all_grads(penalty: Tensor) -> list[Tensor]:
        shared.grad = None
        return [penalty.detach(), *grads_of(penalty, critic), shared.grad]

    together = all_grads(gradient_penalty(critic, real, fake, kind="r1+r2", **options))
    r1 = gradient_penalty(critic, real, fake, kind="r1", **options)
    apart = all_grads(r1 + gradient_penalty(critic, real, fake, kind="r2", **options))
    assert_same(together, apart, 1e-12)
    assert together[-1].abs().max() > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_which_output_counts(engine: str) -> None:
    critic = image_critic()
    plain = gradient_penalty(critic, REAL, kind="r1", engine=engine)
    for outcome, output in (
        (lambda x: (None, critic(x)), 1),
        (lambda x: {"features": x, "scores": critic(x)}, "scores"),
        (lambda x: torch.cat([critic(x) / 2, critic(x) / 2], 1), lambda scores: scores.sum(1)),
    ):
        penalty = gradient_penalty(outcome, REAL, kind="r1", engine=engine, output=output)
        assert_same([penalty.detach(), *grads_of(penalty, critic)], [plain.detach(), *grads_of(plain, critic)], 1e-12)
        plain = gradient_penalty(critic, REAL, kind="r1", engine=engine)


# ---- in a training step ----


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


# ---- torch.compile ----


def step(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator, kind: str = "wgan-gp") -> Tensor:
    scores = critic(fake).mean() - critic(real).mean()
    return scores + gradient_penalty(critic, real, fake, kind=kind, generator=generator)


def step_with_backward(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    scores = critic(fake).mean() - critic(real).mean()
    loss = 2 * (scores + gradient_penalty(critic, real, fake, generator=generator))
    loss.backward()
    return loss.detach()


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step(backend: str, dynamo: Any) -> None:
    eager = image_critic()
    critic = copy.deepcopy(eager)
    compiled = torch.compile(step_with_backward, backend=backend)
    for network in (eager, critic):
        network.zero_grad()
    for round_ in range(3):
        if round_ == 1:
            dynamo.utils.counters.clear()
        expected = step_with_backward(eager, REAL, FAKE, draws(round_))
        torch.testing.assert_close(compiled(critic, REAL, FAKE, draws(round_)), expected, rtol=1e-11, atol=1e-11)
        ours, theirs = ([p.grad for p in network.parameters()] for network in (critic, eager))
        assert_same(ours, theirs)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 0, "the second and third step compile nothing"


def test_what_breaks_the_graph(dynamo: Any) -> None:
    """The penalty does, once, with its reason; the scores before it and the sum behind it are compiled."""
    found = dynamo.explain(step)(image_critic(), REAL, FAKE, draws())
    assert found.graph_break_count == 1
    assert found.graph_count == 2
    (broken,) = found.break_reasons
    assert "lipgan.gradient_penalty records and differentiates the critic's operations" in broken.reason
    with pytest.raises(torch._dynamo.exc.Unsupported, match="outside of the compiled graph; compile without fullgraph"):
        torch.compile(step, backend="eager", fullgraph=True)(image_critic(), REAL, FAKE, draws())


def test_the_backward_of_the_penalty_is_not_compiled(dynamo: Any) -> None:
    found = dynamo.explain(step_with_backward)(image_critic(), REAL, FAKE, draws())
    assert found.graph_count == 3  # before the penalty, until the call of backward, and behind it
    assert [("lipgan" in b.reason, "backward()" in b.reason) for b in found.break_reasons] == [
        (True, False),
        (False, True),
    ]


def test_interpolation_does_not_break_the_graph(dynamo: Any) -> None:
    def mixed(real: Tensor, fake: Tensor) -> Tensor:
        return lipgan.interpolate(real, fake) * 2

    result = torch.compile(mixed, backend="aot_eager", fullgraph=True)(REAL, FAKE)
    eps = ((result / 2 - FAKE) / (REAL - FAKE)).flatten(1)
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


# ---- DistributedDataParallel ----


class TwoHeads(nn.Module):
    """A critic with a head that the scores do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = image_critic()
        self.other = nn.Linear(8, 2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body[:5](x)
        return self.body[5](h), self.other(h)


def _scores(outcome: Any) -> Tensor:
    return outcome[0] if isinstance(outcome, tuple) else outcome


def _ddp_loss(critic: Any, module: Any, rows: slice, where: str, together: bool, options: dict[str, Any]) -> Tensor:
    """Of one process's rows, or of all; ``where`` the penalty is given the critic or its module."""
    real, fake = REAL[rows], FAKE[rows]
    output = {"output": _scores}
    loss = gradient_penalty(critic if where == "wrapper" else module, real, fake, **options, **output)
    if together:
        loss = loss + _scores(critic(fake)).mean() - _scores(critic(real)).mean()
    return loss


DDP_CASES = [
    (make, where, together, unused, engine)
    for make in (image_critic, TwoHeads)
    for where, together in (("wrapper", False), ("wrapper", True), ("module", True))
    for unused in (False, True)
    for engine in ("fused", "autograd")
    # What DistributedDataParallel does not serve itself: a forward pass whose outputs are not all in the loss, and,
    # where it does not look for them, parameters without a gradient; the fused engine gives zeros to biases.
    if (make is TwoHeads and unused and not together)
    or (make is image_critic and (unused or together or engine == "fused"))
]


def _replica(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    rows = slice(3 * rank, 3 * rank + 3)
    results = []

    def run(make: Any, where: str, together: bool, options: Callable[[], dict[str, Any]], **settings: Any) -> None:
        module = make()
        critic = DistributedDataParallel(module, **settings)
        for _ in range(2):  # the second step fails where the first did not prepare or reduce everything
            module.zero_grad()
            _ddp_loss(critic, module, rows, where, together, options()).backward()
        results.append([torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()])

    for make, where, together, unused, engine in DDP_CASES:
        options = {"kind": "r1+r2", "engine": engine}
        run(make, where, together, lambda options=options: options, find_unused_parameters=unused)

    def drawn() -> dict[str, Any]:
        generator = draws()
        torch.rand(3 * rank, generator=generator, dtype=torch.float64)  # those of the ranks before
        return {"engine": "fused", "generator": generator}

    run(image_critic, "wrapper", True, drawn)
    run(image_critic, "wrapper", True, drawn, static_graph=True)
    run(image_critic, "wrapper", False, drawn, static_graph=True)

    # Accumulation: the first half of a step without synchronization, the lazy penalty in the second.
    module = image_critic()
    critic = DistributedDataParallel(module)
    with critic.no_sync():
        (gradient_penalty(critic, REAL[rows], kind="r1", engine="fused") + critic(FAKE[rows]).mean()).backward()
    alone = [p.grad.clone() for p in module.parameters()]
    gradient_penalty(critic, FAKE[rows], kind="r1", engine="fused").backward()
    results.append([p.grad for p in module.parameters()])
    results.append(alone)
    assert critic.module is module
    torch.save(results, f"{path}/{rank}.pt")
    leave()


def test_distributed_data_parallel_equals_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_replica, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    def single(make: Any, together: bool, **options: Any) -> list[Tensor]:
        module = make()
        loss = _ddp_loss(module, module, slice(6), "wrapper", together, {"engine": "autograd", **options})
        return grads_of(loss, module)

    expected = [single(make, together, kind="r1+r2") for make, _, together, _, _ in DDP_CASES]
    expected += [single(image_critic, together, generator=draws()) for together in (True, True, False)]
    module = image_critic()
    loss = gradient_penalty(module, REAL, kind="r1") + gradient_penalty(module, FAKE, kind="r1") + module(FAKE).mean()
    expected.append(grads_of(loss, module))
    for results in ranks:
        for case, ours, theirs in zip([*DDP_CASES, *range(4)], results[:-1], expected, strict=True):
            try:
                assert_same(ours, theirs)
            except AssertionError as error:
                raise AssertionError(f"case {case}") from error
    without_synchronization = zip(ranks[0][-1], ranks[1][-1], strict=True)
    assert not all(torch.equal(a, b) for a, b in without_synchronization)


def _normalized(normalize: Callable[[nn.Module], Any]) -> nn.Sequential:
    critic = image_critic()
    for layer in (critic[0], critic[3], critic[5]):
        normalize(layer)
    return critic


def _grouped() -> nn.Sequential:
    critic = image_critic()
    lipgan.group_spectral_norm(critic)
    return critic


def _batch_normalized() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 1)]
    return nn.Sequential(*layers).double()


# Critics whose buffers the wrapper broadcasts before each forward.
BUFFERED: dict[str, Callable[[], nn.Sequential]] = {
    "lipgan": lambda: _normalized(lipgan.spectral_norm),
    "torch": lambda: _normalized(nn.utils.parametrizations.spectral_norm),
    "torch's hook": lambda: _normalized(nn.utils.spectral_norm),
    "group": _grouped,
    "batch norm": _batch_normalized,
}


def _buffered_steps(critic: nn.Module, module: nn.Module, rows: slice, engine: str) -> list[Tensor]:
    """Gradients and buffers after three steps of a whole critic loss."""
    seen: list[Tensor] = []
    for step in range(3):
        module.zero_grad()
        real, fake = REAL[rows] + step, FAKE[rows]
        loss = critic(fake).mean() - critic(real).mean() + gradient_penalty(critic, real, kind="r1", engine=engine)
        loss.backward()
        seen += [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return seen + [buffer.double() for buffer in module.buffers()]


def _buffered_replica(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, make in BUFFERED.items():
        for engine in ENGINES:
            module = make()
            critic = DistributedDataParallel(module)
            rows = slice(3 * rank, 3 * rank + 3)
            results[name, engine] = _buffered_steps(critic, module, rows, engine)
            assert critic.module is module
    torch.save(results, f"{path}/{rank}.pt")
    leave()


@pytest.mark.filterwarnings("ignore:.*weight_norm|.*spectral_norm:FutureWarning")
def test_critics_with_buffers_under_distributed_data_parallel(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_buffered_replica, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, make in BUFFERED.items():
        module = make()
        expected = _buffered_steps(module, module, slice(6), "autograd")
        parameters = 3 * sum(p.requires_grad for p in module.parameters())
        for engine in ENGINES:
            ours, theirs = (results[name, engine] for results in ranks)
            assert_same(ours[:parameters], theirs[:parameters])  # averaged over the processes
            if name == "batch norm":
                # Each process has statistics of its own, which only its own rows decide.
                assert_same(ours[:parameters], ranks[0][name, "autograd"][:parameters])
            else:
                assert_same(ours, expected)


# ---- mixed precision ----


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_two_dtypes_are_mixed_in_the_wider_one(kind: str, engine: str) -> None:
    # What mixed precision makes: a generator's samples in half precision, beside data in float32.
    critic, real = image_critic().float(), REAL.float()
    fake = FAKE.bfloat16()
    options: dict[str, Any] = {"kind": kind, "engine": engine}
    if kind == "r2":  # taken at the half-precision samples themselves
        critic, options["generator"] = critic.bfloat16(), None
        plain = gradient_penalty(critic, real.bfloat16(), fake, **options)
        assert torch.equal(gradient_penalty(critic, real, fake, **options), plain)
        return
    mixed = gradient_penalty(critic, real, fake, generator=draws(), **options)
    plain = gradient_penalty(critic, real, fake.float(), generator=draws(), **options)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


def test_interpolation_promotes_as_the_textbook_does() -> None:
    x_hat = lipgan.interpolate(REAL.float(), FAKE.half(), generator=draws())
    eps = torch.rand(6, generator=draws()).view(6, 1, 1, 1)
    assert x_hat.dtype == torch.float32
    torch.testing.assert_close(x_hat, eps * REAL.float() + (1 - eps) * FAKE.half())


def steep_critic() -> nn.Sequential:
    """Its float16 gradient overflows: the slopes reach 2e6."""
    torch.manual_seed(6)
    critic = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1))
    with torch.no_grad():
        for layer in (critic[0], critic[2], critic[4]):
            layer.weight.mul_(400)
    return critic


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_finite_where_float32_is(dtype: torch.dtype, engine: str) -> None:
    critic, x = steep_critic(), samples(16, 8, dtype=torch.float32)
    plain = gradient_penalty(critic, x, kind="dragan", engine=engine, generator=draws())
    expected = grads_of(plain, critic)
    with torch.autocast("cpu", dtype):
        leaf = x.clone().requires_grad_()
        if dtype == torch.float16:
            (slope,) = torch.autograd.grad(critic(leaf).sum(), leaf)
            assert not slope.isfinite().all(), "the critic is too tame for this test"
        penalty = gradient_penalty(critic, x, kind="dragan", engine=engine, generator=draws())
        assert torch.is_autocast_enabled("cpu")
    grads = grads_of(penalty, critic)
    assert penalty.dtype == torch.float32
    assert math.isfinite(penalty.item())
    # bfloat16 has 8 bits: each of six products and their sums rounds by up to 2^-9, the square doubles it.
    rtol = 1e-5 if dtype == torch.float16 else 12 * 2**-8
    torch.testing.assert_close(penalty, plain, rtol=rtol, atol=0)
    for grad, exact in zip(grads, expected, strict=True):
        assert grad.isfinite().all()
        assert grad.dtype == torch.float32
        assert (grad - exact).norm() <= 2 * rtol * exact.norm() + 1e-30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler_steps(dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    critic = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    reference = copy.deepcopy(critic)
    x, y = samples(16, 8, dtype=torch.float32), samples(16, 8, seed=9, dtype=torch.float32)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = critic(y).mean() - critic(x).mean() + gradient_penalty(critic, x, y, generator=draws(k))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        reference.zero_grad()
        step(reference, x, y, draws(k)).backward()
        with torch.no_grad():
            for p in reference.parameters():
                p.sub_(0.1 * p.grad)
    assert scaler.get_scale() == 1024.0, "no step was skipped"
    moved = 0.0
    for ours, theirs in zip(critic.parameters(), reference.parameters(), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
        moved = max(moved, float((ours - theirs).detach().norm()))
    assert moved > 0, "autocast had no part in it"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_critic(dtype: torch.dtype, engine: str, autocast: bool) -> None:
    torch.manual_seed(8)
    critic = nn.Sequential(nn.Linear(8, 16), nn.Softplus(), nn.Linear(16, 1)).to(dtype)
    x = samples(16, 8, dtype=dtype)
    wide = copy.deepcopy(critic).double()
    truth = gradient_penalty(wide, x.double(), kind="r1", engine="autograd")
    with torch.autocast("cpu", dtype) if autocast else nullcontext():
        penalty = gradient_penalty(critic, x, kind="r1", engine=engine)
    assert penalty.dtype == torch.float32
    # Two products and one derivative round once each, their sums of 16 terms a few times: at most 16 roundings.
    eps = torch.finfo(dtype).eps
    assert abs(penalty.item() - truth.item()) <= 16 * eps * truth.item()
    exact = grads_of(truth, wide)
    for grad, e in zip(grads_of(penalty, critic), exact, strict=True):
        assert grad.dtype == dtype
        assert (grad.double() - e).norm() <= 16 * eps * e.norm() + eps**2
    # The factor of a GradScaler, which is no number of float16, scales gradients that stay within its range.
    small = gradient_penalty(critic, x, kind="r1", weight=1e-2, engine="fused")
    assert_same(
        [g.float() / 65536 for g in grads_of(small * 65536.0 / 8, critic)],
        [g.float() / 8 for g in grads_of(gradient_penalty(critic, x, kind="r1", weight=1e-2, engine="fused"), critic)],
        4 * eps,
    )


def test_half_arguments_and_half_critics_under_float16_autocast() -> None:
    critic = Conditional()
    labels, shared = torch.tensor([0, 1, 2, 1]), samples(6, dtype=torch.float16).requires_grad_()
    x = samples(4, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        penalty = gradient_penalty(critic, x, kind="r1", critic_args=(labels, shared), engine="fused")
    penalty.backward()
    assert shared.grad.dtype == torch.float16
    assert shared.grad.abs().max() > 0
    half = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).half()
    with torch.autocast("cpu", torch.float16):
        assert math.isfinite(gradient_penalty(half, x, kind="r1").item())


def test_float32_is_as_accurate_as_torch() -> None:
    critic = image_critic()
    truth = gradient_penalty(critic, REAL, FAKE, generator=draws(), engine="autograd")
    truths = [truth.detach(), *grads_of(truth, critic)]
    critic = critic.float()
    points = lipgan.interpolate(REAL, FAKE, generator=draws()).float()
    results = []
    for engine in ENGINES:
        penalty = gradient_penalty(critic, points, points, engine=engine)  # mixtures of a sample with itself
        results.append([penalty.detach(), *grads_of(penalty, critic)])
    for ours, theirs, exact in zip(*results, truths, strict=True):
        # The points are rounded, too: by one unit, which sums of 48 and 64 products carry to at most 32 in the result.
        assert_as_accurate(ours, theirs, exact, roundings=32)


# ---- lazy regularization ----


def test_lazy_regularization() -> None:
    critic = image_critic()
    calls: list[dict[str, Any]] = []

    def regularizer(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return gradient_penalty(*args, **kwargs)

    lazy = LazyRegularization(regularizer, every=4)
    plain = gradient_penalty(critic, REAL, kind="r1", weight=5.0)
    results = [lazy(critic, REAL, kind="r1", weight=5.0) for _ in range(9)]
    assert calls == [{"kind": "r1", "weight": 5.0}] * 3
    for k, result in enumerate(results):
        if k % 4 == 0:
            torch.testing.assert_close(result, 4 * plain)
            assert result.requires_grad
        else:
            assert result.item() == 0
            assert not result.requires_grad
            assert result.shape == ()
    expected = grads_of(4 * plain, critic)
    assert_same(grads_of(results[0] + results[1], critic), expected, 1e-12)
    torch.testing.assert_close(
        torch.stack([r.detach().double() for r in results[:8]]).mean(), plain.detach(), msg="the mean is kept"
    )
    again = LazyRegularization(regularizer, every=4)
    again.load_state_dict(lazy.state_dict())
    assert [again(critic, REAL, kind="r1").item() > 0 for _ in range(4)] == [False, False, False, True]
    assert LazyRegularization(gradient_penalty, 1)(critic, REAL, kind="r1").item() > 0
    meta = torch.empty(2, device="meta")
    again.step = 1
    assert again(critic, real=meta).device == meta.device
    assert again(critic).device == CPU


def test_lazy_regularization_for_adam() -> None:
    lr, betas = LazyRegularization(gradient_penalty, every=16).adam(0.002, (0.0, 0.99))
    # The numbers of StyleGAN2: 0.002 * 16 / 17, 0, 0.99^(16 / 17).
    assert lr == pytest.approx(0.00188235, rel=1e-5)
    assert betas == (0.0, pytest.approx(0.990586, rel=1e-5))


def test_lazy_regularization_makes_up_for_a_failed_step() -> None:
    critic = image_critic()
    lazy = LazyRegularization(gradient_penalty, every=3)
    with pytest.raises(ValueError, match="kind"):
        lazy(critic, REAL, kind="r3")
    assert lazy(critic, REAL, kind="r1").item() > 0
    for every in (0, -1, 1.5, True, "4", None):
        with pytest.raises(ValueError, match=r"every must be a whole number of at least 1, got "):
            LazyRegularization(gradient_penalty, every)  # type: ignore[arg-type]


# ---- bad input ----

FLAT = samples(4, 5)


def mlp(x: Tensor) -> Tensor:
    return torch.tanh(x).sum(1)


def refuses(name: str, *args: Any, error: type[Exception] = ValueError, match: str, **kwargs: Any) -> Any:
    return pytest.param(args, kwargs, error, match, id=name)


BAD = [
    refuses("shapes", mlp, FLAT, FLAT[:, :4], match=r"fake must have the shape of real, \(4, 5\), got \(4, 4\)"),
    refuses("batches", mlp, FLAT, FLAT[:3], match=r"fake must have the shape of real, \(4, 5\), got \(3, 5\)"),
    refuses(
        "dtypes", mlp, FLAT, FLAT.float(), error=TypeError, match=r"fake .* real, torch.float64, got torch.float32"
    ),
    refuses("devices", mlp, FLAT, FLAT.to("meta"), match=r"fake must be on the device of real, cpu, got meta"),
    refuses("no fake", mlp, FLAT, match=r"fake must be given for kind 'wgan-gp', got None"),
    refuses("no fake for r1+r2", mlp, FLAT, kind="r1+r2", match=r"fake must be given for kind 'r1\+r2'"),
    refuses("no real", mlp, None, FLAT, error=TypeError, match="real must be a tensor, got NoneType"),
    refuses("array", mlp, FLAT.numpy(), FLAT, error=TypeError, match="real must be a tensor, got ndarray"),
    refuses("list", mlp, FLAT, [1.0], error=TypeError, match="fake must be a tensor, got list"),
    refuses("integers", mlp, FLAT.long(), FLAT.long(), error=TypeError, match="real must be float32.* got torch.int64"),
    refuses("integer fake", mlp, FLAT, FLAT.int(), error=TypeError, match="fake must be float32.* got torch.int32"),
    refuses("complex", mlp, FLAT + 0j, FLAT + 0j, error=TypeError, match="real must be float32.* got torch.complex128"),
    refuses("booleans", mlp, FLAT > 0, kind="r1", error=TypeError, match="real must be float32.* got torch.bool"),
    refuses(
        "sparse", mlp, FLAT.to_sparse(), kind="r1", error=TypeError, match="real must be a dense.* torch.sparse_coo"
    ),
    refuses("batch of 0", mlp, FLAT[:0], FLAT[:0], match=r"real must hold at least one sample, got shape \(0, 5\)"),
    refuses("empty samples", mlp, FLAT[:, :0], FLAT[:, :0], match=r"real must hold .* got shape \(4, 0\)"),
    refuses("no batch", mlp, FLAT[0, 0], FLAT[0, 0], match=r"real must hold at least one sample, got shape \(\)"),
    refuses("no channels", lambda x: x, FLAT[:, 0], kind="r1", norm="pixel", match=r"channels .* got shape \(4,\)"),
    refuses("negative target", mlp, FLAT, FLAT, target=-0.5, match="target must not be negative, got -0.5"),
    refuses("infinite target", mlp, FLAT, FLAT, target=math.inf, match="target must be finite, got inf"),
    refuses("NaN target", mlp, FLAT, FLAT, target=math.nan, match="target must be finite, got nan"),
    refuses(
        "target of no kind", mlp, FLAT, FLAT, target=None, error=TypeError, match="target must be a number, got None"
    ),
    refuses("infinite weight", mlp, FLAT, FLAT, weight=-math.inf, match="weight must be finite, got -inf"),
    refuses(
        "weight of no kind", mlp, FLAT, FLAT, weight="much", error=TypeError, match="weight must be a .* got 'much'"
    ),
    refuses(
        "many weights", mlp, FLAT, FLAT, weight=torch.ones(2), error=TypeError, match="weight must be a number, got"
    ),
    refuses("kind", mlp, FLAT, FLAT, kind="wgan", match=r"kind must be one of wgan-gp, lp, .*, got 'wgan'"),
    refuses("kind of no kind", mlp, FLAT, FLAT, kind=["r1"], match=r"kind must be one of .*, got \['r1'\]"),
    refuses("engine", mlp, FLAT, FLAT, engine="fast", match="engine must be one of auto, fused, autograd, got 'fast'"),
    refuses("norm", mlp, FLAT, FLAT, norm="l1", match="norm must be one of sample, pixel, got 'l1'"),
    refuses("critic", 7, FLAT, FLAT, error=TypeError, match="critic must be a module or a function, got 7"),
    refuses("no critic", None, FLAT, FLAT, error=TypeError, match="critic must be a module or a function, got None"),
    refuses("labels", mlp, FLAT, FLAT, critic_args=FLAT, error=TypeError, match=r"critic_args must .* got Tensor"),
    refuses("one argument", mlp, FLAT, FLAT, critic_args=3, error=TypeError, match=r"critic_args must be .* got int"),
]


def outcome(name: str, critic: Callable[..., Any], match: str, **kwargs: Any) -> Any:
    return refuses(f"critic that returns {name}", critic, FLAT, FLAT, match=match, **kwargs)


BAD += [
    outcome("None", lambda x: None, r"critic must return one tensor of scores, got NoneType$"),
    outcome("a number", lambda x: 3, r"critic must return one tensor of scores, got int$"),
    outcome("a list", lambda x: [mlp(x), x], "got list of 2: say which one counts by output"),
    outcome("a dict", lambda x: {"s": mlp(x)}, "got dict with keys 's': say which one counts by output"),
    outcome("vectors", lambda x: x * 2, r"one score for each of 4 samples, got shape \(4, 5\): say which one counts"),
    outcome("a mean", lambda x: mlp(x).mean(), r"one score for each of 4 samples, got shape \(\)"),
    outcome("half a batch", lambda x: mlp(x)[:2], r"one score for each of 4 samples, got shape \(2,\)"),
    outcome(
        "complex numbers", lambda x: x.sum(1).detach() + 0j, "critic must return real numbers, got torch.complex128"
    ),
    outcome("detached scores", lambda x: mlp(x).detach(), "critic must return scores that depend on the samples"),
    outcome("detached samples", lambda x: mlp(x.detach()), "critic must return scores that depend on the samples"),
    outcome("constants", lambda x: torch.ones(4), "critic must return scores that depend on the samples"),
    outcome("too few", lambda x: [mlp(x)], "output 3 does not select from the critic's list of 1", output=3),
    outcome("no such key", lambda x: {"s": mlp(x)}, "output 't' does not select from .* keys 's'", output="t"),
    outcome("a wrong output", lambda x: {"s": [mlp(x)]}, "one tensor of scores, got list of 1", output="s"),
]


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize(("args", "kwargs", "error", "match"), BAD)
def test_bad_input(args: Any, kwargs: dict[str, Any], error: type[Exception], match: str, engine: str) -> None:
    with pytest.raises(error, match=match) as caught:
        gradient_penalty(*args, **{"engine": engine, **kwargs})
    assert type(caught.value) is error
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_of_parameters_alone_do_not_depend_on_the_samples(engine: str) -> None:
    w = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="depend on the samples"):
        gradient_penalty(lambda x: w * 2, FLAT, kind="r1", engine=engine)
    with torch.no_grad(), pytest.raises(ValueError, match="depend on the samples"):
        gradient_penalty(lambda x: w * 2, FLAT, kind="r1", engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_nan_in_the_samples(engine: str, dtype: torch.dtype) -> None:
    """Found before the critic runs: the slopes of a piecewise-linear critic are finite at NaN."""
    calls = []
    bad = FLAT.to(dtype, copy=True)
    bad[2, 3] = bad[1, 0] = math.nan

    def critic(x: Tensor) -> Tensor:
        calls.append(x)
        return torch.relu(x).sum(1)

    good = FLAT.to(dtype)
    with pytest.raises(ValueError, match="real must not contain NaN, got 2 of them"):
        gradient_penalty(critic, bad, good, engine=engine)
    for kind in ("wgan-gp", "r2", "r1+r2"):
        with pytest.raises(ValueError, match="fake must not contain NaN, got 2 of them"):
            gradient_penalty(critic, good, bad, kind=kind, engine=engine)
    with pytest.raises(ValueError, match="real must not contain NaN"):
        gradient_penalty(critic, bad, kind="dragan", engine=engine)
    assert not calls
    gradient_penalty(critic, good, bad, kind="r1", engine=engine)  # where it is not looked at
    large = torch.full((4, 5), torch.finfo(dtype).max, dtype=dtype)
    assert math.isfinite(gradient_penalty(critic, large, kind="r1", engine=engine).item())


def test_explain_checks_its_arguments() -> None:
    for args, message in (
        ((mlp, FLAT.long()), "real"),
        ((None, FLAT), "critic"),
        ((mlp, [1]), "real must be a tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            explain(*args)
    with pytest.raises(TypeError, match="critic_args"):
        explain(mlp, FLAT, critic_args=FLAT)


# ---- failures and company ----


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
        return torch.from_numpy(x.numpy(force=True) ** 2)

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
