"""A critic divided by the norm of its gradient: closed forms, derivatives, and what it forwards."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lipgan
from lipgan.models import Critic
from lipgan.nn import GradientNormalized

pytestmark = pytest.mark.usefixtures("single_thread")


def perceptron(activation: type[nn.Module] = nn.ReLU, entries: int = 3) -> nn.Sequential:
    layers = [nn.Linear(entries, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 1), nn.Flatten(0)]
    return nn.Sequential(*layers).double()


def test_a_linear_critic_has_a_closed_form() -> None:
    linear = nn.Linear(3, 1).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    f = linear(x)[:, 0]
    expected = f / (linear.weight.norm() + f.abs())
    torch.testing.assert_close(GradientNormalized(nn.Sequential(linear, nn.Flatten(0)))(x), expected)


def test_the_slope_of_a_piecewise_linear_critic_is_at_most_one() -> None:
    critic = perceptron()
    for p in critic.parameters():
        p.data.mul_(30)  # far from Lipschitz
    x = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    f = critic(x)
    (g,) = torch.autograd.grad(f.sum(), x)
    n = g.norm(dim=1)
    y = GradientNormalized(critic)(x)
    assert y.abs().max() <= 1
    torch.testing.assert_close(y, f / (n + f.abs()))
    (slope,) = torch.autograd.grad(y.sum(), x)
    # n is constant within a piece, so the derivative of f / (n + |f|) is n grad f / (n + |f|)^2.
    torch.testing.assert_close(slope.norm(dim=1), n**2 / (n + f.abs()) ** 2)


def test_gradients_of_parameters_and_samples_go_through_the_gradient() -> None:
    critic = GradientNormalized(perceptron(nn.Tanh))
    names = [name for name, _ in critic.named_parameters()]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def scores(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(critic, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in critic.parameters()]
    assert torch.autograd.gradcheck(scores, (x, *values))


def test_the_generator_gets_its_gradient() -> None:
    critic = GradientNormalized(perceptron())
    generator = nn.Linear(2, 3).double()
    critic(generator(torch.randn(4, 2, dtype=torch.float64))).sum().backward()
    assert generator.weight.grad is not None
    assert generator.weight.grad.abs().max() > 0


@pytest.mark.hardware  # a wrapper of tensors is none of inference
def test_values_without_grad_enabled_are_the_same() -> None:
    critic = GradientNormalized(perceptron())
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = critic(x)
    assert expected.requires_grad
    with torch.no_grad():
        quiet = critic(x)
    with torch.inference_mode():
        inferred = critic(torch.zeros_like(x) + x)
    for y in (quiet, inferred):
        assert not y.requires_grad
        assert torch.equal(y, expected)
    assert not x.requires_grad


def test_zero_over_zero_is_zero_with_finite_gradients() -> None:
    critic = perceptron()
    for p in critic.parameters():
        p.data.zero_()
    y = GradientNormalized(critic)(torch.randn(4, 3, dtype=torch.float64))
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())


def test_a_critic_that_does_not_look_at_samples_scores_its_sign() -> None:
    class Constant(nn.Module):
        def __init__(self, trained: bool) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(-3.0), requires_grad=trained)

        def forward(self, x: Tensor) -> Tensor:
            return self.value.expand(x.shape[0])

    for trained in (True, False):
        y = GradientNormalized(Constant(trained))(torch.randn(4, 3))
        torch.testing.assert_close(y.detach(), -torch.ones(4))


@pytest.mark.hardware  # as above
@pytest.mark.parametrize("conditioning", ["none", "concat", "auxiliary", "projection"])
def test_labels_and_full_output_are_forwarded(conditioning: str, device: torch.device) -> None:
    def body(shape: tuple[int, ...]) -> nn.Module:
        return nn.Sequential(nn.Linear(*shape, 8), nn.ReLU())

    critic = Critic((3,), body, 8, conditioning=conditioning, classes=4).to(device)
    normalized = GradientNormalized(critic)
    x = torch.randn(5, 3)
    labels = () if conditioning == "none" else (torch.tensor([0, 1, 2, 3, 0]),)
    scores = normalized(x, *labels)
    output, plain = normalized(x, *labels, full=True), critic(x, *labels, full=True)
    assert torch.equal(output.scores, scores)
    assert not torch.equal(output.scores, plain.scores)
    assert torch.equal(output.features, plain.features)
    if conditioning == "auxiliary":
        assert torch.equal(output.logits, plain.logits)
    else:
        assert output.logits is None
    with torch.inference_mode():
        assert torch.equal(normalized(x.clone(), *(y.clone() for y in labels)), scores)


def test_it_goes_with_spectral_normalization_of_the_group() -> None:
    critic = perceptron()
    group = lipgan.group_spectral_norm(critic)
    normalized = GradientNormalized(critic)
    normalized(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    assert len(group.sigmas()) == 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())


def test_training_separates_two_points() -> None:
    critic = GradientNormalized(perceptron(entries=2))
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    real, fake = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[-2.0, 0.0]]).double()
    for _ in range(150):
        loss = torch.relu(1 - critic(real)).mean() + torch.relu(1 + critic(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A critic that cannot tell them apart has 2; a linear one, f / (|w| + |f|) at distances of 2, has 2 (1 - 2/3).
    assert float(loss.detach()) < 0.8
