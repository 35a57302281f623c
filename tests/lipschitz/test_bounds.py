"""Bounds on Lipschitz constants, and the critic that is 1-Lipschitz by construction.

The claims are those of docs/numerics/lipschitz.md.
"""

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lipgan
from lipgan import models
from lipgan.lipschitz import Bounds, bounds
from lipgan.models.lipschitz import LipschitzCritic
from lipgan.nn import (
    GradientNormalized,
    GroupSort,
    MaxMin,
    OrthogonalConv2d,
    OrthogonalLinear,
    conv_spectral_norm,
    orthogonal,
)
from lipgan.objectives.losses import Wasserstein

pytestmark = pytest.mark.usefixtures("single_thread")


def scored(*layers: nn.Module) -> nn.Sequential:
    """A critic whose last layer gives one number."""
    return nn.Sequential(*layers, nn.Flatten(0))


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``[outputs, inputs]`` of a function of one sample."""
    j = torch.autograd.functional.jacobian(lambda t: function(t[None].clone())[0].flatten(), x)
    return j.flatten(1)


# ---- the upper bound is one, and of linear operations close ----

LINEAR: dict[str, tuple[nn.Module, tuple[int, ...], float]] = {
    # module, shape of a sample, by how much the bound may exceed the norm: of small maps with zero padding by much, as
    # the bound is that of a larger circular one
    "linear": (nn.Linear(7, 5), (7,), 1e-6),
    "linear of maps": (nn.Linear(4, 3, bias=False), (2, 3, 4), 1e-6),
    "conv": (nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5), 0.4),
    "conv stride": (nn.Conv2d(2, 3, 4, stride=2, padding=1), (2, 6, 6), 0.4),
    "conv patches": (nn.Conv2d(2, 3, 2, stride=2), (2, 6, 6), 1e-6),
    "conv groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5), 0.4),
    "conv same": (nn.Conv2d(2, 3, 2, padding="same"), (2, 5, 5), 0.4),
    "conv circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 4), 0.01),
    "conv circular rows": (nn.Conv2d(2, 3, (3, 1), padding=(1, 0), padding_mode="circular"), (2, 5, 4), 0.01),
    "conv 1d": (nn.Conv1d(2, 3, 3, padding=1), (2, 9), 0.4),
    "conv 3d": (nn.Conv3d(1, 2, 2), (1, 3, 3, 3), 0.5),
    "conv transposed": (nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), (3, 3, 4), 0.4),
    "batch norm": (nn.BatchNorm2d(3), (3, 4, 4), 1e-6),
    "average pooling": (nn.AvgPool2d(2), (2, 4, 6), 1e-6),
    "overlapping pooling": (nn.AvgPool2d(3, stride=2, padding=1), (2, 7, 7), 0.9),
    "partial pooling": (nn.AvgPool2d(2, ceil_mode=True), (2, 5, 4), 1e-6),
    "adaptive pooling": (nn.AdaptiveAvgPool2d(2), (2, 4, 6), 1e-6),
    "global pooling": (nn.AdaptiveAvgPool2d(1), (2, 4, 6), 1e-6),
    "upsampling": (nn.Upsample(scale_factor=2), (2, 3, 3), 1e-6),
    "upsampling to a size": (nn.Upsample(size=(5, 3)), (2, 3, 3), 1e-6),
    # floor(j / 3.4) is 0 of four places and 1 of two.
    "upsampling by a fraction": (nn.Upsample(scale_factor=3.4), (2, 2, 3), 1e-6),
    "padding": (nn.ZeroPad2d(1), (2, 3, 3), 1e-6),
    "shuffles": (nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)), (1, 4, 4), 1e-6),
    "sum": (Applied(lambda x: x.sum((2, 3)) - 3), (2, 4, 4), 1e-6),
    "mean": (Applied(lambda x: x.mean(1, keepdim=True)), (5, 4), 1e-6),
    "broadcast": (Applied(lambda x: x[:, :1] * torch.ones(6, dtype=x.dtype)), (3, 1), 1e-6),
    "expansion": (Applied(lambda x: x.unsqueeze(2).expand(-1, -1, 5)), (4,), 1e-6),
    "multiples": (Applied(lambda x: torch.cat([3 * x, -x / 2], 1)), (4,), 1e-6),
    "signed sum": (Applied(lambda x: 2 * x + x), (4,), 1e-6),
    "product from the left": (Applied(lambda x: torch.arange(6.0).double().view(2, 3) @ x), (3, 4), 1e-6),
    "vector product": (Applied(lambda x: x @ torch.tensor([3.0, 4.0]).double()), (5, 2), 1e-6),
    "sum in place": (Applied(lambda x: x.clone().add_(x).mul_(1.5)), (4,), 1e-6),
    "slices": (Applied(lambda x: x[:, 1:3, 0].flip(1).roll(1, 1)), (4, 2), 1e-6),
}


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_operations_are_enclosed(case: str) -> None:
    module, shape, excess = LINEAR[case]
    torch.manual_seed(1)
    module = copy.deepcopy(module).double()
    for m in module.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()  # by the seed, where the table was made without one
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
    x = torch.randn(3, *shape, dtype=torch.float64)
    j = jacobian(module.eval(), x[0])
    u, s, _ = torch.linalg.svd(j, full_matrices=False)
    # The critic that looks along the leading left singular vector has the norm of the operation as its constant.
    head = nn.Linear(j.shape[0], 1).double()
    with torch.no_grad():
        head.weight.copy_(u[:, 0])
    b = bounds(scored(module, nn.Flatten(), head), x, steps=0)
    norm = float(s[0])
    assert norm * (1 - 1e-12) <= b.upper <= norm * (1 + excess)
    assert b.lower == pytest.approx(norm, rel=1e-12)
    assert b.lower <= b.upper


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.2),
    nn.LeakyReLU(1.5, inplace=True),
    nn.ELU(2.0),
    nn.SELU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.PReLU(init=3.0),
    nn.Hardtanh(),
    nn.LogSigmoid(),
    nn.Dropout(),
    MaxMin(),
    GroupSort(4),
    nn.MaxPool1d(2),
    nn.Sequential(nn.Unflatten(1, (2, 2, 8)), nn.MaxPool2d(2), nn.Flatten()),
    nn.Sequential(nn.Unflatten(1, (2, 4, 4)), nn.MaxPool2d(3, stride=1), nn.Flatten()),
    Applied(lambda x: torch.maximum(x[:, :16], x[:, 16:])),
    Applied(lambda x: x.unflatten(1, (8, 4)).amax(2)),
    Applied(lambda x: (x.clamp(-1, 1) - x.abs()).clamp_min(-3)),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_no_gradient_is_steeper_than_the_upper_bound_of_an_activation(activation: nn.Module) -> None:
    # Up to its head: bounds of heads are close, so that of the activation is what is tested.
    torch.manual_seed(2)
    x = torch.linspace(-4, 4, 32, dtype=torch.float64).expand(3, 32).contiguous()
    x = x + 0.01 * torch.randn_like(x)
    activation = activation.double().eval()
    features = activation(x.clone()).shape[1]
    slopes = torch.stack(
        [jacobian(activation, (row + shift)).abs().amax() for row, shift in zip(x, (0, 0.5, 1.5), strict=True)]
    )
    steepest = float(slopes.max())
    critic = scored(nn.Identity(), Applied(torch.clone), activation, nn.Linear(features, 1).double())
    nn.init.zeros_(critic[3].weight)
    nn.init.ones_(critic[3].weight[:, :1])
    upper = bounds(critic, x).upper
    assert steepest <= upper * (1 + 1e-12)


def test_slopes_are_close_for_activations() -> None:
    # The largest slopes of smooth activations, found on a fine grid.
    x = torch.linspace(-6, 6, 200001, dtype=torch.float64)[:, None].requires_grad_()
    for activation in (nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(), nn.SELU(), nn.Softplus()):
        (g,) = torch.autograd.grad(activation(x).sum(), x)
        steepest = float(g.abs().max())
        upper = bounds(scored(activation), x[:2].detach(), steps=0).upper
        assert steepest * (1 - 1e-12) <= upper <= steepest * 1.003


def test_a_linear_critic_is_known_exactly() -> None:
    critic = scored(nn.Linear(9, 1))
    b = bounds(critic, torch.randn(20, 9))
    norm = float(critic[0].weight.detach().double().norm())
    assert b.upper == pytest.approx(norm, rel=1e-6)
    assert b.lower == pytest.approx(norm, rel=1e-12)
    # In exact arithmetic, as certified means.
    squares = sum(Fraction(float(w)) ** 2 for w in critic[0].weight.detach().flatten())
    assert Fraction(b.upper) ** 2 >= squares


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([nn.ReLU, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Sigmoid]),
    st.floats(0.01, 100),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_random_critics_are_enclosed(
    widths: list[int], activation: type[nn.Module], scale: float, residual: bool, seed: int
) -> None:
    torch.manual_seed(seed)

    class Block(nn.Module):
        def __init__(self, entries: int, units: int) -> None:
            super().__init__()
            self.linear, self.skip, self.activation = nn.Linear(entries, units), nn.Linear(entries, units), activation()

        def forward(self, x: Tensor) -> Tensor:
            y = self.activation(self.linear(x))
            return y + self.skip(x) if residual else y

    layers, entries = [], 4
    for units in widths:
        layers.append(Block(entries, units))
        entries = units
    critic = scored(*layers, nn.Linear(entries, 1))
    for p in critic.parameters():
        p.data.mul_(scale)
    x = 3 * torch.randn(6, 4)
    b = bounds(critic, x, steps=3)
    assert 0 <= b.lower <= b.upper
    # Differences of scores know nothing of gradients or of rules.
    with torch.no_grad():
        f, x = critic.double()(x.double()), x.double()
    steepest = ((f[1:] - f[:-1]).abs() / (x[1:] - x[:-1]).norm(dim=1)).max()
    assert steepest <= b.upper * (1 + 1e-9)


def test_the_search_finds_what_the_data_do_not_show() -> None:
    # Flat at the data, |x| - 2 further out.
    critic = scored(Applied(lambda x: F.relu(x[:, :1] - 2)))
    x = 0.5 * torch.randn(40, 2).clamp(-2, 2)
    assert bounds(critic, x, steps=0).lower == 0
    assert bounds(critic, x).lower == 1


# ---- critics as they are trained ----


def perceptron() -> nn.Sequential:
    return scored(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 32), nn.LeakyReLU(0.1), nn.Linear(32, 1))


@pytest.mark.parametrize("form", ["group", "layers", "torch", "hook", "conv"])
def test_a_spectrally_normalized_critic_has_a_product_of_about_one(form: str) -> None:
    critic, shape = perceptron(), (5,)
    if form == "conv":
        critic, shape = scored(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1)), (1, 4, 4)
        conv_spectral_norm(critic[0], 4)
        lipgan.spectral_norm(critic[3])
    elif form == "group":
        lipgan.group_spectral_norm(critic)
    else:
        normalize: Any = {
            "layers": lipgan.spectral_norm,
            "torch": nn.utils.parametrizations.spectral_norm,
            "hook": nn.utils.spectral_norm,
        }[form]
        for layer in critic[:5:2]:
            normalize(layer)
    x = torch.randn(20, *shape)
    for _ in range(60):
        critic(x)
    before = copy.deepcopy(critic.state_dict())
    b = bounds(critic, x)
    # u and v have converged but for the ratio of the first two singular values to the power of 60.
    assert 1 - 1e-5 <= b.upper <= (1.2 if form == "conv" else 1.02)
    assert 0 < b.lower <= b.upper
    # The critic is as it was, and still works.
    assert critic.training
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    critic(x).sum().backward()


def test_a_clipped_critic_has_bounds_that_say_so() -> None:
    critic = perceptron()
    data = torch.randn(30, 5)
    free = bounds(critic, data).upper
    for p in critic.parameters():
        p.data.clamp_(-0.01, 0.01)
    b = bounds(critic, data)
    # |W| <= c (rows columns)^(1/2) for each of the layers.
    assert b.upper <= 0.01**3 * math.sqrt(5 * 32) * math.sqrt(32 * 32) * math.sqrt(32) * (1 + 1e-6) < free
    assert 0 < b.lower <= b.upper


@pytest.mark.parametrize("conditioning", ["none", "concat", "auxiliary", "projection"])
@pytest.mark.parametrize("architecture", ["conv", "dcgan", "mlp"])
def test_the_models_have_bounds_with_every_conditioning(architecture: str, conditioning: str) -> None:
    shape = (2,) if architecture == "mlp" else (1, 8, 8)
    _, critic = models.build(architecture, shape, conditioning=conditioning, classes=3, width=8)
    x = torch.randn(6, *shape)
    labels = None if conditioning == "none" else torch.tensor([0, 1, 2, 0, 1, 2])
    b = bounds(critic, x, labels, steps=2)
    assert 0 < b.lower <= b.upper < math.inf
    if conditioning == "projection":
        # A label that is not among those given has no part in it; one that is counts.
        without = bounds(critic, x[:2], labels[:2], steps=0)
        critic.embedding.weight.data[2] *= 1e3
        assert bounds(critic, x[:2], labels[:2], steps=0) == without
        assert bounds(critic, x, labels, steps=0).upper > 10 * b.upper


def test_bounds_of_the_critic_in_eval_mode() -> None:
    critic = scored(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    critic[1].running_var.fill_(1e-4)
    assert bounds(critic, torch.randn(5, 3)) == bounds(critic.eval(), torch.randn(5, 3), steps=0)


# ---- what has no bound is named ----


class Reads(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(6),
        nn.Softmax(1),
        nn.Softplus(threshold=0.1),
        Reads(lambda x: x * x),
        Reads(lambda x: x @ x.mT @ x),
        Reads(lambda x: 1 / x),
        Reads(lambda x: x * float(x.sum())),
        Reads(lambda x: -x if x.sum() > 0 else x),
        Reads(lambda x: torch.zeros_like(x).copy_(x)),
        Reads(lambda x: torch.where(x > 0, x, 0.0)),
        Reads(lambda x: x * x.detach()),
        Reads(lambda x: x[:, x.argmax(1)][:, 0, None].expand(-1, 6)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_an_operation_without_a_bound_is_an_error_that_names_the_module(layer: nn.Module) -> None:
    critic = scored(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), layer), nn.Linear(6, 1))
    with pytest.raises(
        ValueError, match=rf"^no Lipschitz bound is known for .*, in module '1\.1' \({type(layer).__name__}\)$"
    ):
        bounds(critic, torch.randn(4, 6))


def test_other_refusals_of_critics() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"no Lipschitz bound is known for operation .*, in module 'body\..*'"):
        bounds(models.build("sagan", (1, 8, 8))[1], torch.randn(2, 1, 8, 8))
    with pytest.raises(ValueError, match="no Lipschitz bound is known"):
        bounds(GradientNormalized(perceptron()), torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"critic must return scores of shape \(1,\), got \(1, 3\)"):
        bounds(nn.Linear(2, 3), x)
    hooked = scored(nn.Linear(2, 1))
    hooked[0].register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(ValueError, match=r"hook .* of module '0' \(Linear\)"):
        bounds(hooked, x)
    broken = scored(nn.Linear(2, 1))
    nn.init.constant_(broken[0].weight, math.nan)
    with pytest.raises(ValueError, match=r"no finite Lipschitz bound in module '0' \(Linear\)"):
        bounds(broken, x)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.randn(3, 2).long(),), {}, TypeError, "floating-point tensor, got torch.int64"),
        (([1.0],), {}, TypeError, "got list"),
        ((torch.randn(0, 2),), {}, ValueError, r"got shape \(0, 2\)"),
        ((torch.full((3, 2), math.inf),), {}, ValueError, "data must be finite"),
        ((torch.randn(3, 2), torch.zeros(2).long()), {}, ValueError, r"labels must have the shape \(3,\), got \(2,\)"),
        ((torch.randn(3, 2),), {"batch_size": 0}, ValueError, "batch_size must be an int of at least 1, got 0"),
        ((torch.randn(3, 2),), {"steps": 1.5}, ValueError, "steps must be an int of at least 0, got 1.5"),
    ],
)
def test_bad_arguments(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bounds(scored(nn.Linear(2, 1)), *arguments, **options)


def test_a_constant_critic_has_constant_zero_and_the_answer_is_repeatable() -> None:
    assert bounds(Applied(lambda x: torch.ones(x.shape[0])), torch.randn(3, 2)) == Bounds(0.0, 0.0)
    critic, x = perceptron(), torch.randn(30, 5)
    state = torch.get_rng_state()
    assert bounds(critic, x) == bounds(critic, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert bounds(critic.half(), x).upper > 0


# ---- the certified critic ----


@pytest.mark.parametrize(
    ("shape", "conditioning"),
    [((2,), "none"), ((5,), "concat"), ((1, 8, 8), "none"), ((3, 12, 12), "auxiliary"), ((3, 36, 36), "concat")],
)
def test_the_lipschitz_critic_is_certified(shape: tuple[int, ...], conditioning: str) -> None:
    generator, critic = models.build("lipschitz", shape, conditioning=conditioning, classes=3, latent_dim=4)
    labels = None if conditioning == "none" else torch.tensor([0, 1, 2])
    given = () if labels is None else (labels,)
    with torch.no_grad():
        for p in critic.parameters():
            p.mul_(3).add_(torch.randn_like(p))
        x = generator(torch.randn(3, 4), *given)
    assert x.shape == (3, *shape)
    b = bounds(critic, x, labels, steps=2)
    assert b.upper <= 1 + 1e-5
    assert b.lower > 0.01
    output = critic(x, *given, full=True)
    assert torch.equal(output.scores, critic(x, *given))
    assert output.scores.shape == (3,)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2,), {"conditioning": "projection", "classes": 2}, "conditioning must not be 'projection'"),
        ((2,), {"minibatch": "stddev"}, "minibatch must be 'none' for LipschitzCritic, got 'stddev'"),
        ((2,), {"width": 7}, "width must be even and at least 2 for LipschitzCritic, got 7"),
        ((1, 10, 10), {}, "size must be a multiple of 4"),
        ((1, 8, 12), {}, "square images"),
    ],
)
def test_what_the_lipschitz_critic_refuses(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LipschitzCritic(shape, **options)


def wasserstein_training(critic: nn.Module, real: Tensor, fake: Tensor, steps: int) -> list[float]:
    """Minus the loss at each step, the estimate of the distance."""
    loss = Wasserstein()
    optimizer = torch.optim.Adam(critic.parameters(), 0.01, betas=(0.0, 0.9))
    estimates = []
    for _ in range(steps):
        value = loss.critic_loss(critic(real), critic(fake))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        estimates.append(-float(value.detach()))
    return estimates


@pytest.mark.slow
@pytest.mark.parametrize("distance", [0.5, 3.0])
def test_the_certified_critic_reaches_the_distance_of_two_points_from_below(distance: float) -> None:
    direction = torch.tensor([0.6, 0.8])
    real = torch.tensor([[0.3, -0.2]])
    fake = real + distance * direction
    critic = LipschitzCritic((2,), width=16)
    estimates = wasserstein_training(critic, real, fake, 300)
    assert estimates[0] < 0.9 * distance
    assert 0.99 * distance <= estimates[-1]
    # Each is below the distance but for the rounding of the scores.
    assert max(estimates) <= distance * (1 + 1e-5) + 1e-6
    b = bounds(critic, torch.cat([real, fake]))
    assert b.upper == pytest.approx(1, abs=1e-5)
    assert 0.99 <= b.lower <= b.upper


def test_orthogonal_convolutions_reach_the_distance_of_two_images() -> None:
    real, fake = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    real[0, 0, 0, 0], fake[0, 0, 3, 2] = 1.0, 1.0
    critic = scored(
        OrthogonalConv2d(1, 8, 2, stride=2),
        MaxMin(),
        orthogonal(nn.Conv2d(8, 8, 1)),
        MaxMin(),
        nn.Flatten(),
        OrthogonalLinear(32, 1),
    )
    estimates = wasserstein_training(critic, real, fake, 300)
    distance = math.sqrt(2)
    assert 0.99 * distance <= estimates[-1]
    assert max(estimates) <= distance * (1 + 1e-5)
    assert bounds(critic, real).upper == pytest.approx(1, abs=1e-5)
