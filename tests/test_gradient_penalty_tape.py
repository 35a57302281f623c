"""The engine "fused" against the engine "autograd" in float64, for critics of every kind, and what it refuses."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lipgan
from lipgan.penalties import UnsupportedCriticError, explain

# ---- comparing two engines ----


@dataclass
class Outcome:
    """What one engine leaves behind."""

    value: Tensor
    grads: list[Tensor | None]
    buffers: dict[str, Tensor]
    random_state: Tensor
    result: Tensor = field(repr=False)


Build = Callable[[], Any]


def samples(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return real.to(dtype), fake.to(dtype)


def run(
    build: Build,
    real: Tensor,
    fake: Tensor | None,
    engine: str,
    parameters: Sequence[Tensor] = (),
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Outcome:
    """Build a critic, and take one penalty and its gradients with an engine."""
    torch.manual_seed(3)
    critic = build()
    leaves = list(parameters)
    buffers: dict[str, Tensor] = {}
    if isinstance(critic, nn.Module):
        critic.to(dtype)
        leaves += [parameter for parameter in critic.parameters() if parameter.requires_grad]
        buffers = dict(critic.named_buffers())
    torch.manual_seed(4)
    penalty = lipgan.gradient_penalty(critic, real, fake, engine=engine, **options)
    grads = torch.autograd.grad(penalty, leaves, allow_unused=True) if penalty.requires_grad else [None] * len(leaves)
    after = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    return Outcome(penalty.detach(), list(grads), after, torch.get_rng_state(), penalty)


def assert_same(ours: Outcome, theirs: Outcome, tolerance: float = 1e-10) -> None:
    """Assert that value, gradients, buffers and random state agree; a missing gradient counts as zeros."""
    assert not theirs.value.isnan()
    scale = max(float(theirs.value.abs()), 1e-300)
    assert float((ours.value - theirs.value).abs()) <= tolerance * scale, (ours.value, theirs.value)
    largest = max([float(grad.abs().max()) for grad in theirs.grads if grad is not None and grad.numel()], default=0.0)
    for k, (mine, other) in enumerate(zip(ours.grads, theirs.grads, strict=True)):
        if mine is None and other is None:
            continue
        mine = torch.zeros_like(other) if mine is None else mine
        other = torch.zeros_like(mine) if other is None else other
        assert mine.shape == other.shape
        error = float((mine - other).abs().max()) if mine.numel() else 0.0
        assert error <= tolerance * largest, f"gradient {k} is off by {error:.1e}, the largest is {largest:.1e}"
    assert_same_state(ours, theirs)


def assert_same_state(ours: Outcome, theirs: Outcome) -> None:
    assert ours.buffers.keys() == theirs.buffers.keys()
    for name, buffer in theirs.buffers.items():
        torch.testing.assert_close(ours.buffers[name], buffer, rtol=1e-12, atol=1e-13, equal_nan=True, msg=name)
    assert torch.equal(ours.random_state, theirs.random_state)


def compare(build: Build, shape: Sequence[int], tolerance: float = 1e-10, **options: Any) -> Outcome:
    """Assert that both engines agree on samples of a shape."""
    real, fake = options.pop("real", None), options.pop("fake", None)
    if real is None:
        real, fake = samples(shape)
    ours = run(build, real, fake, "fused", **options)
    assert_same(ours, run(build, real, fake, "autograd", **options), tolerance)
    return ours


# ---- small critics ----


class Score(nn.Module):
    """A body, then a weighted mean of its output over all but the batch, of which every entry counts."""

    def __init__(self, body: Callable[..., Tensor] | nn.Module, width: int = 1) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        h = self.body(x, *args)
        h = h.flatten(1) if h.ndim > 1 else h[:, None]
        weights = torch.linspace(0.5, 1.5, h.shape[1], dtype=h.dtype)
        return (torch.tanh(h) * weights).sum(1) + (h * h * weights).sum(1) / h.shape[1]


class Function(nn.Module):
    """A function of the samples and of a few parameters, named after their shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.7) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.tensors)


def after_linear(function: Callable[[Tensor], Tensor], width: int = 6) -> Build:
    """A linear layer, the function, a linear readout of whatever comes out."""
    return lambda: Score(nn.Sequential(nn.Linear(4, width), Function(function)))


def after_conv(*modules: Callable[[], nn.Module], dim: int = 2, channels: int = 4) -> Build:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dim]
    return lambda: Score(nn.Sequential(conv(2, channels, 3, padding=1), *[module() for module in modules]))


VECTORS, SERIES, IMAGES, VOLUMES = (3, 4), (3, 2, 9), (3, 2, 6, 6), (2, 2, 4, 4, 4)
SHAPES = {1: SERIES, 2: IMAGES, 3: VOLUMES}


def stack(*modules: nn.Module) -> Score:
    return Score(nn.Sequential(*modules))


# ---- activations ----

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "leaky relu in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "leaky relu of slope 0": lambda: nn.LeakyReLU(0.0),
    "leaky relu of negative slope": lambda: nn.LeakyReLU(-0.3),
    "prelu": nn.PReLU,
    "prelu of each channel": lambda: nn.PReLU(6),
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "tanh": nn.Tanh,
    "softplus": lambda: nn.Softplus(3.0, 1.0),
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "elu in place": lambda: nn.ELU(inplace=True),
    "selu": nn.SELU,
    "mish": nn.Mish,
    "mish in place": lambda: nn.Mish(inplace=True),
    "hardswish": nn.Hardswish,
    "hardswish in place": lambda: nn.Hardswish(inplace=True),
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "logsigmoid": nn.LogSigmoid,
    "softsign": nn.Softsign,
    "threshold": lambda: nn.Threshold(0.1, 0.3),
    "softmax": lambda: nn.Softmax(1),
    "log softmax": lambda: nn.LogSoftmax(1),
    "dropout": lambda: nn.Dropout(0.4),
    "dropout in place": lambda: nn.Dropout(0.4, inplace=True),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "layer norm": lambda: nn.LayerNorm(6),
    "layer norm without parameters": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "layer norm without bias": lambda: nn.LayerNorm(6, bias=False),
    "rms norm": lambda: nn.RMSNorm(6),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "batch norm in evaluation": lambda: nn.BatchNorm1d(6).eval(),
    "batch norm without statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_normalizations_of_vectors(name: str) -> None:
    compare(lambda: stack(nn.Linear(4, 6), ACTIVATIONS[name](), nn.Linear(6, 5)), VECTORS)


# ---- convolutions, pooling, normalization in one, two and three dimensions ----

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "bias": False},
    "same": {"padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 8},
}
TRANSPOSED: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "stride": {"stride": 2, "padding": 1, "output_padding": 1},
    "groups": {"groups": 2, "dilation": 2},
}


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(dim: int, name: str) -> None:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **CONVOLUTIONS[name]}
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    compare(after_conv(lambda: nn.LeakyReLU(0.1), lambda: conv(**options), dim=dim), SHAPES[dim])


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(dim: int, name: str) -> None:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **TRANSPOSED[name]}
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1]
    compare(after_conv(nn.SiLU, lambda: conv(**options), dim=dim), SHAPES[dim])


def of_dimension(name: str, *args: Any, **options: Any) -> Callable[[int], nn.Module]:
    return lambda dim: getattr(nn, f"{name}{dim}d")(*args, **options)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "average": of_dimension("AvgPool", 2),
    "average with padding": of_dimension("AvgPool", 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "maximum": of_dimension("MaxPool", 2),
    "overlapping maximum": of_dimension("MaxPool", 3, 1, 1),
    "dilated maximum": of_dimension("MaxPool", 2, dilation=2, ceil_mode=True),
    "adaptive average": of_dimension("AdaptiveAvgPool", 3),
    "adaptive maximum": of_dimension("AdaptiveMaxPool", 3),
    "power average": of_dimension("LPPool", 2, 2),
    "instance norm": of_dimension("InstanceNorm", 4),
    "instance norm with statistics": of_dimension("InstanceNorm", 4, affine=True, track_running_stats=True),
    "instance norm in evaluation": lambda dim: of_dimension("InstanceNorm", 4, track_running_stats=True)(dim).eval(),
    "group norm": lambda dim: nn.GroupNorm(2, 4),
    "group norm without parameters": lambda dim: nn.GroupNorm(4, 4, affine=False),
    "batch norm": of_dimension("BatchNorm", 4),
    "batch norm without parameters": of_dimension("BatchNorm", 4, affine=False, momentum=None),
    "batch norm in evaluation": lambda dim: of_dimension("BatchNorm", 4)(dim).eval(),
    "dropout": of_dimension("Dropout", 0.4),
    "prelu": lambda dim: nn.PReLU(4),
    "reflection": of_dimension("ReflectionPad", 2),
    "zeros": lambda dim: (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)[dim - 1]((1, 2) * dim),
    "constant": of_dimension("ConstantPad", 1, 0.3),
    "crop": of_dimension("ConstantPad", -1, 0.3),
    "circular": of_dimension("CircularPad", 1),
    "response norm": lambda dim: nn.LocalResponseNorm(2),
    "nearest": lambda dim: nn.Upsample(scale_factor=2),
    "linear": lambda dim: nn.Upsample(scale_factor=2, mode=("linear", "bilinear", "trilinear")[dim - 1]),
}


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(dim: int, name: str) -> None:
    compare(
        after_conv(lambda: LAYERS[name](dim), lambda: nn.Flatten(2), lambda: nn.Conv1d(4, 3, 2), dim=dim), SHAPES[dim]
    )


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(4, 4), lambda: nn.InstanceNorm2d(4)])
def test_channels_of_no_variance(norm: Callable[[], nn.Module]) -> None:
    def flat(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1] * 0 + 2.0, x[:, 1:]], 1)

    compare(after_conv(lambda: Function(flat), norm, lambda: nn.Conv2d(4, 3, 3)), IMAGES)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
def test_interpolation(mode: str) -> None:
    resize = Function(lambda x: F.interpolate(x, size=(5, 7), mode=mode))
    compare(after_conv(lambda: resize, lambda: nn.Conv2d(4, 3, 2)), IMAGES)


@pytest.mark.parametrize(
    "modules",
    [
        (lambda: nn.PixelShuffle(2), lambda: nn.Conv2d(1, 3, 2)),
        (lambda: nn.PixelUnshuffle(2), lambda: nn.Conv2d(16, 3, 2)),
        (lambda: nn.ChannelShuffle(2), lambda: nn.Conv2d(4, 3, 2)),
        (lambda: nn.Unfold(2), lambda: nn.Fold((6, 6), 2), lambda: nn.Conv2d(4, 3, 2)),
        (nn.Flatten, lambda: nn.Unflatten(1, (2, 72)), lambda: nn.Conv1d(2, 3, 2)),
    ],
)
def test_rearrangements(modules: tuple[Callable[[], nn.Module], ...]) -> None:
    compare(after_conv(*modules), IMAGES)


# ---- functions ----


def running_over(h: Tensor) -> Tensor:
    return torch.exp(-(h[None] - h[:, None]).abs().sum(-1)).sum(1)


def without_autograd(h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.std() + h.view(-1).sum()
    return h / scale + h * h.detach() + (h - h.detach()).tanh() + h * h.data


def clamped_without_autograd(h: Tensor) -> Tensor:
    h = h + 1
    with torch.no_grad():
        h.clamp_(-1, 1)
    return h


def masked_then_in_place(h: Tensor) -> Tensor:
    mask = h > 0.1
    return h.relu_() * mask


def detached_in_place(h: Tensor) -> Tensor:
    other = h.sin()
    other.detach_()
    return h * other


def dead_branch(h: Tensor) -> Tensor:
    (h.exp() * 3).sum().tanh()
    return h.sin()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda h: torch.softmax(h, 1),
    "clamp": lambda h: h.clamp(-0.5, 0.7),
    "where": lambda h: torch.where(h > 0, h, h**2),
    "abs": lambda h: h.abs(),
    "powers": lambda h: h.pow(3) + h.square() + h.exp().pow(0.3) + torch.pow(2.0, h) + 1 / (1 + h * h).sqrt(),
    "powers in place": lambda h: (h * 2).pow_(2).add_(1).mul_(2).div_(3).sub_(0.1).sqrt_(),
    "elementary": lambda h: h.sin() + h.cos() + h.exp() + h.erf() + h.atan() + (1 + h**2).log() + h.expm1(),
    "norm": lambda h: h.norm(dim=1) + torch.linalg.vector_norm(h, 1, dim=1),
    "normalize": lambda h: F.normalize(h),
    "cosine similarity": lambda h: F.cosine_similarity(h, h.sin()),
    "division": lambda h: h / (1 + h**2).sum(1, keepdim=True) + 1 / h.cosh() + h.cosh().reciprocal(),
    "in place on itself": lambda h: h.sin().add_(h.tanh()).mul_(h),
    "in place on a constant": lambda h: torch.full_like(h, 2.0).mul_(h).add_(torch.zeros(3, 6).double().add_(h)),
    "in place through a view": lambda h: (h * 2).view(3, 2, 3).relu_(),
    "in place after a comparison": masked_then_in_place,
    "no_grad and detach": without_autograd,
    "no_grad in place": clamped_without_autograd,
    "detach in place": detached_in_place,
    "dead branch": dead_branch,
    "index": lambda h: h[:, [0, 2, 2]] + h[[0, 1, 1]][:, 3:] + h[:, torch.tensor([1, 0, 1, 1, 0, 0]).bool()],
    "gather": lambda h: h.gather(1, torch.tensor([[0, 0], [1, 2], [5, 5]])),
    "index_select": lambda h: h.index_select(1, torch.tensor([3, 3, 0])),
    "sort": lambda h: h.sort(1).values * torch.arange(6) + torch.take_along_dim(h, h.argsort(1), 1),
    "extremes": lambda h: h.topk(3, 1).values + h.amax(1)[:, None] + h.max(1).values[:, None] + h.median(1)[0][:, None],
    "maximum": lambda h: torch.maximum(h, h.flip(1)) + torch.minimum(h, h.roll(2, 1)),
    "logsumexp": lambda h: h.logsumexp(1),
    "cumulative": lambda h: h.cumsum(1) + h.cumprod(1),
    "product": lambda h: h.prod(1),
    "variance over the batch": lambda h: h * h.var(0) + h.std(0, unbiased=False) * h + h * torch.var_mean(h, 0)[1],
    "minibatch standard deviation": lambda h: torch.cat([h, h.std(0, unbiased=False).mean().expand(3, 1)], 1),
    "minibatch discrimination": lambda h: running_over(h.view(3, 2, 3)),
    "steps": lambda h: h[:, 1::2] + h[:, ::2],
    "stack": lambda h: torch.stack([h, h.sin()], -1),
    "cat": lambda h: torch.cat([h, h.sin()], -1) * torch.cat([h.sin(), torch.ones(3, 6)], 1),
    "unbind": lambda h: sum(k * part for k, part in enumerate(h.unbind(1))),
    "chunks": lambda h: h.chunk(2, 1)[0] * h.chunk(2, 1)[1].sigmoid() + h.split([2, 3, 1], 1)[1],
    "0-dim": lambda h: h * h.mean().tanh() * h.sum().sin() * h[0, 0],
    "views": lambda h: (h.view(3, 2, 3).mT.movedim(1, 2) + h.view(3, 2, 3)).diagonal(dim1=1, dim2=2),
    "transposed": lambda h: h.t().contiguous().t().unsqueeze(1).squeeze(),
    "unfold": lambda h: h.unfold(1, 3, 2),
    "expand": lambda h: h[:, None].expand(3, 4, 6) * h.repeat(1, 2)[:, None, ::2],
    "mask": lambda h: h.masked_fill(torch.eye(3, 6) > 0, 0.5) + h.sin().masked_fill_(torch.eye(3, 6) > 0, 0.5),
    "tril": lambda h: h.view(3, 2, 3).tril(),
    "index_put": lambda h: h.sin().index_put_((torch.tensor([0, 1]), torch.tensor([1, 1])), h[0, :2]),
    "index_add": lambda h: h.index_add(0, torch.tensor([0, 0, 1]), h.sin()),
    "slice_scatter": lambda h: h.slice_scatter(h[:, :4].sin(), 1, 0, 4),
    "sums of products": lambda h: torch.addcmul(h, h.sin(), h, value=0.3) + torch.lerp(h, h.sin(), 0.3),
    "matrix products": lambda h: h.view(3, 2, 1, 3) @ h.view(3, 1, 3, 2) + (h @ h.t()).sum() + torch.dot(h[0], h[1]),
    "baddbmm": lambda h: torch.baddbmm(h.view(3, 2, 3) @ h.view(3, 3, 2), h.view(3, 2, 3), h.view(3, 3, 2), beta=0.3),
    "einsum": lambda h: torch.einsum("bi,bj,cj->bic", h, h.sin(), h),
    "outer": lambda h: h * torch.outer(h[0], h[1]).sum(),
    "determinant": lambda h: torch.linalg.det(h.view(3, 2, 3)[:, :, :2]),
    "signs": lambda h: h * h.sign() + h.floor() * h + h.round() + h * (h > 0) + h % 0.7,
    "item": lambda h: h * h.sum().item(),
    "draws": lambda h: h * torch.bernoulli(h.sigmoid()) + h * torch.zeros_like(h).normal_() + h * torch.rand(6),
    "gumbel": lambda h: F.gumbel_softmax(h, hard=True) * h,
    "another dtype between": lambda h: h.float().double() * 2 + (h.sum(1, keepdim=True).double() * h),
    "vmap": lambda h: torch.vmap(lambda row: (row * row.sum()).tanh())(h),
    "checkpoint": lambda h: checkpoint(lambda h: h.tanh().relu(), h, use_reentrant=False),
    "cross entropy": lambda h: F.cross_entropy(h, torch.tensor([0, 1, 2]), reduction="none"),
    "huber": lambda h: F.huber_loss(h, h.flip(1).detach(), reduction="none"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    # float -> double on the way loses digits, the same for both engines.
    compare(after_linear(FUNCTIONS[name]), VECTORS, tolerance=1e-6 if "dtype" in name else 1e-10)


def changed_sum(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    doubled = b * 2
    y = x @ a + doubled
    doubled.mul_(3)
    return y * doubled


WITH_PARAMETERS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "quadratic": (lambda x, a: ((x @ a) * x).sum(1), ((4, 4),)),
    "added": (
        lambda x, a, b: (x @ a).add_(b) - 2 * b + torch.sub(b, x @ a, alpha=3) + torch.rsub(x @ a, b),
        ((4, 6), (6,)),
    ),
    "multiplied": (lambda x, a, b: (x @ a).mul_(b) * b[None, :], ((4, 6), (6,))),
    "divided": (lambda x, a, b: b / (x @ a).cosh() + (x @ a) / (b * b + 1), ((4, 6), (6,))),
    "concatenated": (lambda x, a, b: torch.cat([x @ a, b, x], 1) * torch.stack([b, b * b], 0).sum(), ((4, 6), (3, 2))),
    "where and clamp": (lambda x, a, b: torch.where(x @ a > 0, b, x @ a) + (x @ a).clamp(max=b), ((4, 6), (6,))),
    "a computed parameter changed in place": (changed_sum, ((4, 6), (3, 6))),
    "in place on a computed parameter": (lambda x, a, b: (b * 2).add_(x @ a).mul_(b), ((4, 6), (3, 6))),
    "tied": (lambda x, a: F.linear((x @ a).tanh() @ a.t(), a.t()), ((4, 6),)),
    "tied as rows": (lambda x, a: F.linear((x @ a).tanh(), a), ((4, 6),)),
    "used twice": (lambda x, a: ((x @ a).tanh() @ a).relu() @ a, ((4, 4),)),
    "products of parameters": (lambda x, a, b: x @ (a @ b @ b.t()), ((4, 4), (4, 6))),
    "matrix and vector": (lambda x, a, b: torch.outer(x @ a @ b, b) + (x @ a) @ torch.diag(b), ((4, 6), (6,))),
    "einsum": (lambda x, a, b: torch.einsum("bi,ij,bk,jkl->bl", x, a, x, b), ((4, 6), (6, 4, 3))),
    "bilinear": (lambda x, a: F.bilinear(x, x.sin(), a), ((5, 4, 4),)),
    "addmm with factors": (lambda x, a, b: torch.addmm(b, x, a, beta=0.3, alpha=2), ((4, 6), (6,))),
    "embedding": (lambda x, a: F.embedding(torch.tensor([0, 1, 1]), a) * x, ((3, 4),)),
    "weights from the samples": (lambda x, a: (x[:, None] @ (x @ a).view(3, 4, 2))[:, 0], ((4, 8),)),
    "kernels from the samples": (lambda x, a: F.conv1d(x[:, None], (x @ a).mean(0).view(2, 1, 3)), ((4, 6),)),
    "layer norm by the samples": (lambda x, a, b: F.layer_norm(x @ a, (6,), (x @ b)[0]), ((4, 6), (4, 6))),
    "batch norm by the samples": (
        lambda x, a, b: F.batch_norm(x @ a, None, None, (x @ b)[0], None, True),
        ((4, 6), (4, 6)),
    ),
    "prelu by the samples": (lambda x, a, b: F.prelu(x @ a, (x @ b).mean(0)), ((4, 6), (4, 6))),
    "unused": (lambda x, a, b: ((x @ b).exp().sum(), x @ a)[1], ((4, 6), (4, 6))),
}


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_functions_of_parameters(name: str) -> None:
    function, shapes = WITH_PARAMETERS[name]
    compare(lambda: Score(Function(function, *shapes)), VECTORS)


def fill_parts(h: Tensor) -> Tensor:
    parts = torch.empty(3, 2, 3, dtype=h.dtype)
    for k in range(2):
        parts[:, k] = h[:, 3 * k : 3 * k + 3].tanh()
    return parts * parts


def relu_of_a_part(h: Tensor) -> Tensor:
    h = h.sin()
    h[:, ::4] *= 2
    h[:, 3] = 0
    h[:, :2].relu_()
    return h


@pytest.mark.parametrize("function", [fill_parts, relu_of_a_part])
def test_parts_of_tensors_that_change_in_place(function: Callable[[Tensor], Tensor]) -> None:
    compare(after_linear(function), VECTORS)


def parameter_into_parts(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = (x @ a).sin()
    h[:, 1:3] = b
    h[0, 3:].add_(b[0, 0])
    doubled = b * 2
    doubled[:, 1:] = (x @ a)[:, :1]
    return torch.cat([h * h.flip(1), doubled], 1)


def test_parameters_in_parts_of_tensors() -> None:
    compare(lambda: Score(Function(parameter_into_parts, (4, 6), (3, 2))), VECTORS)


# ---- modules ----


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        return self.attention(x, x, x, attn_mask=mask, need_weights=self.causal)[0]


class ImageAttention(nn.Module):
    """As in SAGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).flatten(2)
        key, value = (F.max_pool2d(h, 2).flatten(2) for h in (self.key(x), self.value(x)))
        attention = torch.softmax(query.mT @ key, -1)
        return x + self.gain * (value @ attention.mT).view(x.shape)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Discrimination(nn.Module):
    """Minibatch discrimination of Salimans et al. 2016."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(6, 15) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, running_over((x @ self.kernels).view(-1, 5, 3))], 1)


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("largest", torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        self.largest.copy_(torch.maximum(self.largest, h.detach().amax(0)))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return h / (1 + self.largest.clone()) * self.mean.exp()


def sdpa(**options: Any) -> Build:
    def attend(h: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*h.view(3, 5, 2, 6).transpose(1, 2).chunk(3, -1), **options)

    return lambda: stack(nn.Linear(4, 12), Function(attend))


def group_norm_of_spectra() -> nn.Module:
    critic = stack(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 3))
    lipgan.group_spectral_norm(critic)
    return critic


def with_hooks() -> nn.Module:
    critic = stack(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    layers = critic.body
    assert isinstance(layers, nn.Sequential)
    layers[1].register_forward_hook(lambda module, inputs, output: output * 2)
    layers[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
    return critic


def shared() -> nn.Module:
    linear = nn.Linear(4, 4)
    return stack(linear, nn.Tanh(), linear, nn.ReLU(), linear)


def frozen() -> nn.Module:
    critic = stack(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    for name in ("0.weight", "3.bias", "4.weight", "4.bias"):
        critic.get_parameter(f"body.{name}").requires_grad_(False)
    return critic


PAIRS = nn.utils.parametrizations
SEQUENCES = (3, 5, 4)
MODULES: dict[str, tuple[Build, tuple[int, ...]]] = {
    "spectral norm of torch": (
        lambda: stack(PAIRS.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), PAIRS.spectral_norm(nn.Linear(6, 5))),
        VECTORS,
    ),
    "spectral norm of torch in evaluation": (
        lambda: stack(PAIRS.spectral_norm(nn.Conv2d(2, 4, 3)), nn.Tanh(), nn.Conv2d(4, 3, 2)).eval(),
        IMAGES,
    ),
    "old spectral norm of torch": (
        lambda: stack(
            nn.utils.spectral_norm(nn.Conv2d(2, 4, 3)), nn.SiLU(), nn.utils.spectral_norm(nn.ConvTranspose2d(4, 3, 3))
        ),
        IMAGES,
    ),
    "spectral norm": (
        lambda: stack(lipgan.spectral_norm(nn.Conv2d(2, 4, 3)), nn.SiLU(), lipgan.spectral_norm(nn.Conv2d(4, 3, 3))),
        IMAGES,
    ),
    "group spectral norm": (group_norm_of_spectra, IMAGES),
    "weight norm": (
        lambda: stack(PAIRS.weight_norm(nn.Linear(4, 6)), nn.SiLU(), PAIRS.weight_norm(nn.Linear(6, 5))),
        VECTORS,
    ),
    "orthogonal": (lambda: stack(PAIRS.orthogonal(nn.Linear(4, 6)), nn.SiLU(), nn.Linear(6, 3)), VECTORS),
    "attention": (lambda: stack(nn.Linear(4, 4), Attention()), SEQUENCES),
    "causal attention with dropout": (lambda: stack(nn.Linear(4, 4), Attention(0.3, True)), SEQUENCES),
    "dot product attention": (sdpa(), SEQUENCES),
    "causal dot product attention": (sdpa(is_causal=True), SEQUENCES),
    "masked dot product attention with dropout": (
        sdpa(dropout_p=0.3, attn_mask=torch.ones(5, 5).tril() > 0),
        SEQUENCES,
    ),
    "transformer": (
        lambda: stack(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True, norm_first=True),
        ),
        SEQUENCES,
    ),
    "transformer in evaluation": (
        lambda: stack(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)).eval(),
        SEQUENCES,
    ),
    "attention over an image": (after_conv(ImageAttention), IMAGES),
    "lstm": (lambda: stack(Recurrent(nn.LSTM)), SEQUENCES),
    "gru": (lambda: stack(Recurrent(nn.GRU)), SEQUENCES),
    "minibatch discrimination": (lambda: stack(nn.Linear(4, 6), Discrimination(), nn.Linear(11, 3)), VECTORS),
    "running statistics": (lambda: stack(Running()), VECTORS),
    "forward hooks": (with_hooks, VECTORS),
    "shared weights": (shared, VECTORS),
    "partly frozen": (frozen, VECTORS),
    "one sample": (lambda: stack(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3)), (1, 4)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    build, shape = MODULES[name]
    compare(build, shape)


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embedding, self.readout = nn.Embedding(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.body(x)
        return self.readout(h) + (self.embedding(labels) * h).sum(1, keepdim=True)


@pytest.mark.parametrize("kind", ["wgan-gp", "r1+r2"])
def test_projection_of_labels(kind: str) -> None:
    compare(Projection, IMAGES, kind=kind, critic_args=[torch.tensor([0, 3, 3])])


def test_arguments_that_require_a_gradient() -> None:
    condition = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def mix(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x.sin() * y, y.tanh() * x * x], 1) + y.mean()

    compare(lambda: Score(mix), VECTORS, critic_args=[condition], parameters=[condition])


@pytest.mark.parametrize("norm", ["sample", "pixel"])
@pytest.mark.parametrize("kind", ["wgan-gp", "lp", "dragan", "r1", "r2", "r1+r2", "max"])
def test_kinds(kind: str, norm: str) -> None:
    build = after_conv(lambda: nn.BatchNorm2d(4), nn.SiLU, lambda: nn.Conv2d(4, 3, 3))
    compare(build, IMAGES, kind=kind, norm=norm, target=0.3)


@pytest.mark.parametrize(
    "view",
    [
        lambda s: s[:, 0],
        lambda s: s,
        lambda s: s[:, :, None, None],
        lambda s: s.sum(1, keepdim=True).expand(-1, 1),
        lambda s: s.view(-1),
        lambda s: s.t()[0],
    ],
)
def test_shapes_of_scores(view: Callable[[Tensor], Tensor]) -> None:
    compare(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), Function(view)), VECTORS)


def test_layouts_of_samples_and_weights() -> None:
    real, fake = (t.permute(0, 3, 1, 2)[:, :, :, ::2] for t in samples((3, 6, 12, 2)))
    build = after_conv(nn.SiLU, lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 3, 3))
    compare(build, IMAGES, real=real, fake=fake)
    compare(lambda: build().to(memory_format=torch.channels_last), IMAGES)


# ---- critics at random ----


@st.composite
def image_critics(draw: st.DrawFn) -> list[Any]:
    """Layers of an image critic, as functions that make them; every one keeps 4 channels of 6 x 6."""
    convolution = st.builds(
        lambda kernel, groups, bias, mode: (
            lambda: nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=groups, bias=bias, padding_mode=mode)
        ),
        st.sampled_from([1, 3]),
        st.sampled_from([1, 2, 4]),
        st.booleans(),
        st.sampled_from(["zeros", "reflect", "circular"]),
    )
    pointwise = [
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        lambda: nn.LeakyReLU(0.2),
        lambda: nn.PReLU(4),
        nn.GELU,
        nn.SiLU,
        nn.Tanh,
        nn.Softplus,
        nn.ELU,
        lambda: nn.Dropout(0.3),
        lambda: nn.Dropout2d(0.3),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: nn.LayerNorm((4, 6, 6)),
        lambda: nn.AvgPool2d(3, 1, 1),
        lambda: nn.MaxPool2d(3, 1, 1),
        ImageAttention,
        lambda: lipgan.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.AvgPool2d(2)),
        lambda: nn.Sequential(nn.Conv2d(4, 16, 1), nn.PixelShuffle(2), nn.MaxPool2d(2)),
    ]
    layer = st.one_of(convolution, st.sampled_from(pointwise))
    return draw(st.lists(st.tuples(layer, st.sampled_from(["", "", "sum", "product", "cat"])), min_size=1, max_size=5))


class Branches(nn.Module):
    """A layer and a way around it."""

    def __init__(self, layer: nn.Module, join: str) -> None:
        super().__init__()
        self.layer, self.join = layer, join
        self.merge = nn.Conv2d(8, 4, 1) if join == "cat" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x + 0 if self.join else x)
        if self.join == "sum":
            h = h + x
        elif self.join == "product":
            h = h * torch.sigmoid(x)
        elif self.join == "cat":
            h = torch.cat([x, h], 1)
        return self.merge(h)


@given(
    layers=image_critics(),
    batch=st.integers(1, 3),
    training=st.booleans(),
    kind=st.sampled_from(["wgan-gp", "lp", "r1", "r1+r2", "max"]),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_critics_at_random(layers: list[Any], batch: int, training: bool, kind: str) -> None:
    def build() -> nn.Module:
        branches = [Branches(make(), join) for make, join in layers]
        return stack(nn.Conv2d(2, 4, 3, padding=1), *branches, nn.Flatten(), nn.Linear(144, 2)).train(training)

    compare(build, (batch, 2, 6, 6), kind=kind, target=0.5)


# ---- independent truths ----


@pytest.mark.parametrize("target", [0.0, 1.0, 2.5])
def test_closed_form_of_a_linear_critic(target: float) -> None:
    real, fake = samples((5, 4))
    critic = nn.Linear(4, 1).double()
    flat = Function(lambda x: x + 0)  # keeps the special case of perceptrons away
    penalty = lipgan.gradient_penalty(
        nn.Sequential(flat, critic), real, fake, target=target, weight=3.0, engine="fused"
    )
    penalty.backward()
    w = critic.weight.detach()[0]
    assert penalty.item() == pytest.approx(3 * (w.norm().item() - target) ** 2, rel=1e-12)
    expected = 6 * (w.norm() - target) * w / w.norm()
    assert critic.weight.grad is not None
    torch.testing.assert_close(critic.weight.grad[0], expected, rtol=1e-12, atol=1e-13)
    assert critic.bias.grad is None or not critic.bias.grad.any()


def test_closed_form_of_a_quadratic_critic() -> None:
    # |(A + A^T) x|^2 / 2 and its derivative, symmetric in A.
    x, _ = samples((5, 4))
    critic = Function(lambda x, a: ((x @ a) * x).sum(1), (4, 4)).double()
    penalty = lipgan.gradient_penalty(critic, x, kind="r1", weight=1.0, engine="fused")
    penalty.backward()
    a = critic.tensors[0].detach()
    g = x @ (a + a.T)
    assert penalty.item() == pytest.approx(0.5 * g.square().sum(1).mean().item(), rel=1e-12)
    torch.testing.assert_close(critic.tensors[0].grad, (x.T @ g + g.T @ x) / 5, rtol=1e-12, atol=1e-12)


def test_finite_differences() -> None:
    x, _ = samples((2, 2, 5, 5))
    torch.manual_seed(0)
    critic = after_conv(nn.SiLU, lambda: nn.GroupNorm(2, 4), lambda: nn.Conv2d(4, 2, 3))().double()
    parameters = list(critic.parameters())

    def value() -> Tensor:
        return lipgan.gradient_penalty(critic, x, kind="r1", engine="fused")

    grads = torch.autograd.grad(value(), parameters)
    direction = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum(float((grad * along).sum()) for grad, along in zip(grads, direction, strict=True))
    values, step = [], 1e-4
    for factor in (-2, -1, 1, 2):
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.add_(along, alpha=factor * step)
            values.append(value().item())
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.sub_(along, alpha=factor * step)
    # Fourth order in the step: its error is near 1e-16 of the value over the step.
    difference = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    assert slope == pytest.approx(difference, rel=1e-7)


def test_sampling_on_a_grid_that_autograd_differentiates_once() -> None:
    grid = torch.linspace(-0.9, 0.9, 3 * 4 * 4 * 2, dtype=torch.float64).view(3, 4, 4, 2)
    basis = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6)
    matrices = torch.stack(
        [F.grid_sample(basis, g.expand(36, 4, 4, 2), align_corners=False).view(36, 16) for g in grid]
    )

    def sampled(x: Tensor) -> Tensor:
        return F.grid_sample(x, grid, align_corners=False)

    def as_product(x: Tensor) -> Tensor:
        return (x.flatten(2) @ matrices).view(3, -1, 4, 4)

    real, fake = samples(IMAGES)
    outcomes = [
        run(after_conv(lambda f=f: Function(f), lambda: nn.Conv2d(4, 3, 2)), real, fake, engine)
        for f, engine in ((sampled, "fused"), (as_product, "autograd"))
    ]
    assert_same(*outcomes)


# ---- lower precision ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_in_lower_precision(dtype: torch.dtype) -> None:
    build = after_conv(
        lambda: nn.GroupNorm(2, 4), nn.SiLU, lambda: nn.Conv2d(4, 8, 3, 2), nn.Flatten, lambda: nn.Linear(32, 3)
    )
    real, fake = samples(IMAGES)
    real, fake = real.to(dtype), fake.to(dtype)

    def outcome(engine: str, dtype: torch.dtype) -> Outcome:
        # The parameters of the float64 critic are those of the other, rounded.
        rounded = lambda: build().to(real.dtype)  # noqa: E731
        return run(rounded, real.to(dtype), fake.to(dtype), engine, dtype=dtype, kind="r1")

    truth, theirs, ours = outcome("autograd", torch.float64), outcome("autograd", dtype), outcome("fused", dtype)

    def error(outcome: Outcome) -> float:
        pairs = [(grad, exact) for grad, exact in zip(outcome.grads, truth.grads, strict=True)]
        return max(float((a.double() - b).abs().max()) for a, b in pairs if a is not None and b is not None)

    # The floor: some ten operations in sequence, each of a rounding.
    largest = max(float(grad.abs().max()) for grad in truth.grads if grad is not None)
    assert error(ours) <= 2 * error(theirs) + 10 * torch.finfo(dtype).eps * largest
    assert abs(float(ours.value) - float(truth.value)) <= 2 * abs(float(theirs.value) - float(truth.value)) + 10 * (
        torch.finfo(dtype).eps * float(truth.value)
    )


# ---- what is refused ----


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class SquareByNumPy(Square):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)


class DoubleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Own(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("function", [Square, SquareByNumPy, DoubleInPlace, Reversal])
def test_own_functions_are_refused_and_leave_no_trace(function: type[torch.autograd.Function], last: bool) -> None:
    def build() -> nn.Module:
        body = [
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Dropout(0.3),
            lipgan.spectral_norm(nn.Linear(6, 1)),
            Own(function),
        ]
        return nn.Sequential(*body) if last else stack(*body, nn.Linear(1, 2))

    real, fake = samples(VECTORS)
    name = "4" if last else "body.4"
    with pytest.raises(UnsupportedCriticError, match=rf"'{name} \(Own\)'.*{function.__name__}"):
        run(build, real, fake, "fused")
    assert_same(run(build, real, fake, "auto"), run(build, real, fake, "autograd"), 0.0)
    critic = build().double()
    before = {name: buffer.clone() for name, buffer in critic.state_dict().items()}
    state = torch.get_rng_state()
    assert f"{name} (Own)" in str(explain(critic, real))
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in critic.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_generator_of_its_own_is_put_back_too() -> None:
    generator = torch.Generator().manual_seed(5)

    def noisy(h: Tensor) -> Tensor:
        return Square.apply(h * torch.rand(h.shape, generator=generator, dtype=h.dtype))

    real, fake = samples(VECTORS)
    ours = run(after_linear(noisy), real, fake, "auto")
    generator.manual_seed(5)
    assert_same(ours, run(after_linear(noisy), real, fake, "autograd"), 0.0)


def stale_view(h: Tensor) -> Tensor:
    h = h * 1
    view = h[:, ::2]
    h.mul_(2)
    return view


def hooked(h: Tensor) -> Tensor:
    h = h * 1
    h.register_hook(lambda grad: 2 * grad)
    return h


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a view whose base changed": (stale_view, "changed in place by another name"),
    "a hook on a tensor": (hooked, "hook"),
    "complex numbers": (lambda h: (h * 1j).exp().real, "complex"),
    "complex numbers by conversion": (lambda h: h.to(torch.complex128).exp().real, "hides"),
    "a Fourier transform": (lambda h: torch.fft.rfft(h).abs(), "complex"),
    "draws from probabilities": (lambda h: h.gather(1, torch.multinomial(h.softmax(1), 2)), "random"),
    "a gradient inside": (lambda h: torch.autograd.grad(h.tanh().sum(), h, create_graph=True)[0], "hides"),
    "memory": (lambda h: h.as_strided((3, 3), (6, 2)), "memory"),
    "randomized relu": (lambda h: F.rrelu(h, training=True), "argument"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_served_by_auto(name: str) -> None:
    function, words = REFUSED[name]
    real, fake = samples(VECTORS)
    with pytest.raises(UnsupportedCriticError, match=words):
        run(after_linear(function), real, fake, "fused")
    ours, theirs = (run(after_linear(function), real, fake, engine) for engine in ("auto", "autograd"))
    assert_same(ours, theirs, 0.0)


def test_a_refusal_survives_a_critic_that_catches_everything() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * grad * x

    def critic(x: Tensor) -> Tensor:
        try:
            return Square.apply(x).sum(1)  # type: ignore[no-any-return, no-untyped-call]
        except Exception:
            return x.sum(1)

    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.raises(UnsupportedCriticError, match="Square"):
        lipgan.gradient_penalty(critic, x, kind="r1", engine="fused")
    # |grad|^2 / 2 = |2 x|^2 / 2
    penalty = lipgan.gradient_penalty(critic, x, kind="r1", weight=1.0)
    assert penalty.item() == pytest.approx(2 * x.square().sum(1).mean().item())


def test_hooks_on_the_gradients_of_modules_are_refused() -> None:
    def build() -> nn.Module:
        critic = stack(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        critic.get_submodule("body.1").register_full_backward_hook(lambda *_: None)
        return critic

    real, fake = samples(VECTORS)
    with pytest.raises(UnsupportedCriticError, match=r"'body.1 \(Tanh\)'"):
        run(build, real, fake, "fused")


# ---- memory ----


def test_nothing_is_left_behind() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def watch(h: Tensor) -> Tensor:
        seen.append(weakref.ref(h))
        return h.sin()

    critic = after_linear(watch)().double()
    real, fake = samples(VECTORS)
    gc.collect()
    gc.disable()
    try:
        penalty = lipgan.gradient_penalty(critic, real, fake, engine="fused")
        assert seen[0]() is None
        assert gc.collect() == 0
    finally:
        gc.enable()
    assert penalty.requires_grad
