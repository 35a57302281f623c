"""Kind "r1+r2" of critics that couple the samples of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from penalty_critics import ENGINES
from tape_critics import IMAGES, VECTORS, Build, Running, Score, after_conv, after_linear, running_over, samples, stack
from torch import Tensor, nn

import lipgan


def minibatch_deviation(h: Tensor) -> Tensor:
    """The last layer of progressive GANs: one channel more, of the standard deviation over the batch."""
    deviation = (h.var(0, unbiased=False) + 1e-8).sqrt().mean()
    return torch.cat([h, deviation.expand(len(h), 1)], 1)


def grouped_deviation(h: Tensor) -> Tensor:
    """That of StyleGAN: groups of samples that lie apart in the batch."""
    y = h.view(2, -1, 6)
    y = (y - y.mean(0)).square().mean(0).add(1e-8).sqrt().mean(1, keepdim=True)
    return torch.cat([h, y.repeat(2, 1)], 1)


def scaled_without_autograd(h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.std()
    return h / scale


def scaled_by_a_number(h: Tensor) -> Tensor:
    return h * h.max().item()


def centered_in_place(h: Tensor) -> Tensor:
    other = torch.zeros(len(h) + 2, 6, dtype=h.dtype)
    other[1:-1] = h
    return other[2:] - h


def averaged_through_a_view(h: Tensor) -> Tensor:
    h = h * 1
    h.view(-1)[6:].add_(h.detach().clone().view(-1)[:-6])
    return h


def changed_as_data(h: Tensor) -> Tensor:
    mean = torch.zeros(6, dtype=h.dtype)
    mean.data.copy_(h.detach().mean(0))
    return h - mean


class Turning(nn.Module):
    """Transposes a buffer in place at every call, and squeezes a product, as a matrix by a vector does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixing", torch.randn(6, 6))

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (h.new_ones(6) @ self.mixing).norm()
            mixing = self.mixing.t_().clone()
        return minibatch_deviation(h @ mixing) / scale


class OfItsBatch(nn.Module):
    """Has as many labels as there are samples in a batch of real ones; counts and draws before it looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.labels = nn.BatchNorm1d(6), nn.Embedding(3, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        h = torch.dropout(self.norm(h), 0.3, True)
        return h.sin() * self.labels(torch.arange(3))


def attended(h: Tensor) -> Tensor:
    return torch.softmax(h @ h.t(), 1) @ h


def mix(h: Tensor) -> Tensor:
    return Mixing.apply(h)  # type: ignore[no-any-return, no-untyped-call]


class Mixing(torch.autograd.Function):
    """Adds the mean over the batch, out of PyTorch's sight."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return torch.as_tensor(h.numpy(force=True) + h.numpy(force=True).mean(0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + grad.mean(0)


BUILDS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "batch norm": (after_conv(lambda: nn.BatchNorm2d(4), nn.SiLU, lambda: nn.Conv2d(4, 3, 3)), IMAGES),
    "batch norm and spectral norm": (
        after_conv(lambda: nn.BatchNorm2d(4), nn.SiLU, lambda: lipgan.spectral_norm(nn.Conv2d(4, 3, 3))),
        IMAGES,
    ),
    "batch norm and dropout": (
        lambda: stack(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Linear(6, 3)),
        VECTORS,
    ),
    "minibatch deviation": (after_linear(minibatch_deviation), VECTORS),
    "grouped deviation": (after_linear(grouped_deviation), (4, 4)),
    "minibatch discrimination": (after_linear(lambda h: running_over(h.view(-1, 2, 3))), VECTORS),
    "running statistics": (lambda: stack(Running()), VECTORS),
    "transposed in place": (lambda: stack(nn.Linear(4, 6), Turning()), VECTORS),
    "labels of its own": (lambda: stack(nn.Linear(4, 6), OfItsBatch()), VECTORS),
    "scaled without autograd": (after_linear(scaled_without_autograd), VECTORS),
    "scaled by a number": (after_linear(scaled_by_a_number), VECTORS),
    "written into a part": (after_linear(centered_in_place), VECTORS),
    "averaged through a view": (after_linear(averaged_through_a_view), VECTORS),
    "changed as data": (after_linear(changed_as_data), VECTORS),
    "attention over the batch": (after_linear(attended), VECTORS),
}


def textbook(critic: nn.Module, real: Tensor, fake: Tensor, weight: float) -> tuple[float, list[Tensor]]:
    """``weight / 2`` times the mean square of the gradient's norm at real, then at fake."""
    value = torch.zeros((), dtype=torch.float64)
    for x in (real, fake):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        value = value + weight / 2 * gradient.flatten(1).square().sum(1).mean()
    grads = torch.autograd.grad(value, list(critic.parameters()), allow_unused=True)
    pairs = zip(grads, critic.parameters(), strict=True)
    return value.item(), [torch.zeros_like(p) if g is None else g for g, p in pairs]


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("name", BUILDS)
def test_r1_and_r2_of_coupled_samples_are_a_sum(name: str, engine: str) -> None:
    build, shape = BUILDS[name]
    real, fake = samples(shape)
    fake = 2 * fake + 1
    critics = []
    for _ in range(2):
        torch.manual_seed(3)
        critics.append(build().double())
    for step in range(2):
        torch.manual_seed(step)
        value, expected = textbook(critics[0], real, fake, 1.3)
        state = torch.get_rng_state()
        torch.manual_seed(step)
        penalty = lipgan.gradient_penalty(critics[1], real, fake, kind="r1+r2", weight=1.3, engine=engine)
        assert torch.equal(torch.get_rng_state(), state)
        assert penalty.item() == pytest.approx(value, rel=1e-10)
        critics[1].zero_grad()
        penalty.backward()
        largest = max(float(grad.abs().max()) for grad in expected)
        for p, grad in zip(critics[1].parameters(), expected, strict=True):
            ours = torch.zeros_like(p) if p.grad is None else p.grad
            assert float((ours - grad).abs().max()) <= 1e-10 * largest
        for ours, buffer in zip(critics[1].buffers(), critics[0].buffers(), strict=True):
            torch.testing.assert_close(ours, buffer, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_a_function_with_labels_in_it(engine: str) -> None:
    """Real and fake samples are not scored in one batch, for which there are no labels; that is no error."""
    critic, labels = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1)).double(), torch.eye(3, 4).double()
    real, fake = samples(VECTORS)

    def score(x: Tensor) -> Tensor:
        return critic(torch.cat([x, labels], 1))  # type: ignore[no-any-return]

    apart = [lipgan.gradient_penalty(score, x, kind="r1", engine="autograd").item() for x in (real, fake)]
    penalty = lipgan.gradient_penalty(score, real, fake, kind="r1+r2", engine=engine)
    assert penalty.item() == pytest.approx(sum(apart), rel=1e-10)
    step = lipgan.critic_loss(score, real, fake, "hinge", kind="r1+r2", engine=engine)
    assert step.penalty.item() == pytest.approx(sum(apart), rel=1e-10)
    torch.testing.assert_close(step.real_scores, score(real).detach())
    # What the critic itself cannot do is its own error.
    with pytest.raises(RuntimeError, match="Expected size 2 but got size 3"):
        lipgan.gradient_penalty(score, real[:2], fake[:2], kind="r1+r2", engine=engine)


@pytest.mark.parametrize("engine", ["autograd", "auto"])
def test_samples_that_a_function_of_its_own_couples(engine: str) -> None:
    real, fake = samples(VECTORS)
    critics = [after_linear(mix)().double() for _ in range(2)]
    critics[1].load_state_dict(critics[0].state_dict())
    value, _ = textbook(critics[0], real, fake + 1, 10.0)
    penalty = lipgan.gradient_penalty(critics[1], real, fake + 1, kind="r1+r2", engine=engine)
    assert penalty.item() == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_half_has_the_arguments_of_its_own(engine: str) -> None:
    real, fake = samples(VECTORS)
    torch.manual_seed(3)
    critic = Score(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    critic.double()
    seen = []

    def scores(x: Tensor, weights: Tensor, factor: float) -> Tensor:
        seen.append(len(x))
        return factor * weights * critic(x)

    args = (torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 0.5)
    options: dict[str, Any] = {"engine": engine, "critic_args": args}
    both = lipgan.gradient_penalty(scores, real, fake + 1, kind="r1+r2", **options)
    assert seen == [6, 3, 3]
    r1 = lipgan.gradient_penalty(scores, real, kind="r1", **options)
    r2 = lipgan.gradient_penalty(scores, real, fake + 1, kind="r2", **options)
    assert both.item() == pytest.approx((r1 + r2).item(), rel=1e-12)


def test_the_joint_batch_is_tried_once_for_each_state_of_a_critic() -> None:
    real, fake = samples(VECTORS)
    critic = stack(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    seen: list[int] = []
    critic.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))

    def batches(engine: str) -> list[int]:
        seen.clear()
        lipgan.gradient_penalty(critic, real, fake, kind="r1+r2", engine=engine)
        return list(seen)

    assert batches("fused") == [6, 3, 3]
    for engine in ("fused", "auto", "autograd"):
        assert batches(engine) == [3, 3]
    critic.eval()
    for engine in ("fused", "auto", "autograd"):
        assert batches(engine) == [6]
    critic.train()
    assert batches("autograd") == [3, 3]
    critic.get_submodule("body")[1] = nn.LayerNorm(6).double()  # type: ignore[index]
    assert batches("autograd") == [6]
