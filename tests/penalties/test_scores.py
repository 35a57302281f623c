"""Scores of any shape, whose sum counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from penalty_critics import ENGINES, assert_same, draws, grads_of, samples
from tape_critics import IMAGES, VECTORS
from torch import Tensor, nn

from lipgan import gradient_penalty
from lipgan.penalties import explain


class Then(nn.Module):
    """A layer's output, seen by a function."""

    def __init__(self, layer: nn.Module, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.last = nn.Sequential(layer, nn.Tanh()).double(), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


def textbook(critic: nn.Module, x: Tensor) -> Tensor:
    """R1 with a factor of 10: ``torch.autograd.grad`` of all scores with ones."""
    x = x.clone().requires_grad_()
    scores = critic(x)
    (gradient,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
    return 5 * gradient.flatten(1).square().sum(1).mean()


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "patches": (lambda: Then(nn.Conv2d(2, 1, 3), lambda h: h), IMAGES, (3, 1, 4, 4)),
    "vectors": (lambda: Then(nn.Linear(4, 5), lambda h: h * h), VECTORS, (3, 5)),
    "a half": (lambda: Then(nn.Linear(4, 1), lambda h: h[:2]), VECTORS, (2, 1)),
    "a sum": (lambda: Then(nn.Linear(4, 1), lambda h: h.sum()[None]), VECTORS, (1,)),
    "squeezed": (lambda: Then(nn.Linear(4, 1), torch.squeeze), VECTORS, (3,)),
    "a last batch of one, squeezed": (lambda: Then(nn.Linear(4, 1), torch.squeeze), (1, 4), ()),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_sum_of_the_scores_counts(name: str, engine: str) -> None:
    build, shape, of_scores = SHAPES[name]
    torch.manual_seed(3)
    critic, x = build(), samples(*shape)
    assert critic(x).shape == of_scores
    expected = textbook(critic, x)
    penalty = gradient_penalty(critic, x, kind="r1", engine=engine)
    assert explain(critic, x) is None
    assert_same([penalty.detach(), *grads_of(penalty, critic)], [expected.detach(), *grads_of(expected, critic)], 1e-12)


class Packed(nn.Module):
    """CTGAN's discriminator: rows judged in packs, one score for each."""

    def __init__(self, width: int, pac: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.pac, self.pacdim = pac, pac * width
        layers = [nn.Linear(self.pacdim, 8), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(8, 1)]
        self.seq = nn.Sequential(*layers).double()

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] % self.pac == 0
        return self.seq(x.view(-1, self.pacdim))


def penalty_of_ctgan(critic: Packed, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """As `calc_gradient_penalty` of the package ctgan writes it, with given mixtures and a factor of 10."""
    pac, width = critic.pac, real.size(1)
    alpha = alpha.view(-1, 1, 1).repeat(1, pac, width).view(-1, width)
    interpolates = (alpha * real + ((1 - alpha) * fake)).requires_grad_()
    scores = critic(interpolates)
    gradients = torch.autograd.grad(scores, interpolates, torch.ones(scores.size()).double(), create_graph=True)[0]
    view = gradients.view(-1, pac * width).norm(2, dim=1) - 1
    return (view**2).mean() * 10


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_packs_of_rows_as_ctgan_penalizes_them(engine: str) -> None:
    real, fake = samples(20, 3), samples(20, 3, seed=8)
    critic = Packed(3, 10)
    generator = draws()
    torch.manual_seed(5)
    expected = penalty_of_ctgan(critic, real, fake, torch.rand(2, generator=generator, dtype=torch.float64))
    torch.manual_seed(5)
    packs = real.unflatten(0, (-1, 10)), fake.unflatten(0, (-1, 10))
    penalty = gradient_penalty(lambda x: critic(x.flatten(0, 1)), *packs, generator=draws(), engine=engine)
    assert_same([penalty.detach(), *grads_of(penalty, critic)], [expected.detach(), *grads_of(expected, critic)], 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_packs_with_norms_of_their_own(engine: str) -> None:
    """Ten rows and one score; real and fake stay in packs of their own."""
    real, fake = samples(10, 3), samples(10, 3, seed=8)
    critic = Packed(3, 10).eval()
    for kind, points in (("r1", [real]), ("r1+r2", [real, fake])):
        expected = torch.stack([textbook(critic, x) for x in points]).sum()
        penalty = gradient_penalty(critic, real, fake, kind=kind, engine=engine)
        ours = [penalty.detach(), *grads_of(penalty, critic)]
        assert_same(ours, [expected.detach(), *grads_of(expected, critic)], 1e-12)
