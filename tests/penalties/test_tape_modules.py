"""The tape against double backward: convolutions, pooling, normalization, whole modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tape_critics import (
    IMAGES,
    SHAPES,
    VECTORS,
    Build,
    Function,
    ImageAttention,
    Running,
    Score,
    after_conv,
    compare,
    coupling,
    running_over,
    samples,
    stack,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lipgan
from lipgan.penalties.tape import RULES, Tape

pytestmark = pytest.mark.usefixtures("checked_plans")

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


# ---- modules ----


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        return self.attention(x, x, x, attn_mask=mask, need_weights=self.causal)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.cell = kind(4, 5, batch_first=batch_first, **options)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0] if self.batch_first else self.cell(x.transpose(0, 1))[0].transpose(0, 1)


class Discrimination(nn.Module):
    """Minibatch discrimination of Salimans et al. 2016."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(6, 15) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, running_over((x @ self.kernels).view(-1, 5, 3))], 1)


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
    "rnn": (lambda: stack(Recurrent(nn.RNN)), SEQUENCES),
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


def local_operations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with the operations that no rule of the tape knows, and that are left to autograd one by one."""
    found: list[str] = []
    local = RULES["local"]

    def note(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found.append(func.overloadpacket.__name__)
        return local(tape, func, args, kwargs)

    monkeypatch.setitem(RULES, "local", note)
    return found


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase], batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = local_operations(monkeypatch)

    def build() -> nn.Module:
        return stack(Recurrent(kind, batch_first, num_layers=2))

    compare(build, SEQUENCES)
    compare(build, SEQUENCES, kind="r1+r2")
    assert not {"unsafe_split", "transpose_", "add_", "sigmoid_", "tanh_"} & set(found)


def test_every_operation_of_a_recurrent_layer_has_the_name_of_its_module() -> None:
    layer, x = nn.GRU(4, 5).double(), samples(SEQUENCES)[0].requires_grad_()
    tape = Tape(x, lambda: "cell")
    with tape:
        layer(x)
    assert {node.module for node in tape.nodes} == {"cell"}


def test_recurrent_layers_in_both_directions() -> None:
    compare(lambda: stack(Recurrent(nn.GRU, bidirectional=True)), SEQUENCES)


def test_r1_and_r2_of_a_recurrent_layer_take_one_batch() -> None:
    torch.manual_seed(3)
    critic, batches = stack(Recurrent(nn.GRU)).double(), []
    critic.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    lipgan.gradient_penalty(critic, *samples(SEQUENCES), kind="r1+r2", engine="fused")
    assert batches == [2 * SEQUENCES[0]]


COUPLED = {
    *("batch norm", "batch norm without parameters", "minibatch discrimination", "running statistics"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_which_layers_couple_samples(name: str) -> None:
    known = name != "circular"  # written part by part: it counts as coupled
    mixes = name in COUPLED
    assert coupling(after_conv(lambda: LAYERS[name](2)), IMAGES) == (known and not mixes, mixes)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "one sample"])
def test_which_modules_couple_samples(name: str) -> None:
    mixes = name in COUPLED
    assert coupling(*MODULES[name]) == (not mixes, mixes)


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


class _LayoutsOfInputGradients(TorchDispatchMode):
    """Which weights the derivatives of convolutions by their inputs have: whether each lies in a format."""

    def __init__(self, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout = layout
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[-1] == [True, False, False]:
            weight = args[2]
            self.seen.append(weight.is_contiguous(memory_format=self.layout) and not weight.is_contiguous())
        return func(*args, **(kwargs or {}))


@pytest.mark.cpu
@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize(
    ("conv", "layout", "sides"),
    [(nn.Conv2d, torch.channels_last, (8, 8)), (nn.Conv3d, torch.channels_last_3d, (6, 6, 6))],
)
def test_a_derivative_by_the_input_learns_the_layout_of_the_samples_from_the_weight(
    conv: Any, layout: torch.memory_format, sides: tuple[int, ...], convert: bool
) -> None:
    # In float64, where a CPU prefers no layout: as on a GPU, it is that of samples and weights.
    real, fake = samples((5, 3, *sides))
    critic = nn.Sequential(conv(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.LazyLinear(1)).double()
    critic(real)
    if convert:
        real, fake = real.contiguous(memory_format=layout), fake.contiguous(memory_format=layout)
    with _LayoutsOfInputGradients(layout) as mode:
        lipgan.gradient_penalty(critic, real, fake, engine="fused")
    assert mode.seen == [convert]
