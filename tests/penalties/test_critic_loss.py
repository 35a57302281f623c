"""A critic's loss with its penalty from one forward pass, against the textbook in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from devices import DEVICE
from processes import leave, run
from tape_critics import ImageAttention
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lipgan
from lipgan.objectives import losses
from lipgan.penalties import CriticLoss, UnsupportedCriticError, critic_loss
from lipgan.penalties.perceptron import Perceptron
from lipgan.penalties.tape import ScoreGradients

Loss = Callable[[Tensor, Tensor], Tensor]


def softplus(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def relativistic(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(fake - real).mean()


class Residual(nn.Module):
    """Branches that join, an average over pixels, a scale and a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.scale, self.shift = nn.Parameter(torch.randn(6, 1, 1)), nn.Parameter(torch.randn(6, 1, 1))
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        h = F.avg_pool2d(h + 0.1 * F.leaky_relu(self.second(h), 0.2) * self.scale + self.shift, 2)
        return self.last(F.relu(h).sum((2, 3))).squeeze(1)


class Sequences(nn.Module):
    """Samples lie along the second dimension, and then inside of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(9, 5), nn.Linear(10, 1)
        self.mixing = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, 9]
        h = F.leaky_relu(self.linear(x.transpose(0, 1)), 0.3)  # [2, B, 5]
        h = F.relu(self.linear(F.pad(h.reshape(-1, 5), (2, 2)))).view(2, -1, 5)  # rows of [2 B, 5]
        h = torch.einsum("ij,jbk->ibk", self.mixing, h)
        return self.last(h.transpose(0, 1).flatten(1))


class MeanOfOthers(nn.Module):
    """Piecewise linear, and every sample sees the mean of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.last(F.relu(h - h.mean(0)))


class Patches(nn.Module):
    """A score for each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 5, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(5, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Draws(nn.Module):
    """A factor that is drawn, and a product with a number that carries no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        coin = torch.bernoulli(torch.sigmoid(h.detach()))
        return self.last(F.dropout(h, 0.3) * coin + (h > 0.1).to(h.dtype) * self.weight)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def smooth_perceptron() -> nn.Module:
    layers = nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
    return nn.Sequential(*layers)


def image_stack(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), *modules, nn.Flatten(), nn.Linear(36, 1))


IMAGES, VECTORS, SERIES = (4, 2, 6, 6), (4, 4), (4, 2, 9)
# (critic, shape of samples, whether the loss rides in the tangent pass for r1)
CRITICS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "perceptron in closed form": (perceptron, VECTORS, False),
    "smooth perceptron in closed form": (smooth_perceptron, VECTORS, False),
    "perceptron": (lambda: nn.Sequential(perceptron(), nn.LeakyReLU(0.5)), VECTORS, True),
    "residual": (Residual, IMAGES, True),
    "sequences": (Sequences, SERIES, True),
    "draws": (Draws, VECTORS, True),
    "prelu": (lambda: image_stack(nn.PReLU(4), nn.MaxPool2d(3, 1, 1)), IMAGES, True),
    "batch norm in evaluation": (lambda: image_stack(nn.BatchNorm2d(4), nn.ReLU()).eval(), IMAGES, True),
    "one score among patches": (
        lambda: nn.Sequential(Patches(), nn.Flatten(), nn.Linear(9, 1, bias=False)),
        IMAGES,
        True,
    ),
    "patches": (Patches, IMAGES, False),
    "mean of others": (MeanOfOthers, VECTORS, False),
    "batch norm": (lambda: image_stack(nn.BatchNorm2d(4), nn.ReLU()), IMAGES, False),
    "group norm": (lambda: image_stack(nn.GroupNorm(2, 4), nn.LeakyReLU(0.2)), IMAGES, False),
    "smooth": (lambda: image_stack(nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), IMAGES, False),
    "attention": (
        lambda: image_stack(nn.ReLU(), nn.Upsample(scale_factor=2), ImageAttention(), nn.AvgPool2d(2)),
        IMAGES,
        False,
    ),
    "spectral norm": (
        lambda: nn.Sequential(lipgan.nn.SNLinear(4, 8), nn.ReLU(), lipgan.nn.SNLinear(8, 1)),
        VECTORS,
        True,
    ),
    "an activation of autograd's own": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Mish(), nn.Linear(6, 1)),
        VECTORS,
        False,
    ),
}
LOSSES: dict[str, Loss] = {"softplus": softplus, "relativistic": relativistic}
# By name the tape is what is new; the choice of an engine and autograd have longer tests of their own.
ENGINES = [
    pytest.param(name, marks=() if name == "fused" else pytest.mark.slow) for name in ("fused", "auto", "autograd")
]
KINDS = ("r1", "r2", "r1+r2", "wgan-gp", "max", None)
# Of the other engines those kinds that call the critic in different ways.
KINDS_BY_ENGINE = [
    pytest.param(kind, engine.values[0], marks=engine.marks)
    for engine in ENGINES
    for kind in (KINDS if engine.values[0] == "fused" else ("r1", "r1+r2", "wgan-gp"))
]


def samples(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def textbook(critic: nn.Module, real: Tensor, fake: Tensor, loss: Loss, kind: str | None, joined: bool) -> CriticLoss:
    """Weight 3, target 1; ``joined``: real and fake in one batch, as "r1+r2" takes them for what couples no samples."""
    points = [x.detach().requires_grad_() for x in (real, fake)]
    scores = critic(torch.cat(points)).chunk(2) if joined else [critic(x) for x in points]
    value = loss(*scores)
    penalty = torch.zeros((), dtype=real.dtype)
    if kind in ("r1", "r2", "r1+r2"):
        for k in {"r1": [0], "r2": [1], "r1+r2": [0, 1]}[kind]:
            (g,) = torch.autograd.grad(scores[k].sum(), points[k], create_graph=True)
            penalty = penalty + 1.5 * g.flatten(1).square().sum(1).mean()
    elif kind is not None:
        eps = torch.rand(len(real), dtype=real.dtype, generator=torch.Generator().manual_seed(9))
        eps = eps.view(-1, *[1] * (real.ndim - 1))
        x = (eps * real + (1 - eps) * fake).requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        excess = (g.flatten(1).norm(dim=1) - 1).square()
        penalty = 3 * (excess.mean() if kind == "wgan-gp" else (g.flatten(1).norm(dim=1).max() - 1).square())
    return CriticLoss(value + penalty, value.detach(), penalty.detach(), *(s.detach() for s in scores))


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    critic = build().double()
    torch.manual_seed(4)
    return critic


def agree(ours: CriticLoss, critic: nn.Module, theirs: CriticLoss, other: nn.Module) -> None:
    """Values, scores, every gradient, buffers and the random state: the two critics began alike."""
    state = torch.get_rng_state()
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        torch.testing.assert_close(
            a.detach(), b.detach(), rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
    grads = [
        torch.autograd.grad(result.total, list(module.parameters()), allow_unused=True)
        for result, module in ((ours, critic), (theirs, other))
    ]
    largest = max(float(g.abs().max()) for g in grads[1] if g is not None)
    for (name, p), a, b in zip(critic.named_parameters(), *grads, strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        assert float((a - b).abs().max()) <= 1e-10 * largest, (name, a, b)
    for (name, a), b in zip(critic.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=name)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("kind", "engine"), KINDS_BY_ENGINE)
@pytest.mark.parametrize("name", CRITICS)
def test_the_textbook(name: str, kind: str | None, engine: str) -> None:
    build, shape, _ = CRITICS[name]
    loss = relativistic if kind in ("r1+r2", "max") else softplus
    real, fake = samples(shape, 1), samples(shape, 2)
    critic = fresh(build)
    ours = critic_loss(
        critic, real, fake, loss, kind=kind, weight=3.0, engine=engine, generator=torch.Generator().manual_seed(9)
    )
    after = torch.get_rng_state()
    # The choice of an engine takes autograd for small critics on a CPU, which sees real and fake one after the other: a
    # spectral norm iterates once more.
    by_autograd = engine == "auto" and shape is not IMAGES and DEVICE.type == "cpu"
    apart = name in ("mean of others", "batch norm") or by_autograd
    other = fresh(build)
    theirs = textbook(other, real, fake, loss, kind, joined=kind == "r1+r2" and not apart)
    assert torch.equal(torch.get_rng_state(), after)
    agree(ours, critic, theirs, other)


class Packs(nn.Module):
    """One score for two rows, as PacGAN and CTGAN have it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.2), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.reshape(-1, 8))


class Squeezed(nn.Module):
    """Whose score of a last batch of one has no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("build", "rows"), [(Packs, 4), (Squeezed, 3), (Squeezed, 1)])
def test_packs_and_a_last_batch_of_one(
    build: Callable[[], nn.Module], rows: int, kind: str | None, engine: str
) -> None:
    real, fake = samples((rows, 4), 1), samples((rows, 4), 2)
    critic, other = fresh(build), fresh(build)
    ours = critic_loss(
        *(critic, real, fake, softplus),
        **{"kind": kind, "weight": 3.0, "engine": engine, "generator": torch.Generator().manual_seed(9)},
    )
    # In one batch of two, each of the scores has a dimension.
    joined = kind == "r1+r2" and build is Squeezed
    agree(ours, critic, textbook(other, real, fake, softplus, kind, joined=joined), other)


@pytest.mark.parametrize("name", CRITICS)
def test_the_loss_costs_no_pass_where_it_need_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two ways is taken: within the products of the tangent pass, or by a backward pass."""
    build, shape, rides = CRITICS[name]
    made: list[Tensor] = []

    class Noted(ScoreGradients):
        def __init__(self, weights: Tensor) -> None:
            made.append(weights)
            super().__init__(weights)

    monkeypatch.setattr("lipgan.penalties.tape.ScoreGradients", Noted)
    critic_loss(fresh(build), samples(shape, 1), samples(shape, 2), softplus, kind="r1", engine="fused")
    # The closed form is one of CPU and GPU; elsewhere the tape takes that perceptron, too.
    assert bool(made) == (rides or (name == "perceptron in closed form" and DEVICE.type == "emulated"))


# ---- what is asked of it ----


@pytest.mark.parametrize("kind", ["r1", "r1+r2", "wgan-gp"])
@pytest.mark.parametrize("form", ["perceptron", "images"])
@pytest.mark.parametrize("name", losses.names())
def test_losses_by_name(name: str, form: str, kind: str) -> None:
    """By its name, and as the function that it is: by the first calls, by what they kept, and by the textbook."""
    shape = VECTORS if form == "perceptron" else IMAGES
    real, fake = samples(shape, 1), samples(shape, 2)

    def body() -> nn.Module:
        if form == "perceptron":
            return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1), nn.Flatten(0))
        return nn.Sequential(image_stack(nn.SiLU()), nn.Flatten(0))

    critic, other = fresh(body), fresh(body)
    loss = losses.get(name).critic_loss
    for given in (name, loss, lambda real, fake: loss(real, fake)):
        for _ in range(3):
            draws = torch.Generator().manual_seed(9)
            ours = critic_loss(critic, real, fake, given, kind=kind, weight=3.0, generator=draws)
            agree(ours, critic, textbook(other, real, fake, loss, kind, joined=kind == "r1+r2"), other)


# (scores [B, 1, 2, 2] as the critic returns them, whether the first half of them is that of the first half of a batch)
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "as they are": (lambda scores: scores, True),
    "in one dimension": (lambda scores: scores.flatten(), True),
    "patches first": (lambda scores: scores.permute(2, 3, 0, 1), False),
    "patches first, in one dimension": (lambda scores: scores.flatten(1).t().flatten(), False),
    "a row": (lambda scores: scores.flatten(1)[:, 0][None], False),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_patches(layout: str, activation: Callable[[], nn.Module], engine: str) -> None:
    """A batch of real and fake samples is scored only where half of the scores belong to the real ones."""
    lay, in_order = LAYOUTS[layout]

    class Laid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(2, 4, 3), activation(), nn.Conv2d(4, 1, 3))

        def forward(self, x: Tensor) -> Tensor:
            return lay(self.body(x))

    critic, other, (real, fake) = fresh(Laid), fresh(Laid), (samples(IMAGES, 1), samples(IMAGES, 2))
    for given, loss in ((name, losses.get(name).critic_loss) for name in ("hinge", "relativistic")):
        for way in (given, loss, lambda real, fake, loss=loss: loss(real, fake)):
            for kind in ("r1", "r1+r2", "wgan-gp"):
                draws = torch.Generator().manual_seed(9)
                ours = critic_loss(critic, real, fake, way, kind=kind, weight=3.0, generator=draws, engine=engine)
                joined = kind == "r1+r2" and in_order
                agree(ours, critic, textbook(other, real, fake, loss, kind, joined=joined), other)


@pytest.mark.cpu  # the op's sums of float32; PyTorch's elsewhere
@pytest.mark.parametrize("kind", ["wgan-gp", "r1+r2"])
def test_what_cancels_leaves_no_rounding(kind: str) -> None:
    """Units that are active at all samples: Adam would make a step of its full size of what is left of their biases."""
    torch.manual_seed(5)
    critic = nn.Sequential(nn.Linear(3, 40), nn.LeakyReLU(0.2), nn.Linear(40, 24), nn.LeakyReLU(0.2), nn.Linear(24, 1))
    with torch.no_grad():
        for layer in (critic[0], critic[2]):
            layer.bias += 50
    for n in (48, 50, 64):
        real, fake = torch.rand(n, 3), torch.rand(n, 3)
        critic_loss(critic, real, fake, "wasserstein", kind=kind).total.backward()
        for layer in (critic[0], critic[2], critic[4]):
            assert layer.weight.grad.abs().max() > 0
            assert not layer.bias.grad.any(), (n, layer.bias.grad)


class Conditional(nn.Module):
    """Of several tensors and labels, with the scores among other things."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.embedding = nn.Linear(4, 6), nn.Linear(3, 6), nn.Embedding(5, 6)

    def forward(self, a: Tensor, b: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.a(a) + self.b(b))
        return {"features": h, "scores": (h * self.embedding(labels)).sum(1)}


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize("kind", ["r1", "r1+r2", "wgan-gp"])
def test_parts_labels_and_outputs(kind: str, engine: str) -> None:
    labels = torch.tensor([0, 4, 2, 2])
    real, fake = ((samples((4, 4), k), samples((4, 3), k + 2)) for k in (1, 2))
    critic, other = fresh(Conditional), fresh(Conditional)
    ours = critic_loss(
        *(critic, real, fake, softplus),
        **{"kind": kind, "weight": 3.0, "engine": engine, "critic_args": (labels,), "output": "scores"},
        generator=torch.Generator().manual_seed(9),
    )

    class Joined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return other(x[:, :4], x[:, 4:], labels.repeat(len(x) // 4))["scores"]

    theirs = textbook(Joined(), torch.cat(real, 1), torch.cat(fake, 1), softplus, kind, joined=False)
    agree(ours, critic, theirs, other)


@pytest.mark.parametrize("kind", ["r1", "r2", "r1+r2"])
def test_what_else_the_loss_depends_on_gets_its_gradients(kind: str) -> None:
    critic, other = fresh(CRITICS["residual"][0]), fresh(CRITICS["residual"][0])
    ours, theirs = (nn.Parameter(torch.tensor(0.7, dtype=torch.float64)) for _ in "ab")
    real, fake = samples(IMAGES, 1), samples(IMAGES, 2)
    a = critic_loss(critic, real, fake, lambda r, f: softplus(r * ours, f), kind=kind, weight=3.0, engine="fused")
    b = textbook(other, real, fake, lambda r, f: softplus(r * theirs, f), kind, joined=False)
    a.total.backward()
    b.total.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=0)
    for p, q in zip(critic.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [perceptron, Residual])
def test_a_backward_of_the_total_does_not_go_through_the_loss_again(make: Callable[[], nn.Module]) -> None:
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            calls.append(grad)
            return grad

    shape = IMAGES if make is Residual else VECTORS
    critic = fresh(make)
    real, fake = samples(shape, 1), samples(shape, 2)
    for _ in range(3):  # by the tape, as a plan is recorded, and by the plan
        calls.clear()
        step = critic_loss(critic, real, fake, lambda a, b: softplus(Counted.apply(a), b), kind="r1+r2")
        step.total.backward()
        assert len(calls) == 1


def test_a_loss_of_a_large_graph_gets_its_gradients() -> None:
    critic, factor = fresh(perceptron), torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        value = softplus(a, b) * factor
        for _ in range(200):
            value = value * 1.0
        return value

    step = critic_loss(critic, samples(VECTORS, 1), samples(VECTORS, 2), loss, kind="r1")
    step.total.backward()
    assert factor.grad is not None
    torch.testing.assert_close(factor.grad, step.loss)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_only(mode: Callable[[], Any], kind: str | None, engine: str) -> None:
    real, fake = samples(IMAGES, 1), samples(IMAGES, 2)

    def take(critic: nn.Module) -> CriticLoss:
        options: dict[str, Any] = {"kind": kind, "engine": engine, "generator": torch.Generator().manual_seed(9)}
        return critic_loss(critic, real, fake, softplus, **options)

    critic = fresh(Residual)
    with mode():
        values = take(critic)
    for ours, theirs in zip(values, take(critic), strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=0)


def test_frozen_critics_and_samples_that_require_gradients() -> None:
    critic, real, fake = fresh(Residual).requires_grad_(False), samples(IMAGES, 1), samples(IMAGES, 2).requires_grad_()
    step = critic_loss(critic, real, fake, softplus, kind="r1", engine="fused")
    assert not step.penalty.requires_grad
    critic = fresh(Residual)
    critic_loss(critic, real, fake, softplus, kind="r1+r2", engine="fused").total.backward()
    assert fake.grad is None
    critic.requires_grad_(False).last.requires_grad_()
    other = fresh(Residual)
    ours = critic_loss(critic, real, fake.detach(), softplus, kind="r1", weight=3.0, engine="fused")
    theirs = textbook(other, real, fake.detach(), softplus, "r1", joined=False)
    for p, q in zip(critic.last.parameters(), other.last.parameters(), strict=True):
        (a,), (b,) = (torch.autograd.grad(r.total, t, retain_graph=True) for r, t in ((ours, p), (theirs, q)))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Opaque(nn.Module):
    """Changes a buffer and draws numbers before it does what the tape cannot follow."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.first, self.last, self.late = nn.Linear(4, 6), nn.Linear(6, 1), late
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.norm(self.first(x)), 0.2)
        return self.last(F.hardsigmoid(h) if self.late else Hidden.apply(h))


@pytest.mark.parametrize("kind", ["r1", "r2", "r1+r2"])
def test_a_refusal_starts_again_with_autograd(kind: str) -> None:
    def build() -> nn.Module:
        return Opaque(late=False)

    real, fake = samples(VECTORS, 1), samples(VECTORS, 2)
    with pytest.raises(UnsupportedCriticError, match=r"module '\(the critic itself\) \(Opaque\)': Hidden"):
        critic_loss(fresh(build), real, fake, softplus, kind=kind, engine="fused")
    critic, other = fresh(build), fresh(build)
    for _ in range(2):  # found out, and remembered
        torch.manual_seed(5)
        ours = critic_loss(critic, real, fake, softplus, kind=kind, weight=3.0)
        torch.manual_seed(5)
        agree(ours, critic, textbook(other, real, fake, softplus, kind, joined=False), other)


def test_a_late_refusal_takes_both_forward_passes_back() -> None:
    """PyTorch has no second derivative of Hardsigmoid: that is known when both batches have gone through."""
    critic, clean = fresh(lambda: Opaque(late=True)), fresh(lambda: Opaque(late=True))
    real, fake = samples(VECTORS, 1), samples(VECTORS, 2)
    with pytest.raises(UnsupportedCriticError, match=r"hardsigmoid\.default cannot be differentiated twice"):
        critic_loss(critic, real, fake, softplus, kind="r1", engine="fused")
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(4).get_state())
    for a, b in zip(critic.buffers(), clean.buffers(), strict=True):
        assert torch.equal(a, b)


# ---- mixed precision, DistributedDataParallel, torch.compile ----


@pytest.mark.parametrize("kind", ["r1", "r1+r2", "wgan-gp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, kind: str) -> None:
    critic, reference = fresh(Residual).float(), fresh(Residual)
    real, fake = samples(IMAGES, 1), samples(IMAGES, 2)
    with torch.autocast("cpu", dtype=dtype):
        generator = torch.Generator().manual_seed(9)
        half = fake.to(dtype)  # what a generator makes
        ours = critic_loss(
            critic, real.float(), half, softplus, kind=kind, weight=3.0, engine="fused", generator=generator
        )
    assert ours.total.dtype == torch.float32
    theirs = textbook(reference, real, half.double(), softplus, kind, joined=False)
    # Of both roundings, float16 is not taken: it runs in float32.
    tolerance = 0.06 if dtype == torch.bfloat16 or kind == "wgan-gp" else 1e-4
    assert abs(ours.total.item() - theirs.total.item()) < tolerance * theirs.total.item()
    ours.total.backward()
    theirs.total.backward()
    largest = max(float(p.grad.abs().max()) for p in reference.parameters())
    for p, q in zip(critic.parameters(), reference.parameters(), strict=True):
        assert float((p.grad - q.grad).abs().max()) < tolerance * largest


def test_a_scaled_loss() -> None:
    critic, other = fresh(Residual), fresh(Residual)
    real, fake = samples(IMAGES, 1), samples(IMAGES, 2)
    (critic_loss(critic, real, fake, softplus, kind="r1", weight=3.0, engine="fused").total * 1024).backward()
    textbook(other, real, fake, softplus, "r1", joined=False).total.backward()
    for p, q in zip(critic.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad / 1024, q.grad, rtol=1e-9, atol=1e-12)


DDP_KINDS: tuple[str | None, ...] = ("r1", "r2", "r1+r2", None)


def _replica(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    real, fake = (samples((8, *IMAGES[1:]), k)[4 * rank : 4 * rank + 4] for k in (1, 2))
    results = []
    for kind in DDP_KINDS:
        for engine in ("fused", "autograd"):
            for settings in ({}, {"static_graph": True}):
                module = fresh(Residual)
                critic = DistributedDataParallel(module, **settings)
                for _ in range(2):
                    module.zero_grad()
                    critic_loss(critic, real, fake, softplus, kind=kind, weight=3.0, engine=engine).total.backward()
                results.append([p.grad.clone() for p in module.parameters()])
    # With buffers: the ranks stay alike.
    critic = DistributedDataParallel(fresh(CRITICS["batch norm"][0]))
    critic_loss(critic, real, fake, softplus, kind="r1+r2").total.backward()
    results.append([p.grad.clone() for p in critic.parameters()])
    torch.save(results, f"{path}/{rank}.pt")
    leave()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    run(_replica, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    real, fake = (samples((8, *IMAGES[1:]), k) for k in (1, 2))
    expected = []
    for kind in DDP_KINDS:
        module = fresh(Residual)
        textbook(module, real, fake, softplus, kind, joined=False).total.backward()
        expected += 4 * [[p.grad for p in module.parameters()]]
    for results in ranks:
        for ours, theirs in zip(results[:-1], expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(ranks[0][-1], ranks[1][-1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_compiled_training_step() -> None:
    critic, other = fresh(Residual), fresh(Residual)
    real, fake = samples(IMAGES, 1), samples(IMAGES, 2)

    def step(critic: nn.Module) -> Tensor:
        return critic_loss(critic, real, fake, softplus, kind="r1", weight=3.0).total * 2

    torch.compile(step, backend="aot_eager")(torch.compile(critic, backend="aot_eager")).backward()
    step(other).backward()
    for p, q in zip(critic.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13)


# ---- bad input ----

X = torch.randn(4, 4)
PERCEPTRON = nn.Linear(4, 1)


@pytest.mark.parametrize("kind", ["r1", "r1+r2", "wgan-gp", None])
@pytest.mark.parametrize(
    ("loss", "error", "sentence"),
    [
        (3, TypeError, "loss must be a name of lipgan.losses or a function of two tensors of scores, got 3"),
        ("softplus", ValueError, "softplus"),
        (lambda r, f: r - f, ValueError, r"loss must return a 0-dim floating-point tensor, got shape \(4, 1\)"),
        (lambda r, f: 1.0, ValueError, "loss must return a 0-dim floating-point tensor, got 1.0"),
        (lambda r, f: (r.sum() > 0).long(), ValueError, "got shape \\(\\), torch.int64"),
    ],
)
def test_bad_losses(loss: Any, error: type[Exception], sentence: str, kind: str | None) -> None:
    with pytest.raises(error, match=sentence):
        critic_loss(PERCEPTRON, X, X, loss, kind=kind)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((PERCEPTRON, X, None), {}, TypeError, "fake must be a tensor, got NoneType"),
        ((PERCEPTRON, None, X), {}, TypeError, "real must be a tensor, got NoneType"),
        ((PERCEPTRON, X, X[:2]), {}, ValueError, "fake must have the shape of real"),
        ((PERCEPTRON, X, X), {"kind": "r3"}, ValueError, "kind must be one of .*, got 'r3'"),
        ((PERCEPTRON, X, X), {"engine": "fast"}, ValueError, "engine must be one of .*, got 'fast'"),
        ((PERCEPTRON, X, X), {"kind": "r1", "weight": "much"}, TypeError, "weight must be a number, got 'much'"),
        # The values on a GPU are not looked at: that would wait for it.
        pytest.param(
            *((PERCEPTRON, X, X * torch.nan), {}, ValueError, "fake must not contain NaN, got 16 of them"),
            marks=pytest.mark.cpu,
        ),
        ((7, X, X), {}, TypeError, "critic must be a module or a function, got 7"),
        ((lambda x: x.detach().sum(1), X, X), {"kind": "r1"}, ValueError, "critic must return scores that depend"),
    ],
)
def test_bad_input(arguments: Any, options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        critic_loss(*arguments, softplus, **options)


@pytest.mark.cpu  # so is the closed form
@pytest.mark.usefixtures("checked_plans")
@pytest.mark.parametrize("kind", ["r1", "r2", "r1+r2"])
def test_the_closed_form_with_a_loss_is_compared_with_autograd(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where checks are on, also where a gradient is zero but for rounding, as that of the last bias here."""
    critic, real, fake = fresh(perceptron), samples(VECTORS, 1), samples(VECTORS, 2)
    critic_loss(critic, real, fake, relativistic, kind=kind).total.backward()
    right = Perceptron.solve_with_loss

    def wrong(self: Perceptron, *arguments: Any) -> Any:
        penalty, parameters, grads = right(self, *arguments)
        return penalty, parameters, [None if grad is None else 1.001 * grad for grad in grads]

    monkeypatch.setattr(Perceptron, "solve_with_loss", wrong)
    with pytest.raises(RuntimeError, match="the gradient of the parameter of shape"):
        critic_loss(critic, real, fake, relativistic, kind=kind)
