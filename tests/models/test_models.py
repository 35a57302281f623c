"""lipgan.models: the sizes and options that every architecture serves, labels, penalties, and what papers ask for."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lipgan
from lipgan import models
from lipgan.models import (
    AutoencoderCritic,
    Critic,
    DCGANCritic,
    DCGANGenerator,
    Generator,
    MLPGenerator,
    ModernCritic,
    ModernGenerator,
    Output,
    ResNetCritic,
    ResNetGenerator,
)
from lipgan.models.base import Residual
from lipgan.models.sizes import sides
from lipgan.nn import (
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    MinibatchDiscrimination,
    MinibatchStdDev,
    SelfAttention2d,
    VirtualBatchNorm,
)

# The ones of this file; "lipschitz" has its own.
IMAGES = ["autoencoder", "conv", "dcgan", "mlp", "modern", "sagan", "sngan"]
VECTORS = ["autoencoder", "mlp"]
CONDITIONINGS = ["none", "concat", "auxiliary", "projection"]
# Those whose scores are made of features.
SCORED = [name for name in IMAGES if name != "autoencoder"]
CLASSES = 3
F64 = torch.float64


pytestmark = pytest.mark.usefixtures("single_thread")


def pair(architecture: str, shape: tuple[int, ...] = (1, 8, 8), **options: Any) -> tuple[nn.Module, nn.Module]:
    """A narrow pair in float64, its weights moved from where layers start as zero or the identity."""
    options = {"classes": CLASSES, "latent_dim": 5, "width": 4} | options
    generator, critic = models.build(architecture, shape, **options)
    with torch.no_grad():
        for parameter in (*generator.parameters(), *critic.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return generator.to(F64), critic.to(F64)


def noise(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, dtype=F64), torch.arange(n) % CLASSES


def supports(architecture: str, conditioning: str = "none", minibatch: str = "none") -> bool:
    return architecture != "autoencoder" or (conditioning != "projection" and minibatch == "none")


# ---- sizes ----


def test_sides_halve_down_to_a_few_pixels() -> None:
    assert sides(16, 1) == [4, 8, 16]
    assert sides(24, 3) == [3, 6, 12, 24]
    assert sides(28, 1) == [7, 14, 28]
    assert sides(36, 1) == [4, 9, 18, 36]
    assert sides(128, 3) == [4, 8, 16, 32, 64, 128]
    for size in range(8, 129, 4):
        levels = sides(size, 1)
        assert levels[-1] == size
        assert 3 <= levels[0] <= 7
        assert all(after in (2 * before, 2 * before + 1) for before, after in pairwise(levels))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", IMAGES)
def test_every_size_is_served(architecture: str) -> None:
    """At full width, without numbers."""
    with torch.device("meta"):
        for size in range(8, 129, 4):
            channels = 1 if size % 8 else 3
            generator, critic = models.build(architecture, (channels, size, size))
            fake = generator(torch.randn(2, 64))
            assert fake.shape == (2, channels, size, size)
            assert critic(fake).shape == (2,)
            assert critic(fake, full=True).features.ndim == 2


@pytest.mark.parametrize("architecture", IMAGES)
@pytest.mark.parametrize("size", [8, 12, 28, 36])
def test_every_parameter_has_a_part(architecture: str, size: int) -> None:
    generator, critic = pair(architecture, (1, size, size))
    fake = generator(noise()[0])
    assert fake.abs().max() <= 1
    critic(fake).square().sum().backward()
    for module in (generator, critic):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            # A bias in front of a batch norm has no effect.
            assert parameter.ndim < 2 or parameter.grad.abs().max() > 1e-12, name


@pytest.mark.parametrize("architecture", VECTORS)
@pytest.mark.parametrize("d", [1, 2, 25])
def test_vectors_are_served(architecture: str, d: int) -> None:
    generator, critic = pair(architecture, (d,))
    fake = generator(noise()[0])
    assert fake.shape == (4, d)
    assert critic(fake).shape == (4,)
    assert not [m for m in generator.modules() if isinstance(m, nn.Tanh)], "points need not lie in [-1, 1]"


@pytest.mark.parametrize("architecture", sorted(set(IMAGES) - {"mlp"}))
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 10, 10), "size must be a multiple of 4 from 8 to 128, got 10"),
        ((1, 4, 4), "got 4"),
        ((1, 132, 132), "got 132"),
        ((2, 16, 16), "channels must be 1 or 3, got 2"),
        ((1, 16, 12), "needs square images"),
    ],
)
def test_other_shapes_are_refused(architecture: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(architecture, shape)


def test_toy_data_is_served_by_the_perceptron() -> None:
    for name in models.names():
        assert models.serving(name, (1, 16, 16)) == name
        serving = models.serving(name, (2,))
        assert serving == (name if models.ARCHITECTURES[name].vectors else "mlp")
        models.build(serving, (2,))
    with pytest.raises(ValueError, match="the conv architecture needs square images"):
        models.build("conv", (2,))
    with pytest.raises(ValueError, match="unknown architecture 'dcgam'; did you mean dcgan"):
        models.serving("dcgam", (2,))


def test_conv_is_the_network_it_was() -> None:
    """The layers and the random numbers of the first release, for which there are demonstrations and benchmarks."""
    torch.manual_seed(5)
    generator, critic = models.build("conv", (1, 16, 16))
    torch.manual_seed(5)
    first = nn.Sequential(
        nn.Linear(64, 64 * 16, bias=False), nn.Unflatten(1, (64, 4, 4)), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1), nn.Tanh(),
    )  # fmt: skip
    second = nn.Sequential(
        nn.Conv2d(1, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.1),
        nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.LeakyReLU(0.1),
        nn.Conv2d(128, 128, 3, padding=1), nn.LeakyReLU(0.1),
        nn.Flatten(), nn.Linear(128 * 16, 1),
    )  # fmt: skip
    z = torch.randn(3, 64)
    assert torch.equal(generator(z), first(z))
    assert torch.equal(critic(first(z)), second(first(z)).squeeze(1))


# ---- labels ----


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("architecture", IMAGES)
def test_the_output_has_what_the_conditioning_says(architecture: str, conditioning: str) -> None:
    if not supports(architecture, conditioning):
        return
    generator, critic = pair(architecture, conditioning=conditioning)
    z, labels = noise()
    given = () if conditioning == "none" else (labels,)
    x = generator(z, *given)
    output = critic(x, *given, full=True)
    assert isinstance(output, Output)
    assert output.features.shape[0] == 4
    assert (output.logits is not None) == (conditioning == "auxiliary")
    if output.logits is not None:
        assert output.logits.shape == (4, CLASSES)
        assert torch.equal(critic(x), critic(x, 2 - labels)), "the scores see no labels"
    critic.eval()
    assert torch.equal(critic(x, *given), critic(x, *given, full=True).scores)
    assert generator.classes == critic.classes == (0 if conditioning == "none" else CLASSES)


@pytest.mark.parametrize("conditioning", CONDITIONINGS[1:])
@pytest.mark.parametrize("architecture", IMAGES)
def test_another_label_makes_another_sample(architecture: str, conditioning: str) -> None:
    if not supports(architecture, conditioning):
        return
    generator, _ = pair(architecture, conditioning=conditioning)
    z, labels = noise()
    generator(z, labels)
    generator.eval()
    one, other = generator(z, labels), generator(z, torch.tensor([0, 2, 2, 0]))
    assert torch.equal(one[[0, 2, 3]], other[[0, 2, 3]])
    assert (one[1] - other[1]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_concatenation_appends_one_hot_planes_and_entries(shape: tuple[int, ...]) -> None:
    generator, critic = pair("mlp" if len(shape) == 1 else "conv", shape, conditioning="concat")
    seen: list[Tensor] = []
    for module in (generator, critic):
        module.body.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    z, labels = noise()
    x = torch.randn(4, *shape, dtype=F64)
    generator(z, labels)
    critic(x, labels)
    entries = torch.zeros(4, CLASSES, dtype=F64)
    planes = torch.zeros(4, CLASSES, *shape[1:], dtype=F64)
    for i, y in enumerate(labels.tolist()):
        entries[i, y] = 1
        planes[i, y] = 1
    assert torch.equal(seen[0], torch.cat([z, entries], 1))
    assert torch.equal(seen[1], torch.cat([x, planes], 1))


@pytest.mark.parametrize("architecture", SCORED)
@pytest.mark.parametrize("minibatch", ["none", "stddev"])
def test_projection_adds_the_inner_product_of_label_and_features(architecture: str, minibatch: str) -> None:
    _, critic = pair(architecture, conditioning="projection", minibatch=minibatch)
    critic.eval()
    x, labels = torch.randn(4, 1, 8, 8, dtype=F64), torch.tensor([2, 0, 1, 1])
    scores, features, _ = critic(x, labels, full=True)
    judged = features if minibatch == "none" else MinibatchStdDev()(features)
    want = [
        critic.head.bias[0] + critic.head.weight[0] @ judged[i] + critic.embedding.weight[y] @ features[i]
        for i, y in enumerate(labels.tolist())
    ]
    torch.testing.assert_close(scores, torch.stack(want), rtol=1e-12, atol=1e-12)


def test_projection_makes_every_batch_norm_of_the_generator_conditional() -> None:
    for architecture in ("conv", "dcgan", "mlp", "sagan", "sngan"):
        plain, conditional = (pair(architecture, conditioning=c)[0] for c in ("none", "projection"))
        kinds = (ConditionalBatchNorm1d, ConditionalBatchNorm2d)
        norms = [m for m in conditional.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(m, kinds) for m in norms)
        if architecture != "mlp":
            assert len(norms) == len([m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)])


@pytest.mark.parametrize("player", ["generator", "critic"])
@pytest.mark.parametrize("architecture", ["autoencoder", "conv", "mlp"])
def test_labels_are_checked(architecture: str, player: str) -> None:
    x = (noise()[0], torch.randn(4, 1, 8, 8, dtype=F64))[player == "critic"]
    module = pair(architecture, conditioning="concat")[player == "critic"]
    for labels, error, message in (
        (None, ValueError, "labels must be given for conditioning 'concat', got None"),
        (torch.tensor([0, 1, 2]), ValueError, r"labels must be one for each of 4 samples, got shape \(3,\)"),
        (torch.zeros(4, 1, dtype=torch.int64), ValueError, r"got shape \(4, 1\)"),
        (torch.tensor([0, 1, 2, 3]), ValueError, "labels must lie in 0 to 2, got 3"),
        (torch.tensor([0, -1, 2, 2]), ValueError, "labels must lie in 0 to 2, got -1"),
        (torch.zeros(4), TypeError, "labels must be an int64 tensor, got torch.float32"),
        ([0, 1, 2, 0], TypeError, "labels must be an int64 tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            module(x, labels)
    module = pair(architecture)[player == "critic"]
    with pytest.raises(ValueError, match="labels must be None for conditioning 'none'"):
        module(x, torch.tensor([0, 1, 2, 0]))


def test_shapes_are_checked() -> None:
    generator, critic = pair("conv", conditioning="auxiliary")
    with pytest.raises(ValueError, match=r"x must be \[B, 1, 8, 8\], got shape \(4, 1, 12, 12\)"):
        critic(torch.randn(4, 1, 12, 12, dtype=F64))
    with pytest.raises(ValueError, match=r"z must be \[B, 5\], got shape \(4, 6\)"):
        generator(torch.randn(4, 6, dtype=F64), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="labels must be given for conditioning 'auxiliary'"):
        generator(noise()[0])


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("conv", {"conditioning": "concat"}, "classes must be at least 1 for conditioning 'concat', got 0"),
        ("conv", {"conditioning": "project"}, "conditioning must be one of none, .*projection, got 'project'"),
        ("conv", {"minibatch": "std"}, "minibatch must be one of none, discrimination, stddev, got 'std'"),
        ("conv", {"batch_norm": "layer"}, "batch_norm must be one of batch, virtual, got 'layer'"),
        ("conv", {"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ("sngan", {"conditioning": "projection", "classes": 3, "batch_norm": "virtual"}, "batch_norm must be 'batch'"),
        ("modern", {"batch_norm": "virtual"}, "ModernGenerator, which has no batch norm"),
        ("autoencoder", {"minibatch": "stddev"}, "scores are reconstruction errors, must be 'none', got 'stddev'"),
        (
            "autoencoder",
            {"conditioning": "projection", "classes": 3},
            "reconstruction errors, must not be 'projection'",
        ),
    ],
)
def test_options_that_cannot_be_served_are_named(architecture: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(architecture, (1, 8, 8), **options)


# ---- penalties, spectral normalization ----


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("architecture", IMAGES)
def test_the_engines_of_the_penalty_agree(architecture: str, conditioning: str) -> None:
    """In float64, where sums of some thousand terms agree to far more than ten digits."""
    if not supports(architecture, conditioning):
        return
    for shape in ((1, 8, 8), (2,)) if architecture in VECTORS else ((1, 8, 8),):
        for minibatch in ("none", "discrimination", "stddev") if conditioning in ("none", "projection") else ("none",):
            if supports(architecture, conditioning, minibatch):
                compare_engines(architecture, shape, conditioning, minibatch)


def compare_engines(architecture: str, shape: tuple[int, ...], conditioning: str, minibatch: str) -> None:
    _, critic = pair(architecture, shape, conditioning=conditioning, minibatch=minibatch)
    real, fake = torch.randn(2, 4, *shape, dtype=F64)
    parameters = list(critic.parameters())
    outcomes = []
    for engine in ("fused", "autograd"):
        penalty = lipgan.gradient_penalty(
            critic,
            real,
            fake,
            engine=engine,
            critic_args=() if conditioning in ("none", "auxiliary") else (noise()[1],),
            generator=torch.Generator().manual_seed(1),
        )
        assert penalty > 0
        grads = torch.autograd.grad(penalty, parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        outcomes.append([penalty.detach(), *filled])
    largest = max(float(t.abs().max()) for t in outcomes[1])
    for ours, theirs in zip(*outcomes, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-10 * largest


@pytest.mark.parametrize("architecture", IMAGES)
def test_spectral_normalization_of_both_players(architecture: str) -> None:
    generator, critic = models.build(architecture, (1, 8, 8), conditioning="concat", classes=CLASSES, width=4)
    z, labels = torch.randn(4, 64), noise()[1]
    for module, x in ((critic, torch.randn(4, 1, 8, 8)), (generator, z)):
        weights = [n for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
        group = lipgan.group_spectral_norm(module)
        assert sorted(group.names) == sorted(weights)
        group.step(200)
        members = dict(module.named_modules())
        for name, weight in zip(group.names, group.normalize(), strict=True):
            transposed = isinstance(members[name], nn.ConvTranspose2d)
            rows = weight.detach().transpose(0, 1) if transposed else weight.detach()
            sigma = float(torch.linalg.matrix_norm(rows.flatten(1), 2))
            # The convolutions that start at zero stay there.
            assert sigma == pytest.approx(1, abs=0.02) or (architecture == "modern" and sigma == 0), name
        y = module(x, labels)
        assert y.isfinite().all()
        y.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("minibatch", ["discrimination", "stddev"])
@pytest.mark.parametrize("architecture", ["conv", "sngan"])
def test_a_minibatch_layer_shows_the_critic_the_rest_of_the_batch(architecture: str, minibatch: str) -> None:
    x = torch.randn(4, 1, 8, 8, dtype=F64)
    other = torch.cat([x[:2], 3 * torch.randn(2, 1, 8, 8, dtype=F64)])
    critic = pair(architecture, minibatch=minibatch)[1]
    assert isinstance(critic.minibatch, MinibatchDiscrimination | MinibatchStdDev)
    assert not torch.equal(critic(x)[:2], critic(other)[:2])
    full, others = critic(x, full=True), critic(other, full=True)
    assert torch.equal(full.features[:2], others.features[:2]), "features are those of one sample"
    alone = pair(architecture)[1]
    assert torch.equal(alone(x)[:2], alone(other)[:2])


# ---- virtual batch norm ----


@pytest.mark.parametrize("conditioning", ["none", "concat", "auxiliary"])
@pytest.mark.parametrize("architecture", ["conv", "dcgan", "mlp", "sagan", "sngan"])
def test_samples_under_virtual_batch_norm_are_independent(architecture: str, conditioning: str) -> None:
    generator, _ = pair(architecture, conditioning=conditioning, batch_norm="virtual")
    assert [m for m in generator.modules() if isinstance(m, VirtualBatchNorm)]
    assert not [m for m in generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    z, labels = noise()
    given = () if conditioning == "none" else (labels,)
    changed = torch.cat([z[:1], 10 * torch.randn(3, 5, dtype=F64)])
    samples = generator(z, *given)
    assert samples.shape == (4, 1, 8, 8)
    assert torch.equal(samples[0], generator(changed, *given)[0])
    generator.eval()
    assert torch.equal(samples, generator(z, *given)), "there is nothing that evaluation does otherwise"
    torch.testing.assert_close(samples[:1], generator(z[:1], *(y[:1] for y in given)), rtol=1e-10, atol=1e-10)


def test_samples_under_batch_norm_are_not_independent() -> None:
    generator, _ = pair("conv")
    z, _ = noise()
    changed = torch.cat([z[:1], 10 * torch.randn(3, 5, dtype=F64)])
    assert not torch.allclose(generator(z)[0], generator(changed)[0], atol=1e-3)


@pytest.mark.parametrize("architecture", IMAGES)
def test_a_state_carries_over(architecture: str) -> None:
    batch_norm = "batch" if architecture == "modern" else "virtual"
    for _ in range(2):
        options: dict[str, Any] = {"conditioning": "concat", "batch_norm": batch_norm}
        generator, critic = pair(architecture, **options)
        others = pair(architecture, **options)
    z, labels = noise()
    samples = generator(z, labels)
    assert not torch.allclose(others[0](z, labels), samples)
    for module, other in zip((generator, critic), others, strict=True):
        other.load_state_dict(module.state_dict())
    assert torch.equal(others[0].eval()(z, labels), generator.eval()(z, labels))
    assert torch.equal(others[1].eval()(samples, labels), critic.eval()(samples, labels))
    assert torch.equal(copy.deepcopy(generator)(z, labels), generator(z, labels))


# ---- what the papers ask for ----


@pytest.mark.parametrize("size", [8, 16, 28, 64])
def test_the_guidelines_of_dcgan(size: int) -> None:
    generator, critic = DCGANGenerator(size, 3, width=4), DCGANCritic(size, 3, width=4)
    layers = {player: [m for m in player.body.modules() if not list(m.children())] for player in (generator, critic)}
    every = [*layers[generator], *layers[critic]]
    # 1. Strided convolutions in place of pooling and of upsampling.
    assert {type(m) for m in every} <= {
        nn.Unflatten, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU, nn.LeakyReLU, nn.Tanh
    }  # fmt: skip
    assert all(m.stride == (2, 2) for m in layers[critic] if isinstance(m, nn.Conv2d))
    assert all(m.stride == (2, 2) for m in layers[generator][2:] if isinstance(m, nn.ConvTranspose2d))
    # 2. Batch norm in both, but not at the output of the one and the input of the other.
    for player, convolution in ((generator, nn.ConvTranspose2d), (critic, nn.Conv2d)):
        convolutions = [m for m in layers[player] if isinstance(m, convolution)]
        norms = [m for m in layers[player] if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == len(convolutions) - 1 >= 1
    assert not isinstance(layers[generator][-2], nn.BatchNorm2d)
    assert isinstance(layers[critic][1], nn.LeakyReLU)
    # 3. No hidden layer is fully connected: the one that is gives the score.
    assert [m for m in critic.modules() if isinstance(m, nn.Linear)] == [critic.head]
    # 4. and 5. ReLU, then tanh; LeakyReLU.
    assert {type(m) for m in layers[generator]} & {nn.LeakyReLU, nn.ReLU} == {nn.ReLU}
    assert isinstance(layers[generator][-1], nn.Tanh)
    assert {type(m) for m in layers[critic]} & {nn.LeakyReLU, nn.ReLU, nn.Tanh} == {nn.LeakyReLU}
    assert all(m.negative_slope == 0.2 for m in layers[critic] if isinstance(m, nn.LeakyReLU))


def test_dcgan_starts_small() -> None:
    for player in (DCGANGenerator(32, 1), DCGANCritic(32, 1)):
        weights = [m.weight for m in player.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        joined = torch.cat([w.detach().flatten() for w in weights])
        assert abs(float(joined.mean())) < 1e-3
        assert float(joined.std()) == pytest.approx(0.02, rel=0.02)


def test_sngan_has_the_blocks_of_its_paper() -> None:
    """Table 3 (32 pixels), and table 5 (128 pixels) of the appendix, at the paper's widths."""

    def blocks(player: Any) -> list[tuple[int, int]]:
        convolutions = [
            [m for m in b.main if isinstance(m, nn.Conv2d)] for b in player.modules() if type(b) is Residual
        ]
        return [(c[0].in_channels, c[-1].out_channels) for c in convolutions]

    with torch.device("meta"):
        assert blocks(ResNetGenerator(32, 3, 128, width=256)) == [(256, 256)] * 3
        assert blocks(ResNetCritic(32, 3, width=128)) == [(3, 128), *[(128, 128)] * 3]
        large = ResNetGenerator(128, 3, 128, width=64)
        assert blocks(large) == [(1024, 1024), (1024, 512), (512, 256), (256, 128), (128, 64)]
        assert large.body[0].weight.shape == (1024 * 4 * 4, 128)
        critic = ResNetCritic(128, 3, width=64)
        assert blocks(critic) == [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 1024)]
        assert critic.head.weight.shape == (1, 1024)


def test_the_features_of_sngan_are_sums_over_pixels() -> None:
    critic = ResNetCritic(8, 1, width=4)
    maps: list[Tensor] = []
    critic.body[-1].register_forward_pre_hook(lambda _, arguments: maps.append(arguments[0]))
    features = critic(torch.randn(2, 1, 8, 8), full=True).features
    assert maps[0].shape == (2, 4, 2, 2) or maps[0].shape == (2, 4, 4, 4)
    assert maps[0].min() >= 0
    torch.testing.assert_close(features, maps[0].sum((2, 3)))


@pytest.mark.parametrize("size", [8, 16, 32, 36, 128])
def test_sagan_attends_in_the_middle(size: int) -> None:
    """Once in each player; at 32 of 128 pixels, as in the paper."""
    generator, critic = models.build("sagan", (1, size, size), width=2)
    sides_seen = []
    x = torch.randn(2, 64)
    for player in (generator, critic):
        layers = [m for m in player.modules() if isinstance(m, SelfAttention2d)]
        assert len(layers) == 1
        layers[0].register_forward_pre_hook(lambda _, arguments: sides_seen.append(arguments[0].shape[-1]))
        x = player(x)
    if size == 128:
        assert sides_seen == [32, 32]
    assert all(size // 8 <= side <= size for side in sides_seen)


def test_modern_starts_without_its_blocks_and_has_no_norm() -> None:
    generator, critic = ModernGenerator(16, width=4), ModernCritic(16, width=4, groups=2)
    for player in (generator, critic):
        assert not [m for m in player.modules() if "Norm" in type(m).__name__]
        blocks = [m for m in player.modules() if isinstance(m, Residual)]
        assert len(blocks) == 3
        channels = blocks[-1].main[0].in_channels
        x = torch.randn(2, channels, 4, 4)
        assert torch.equal(blocks[-1](x), x)
        # Fixup: 2 / 1.04 is the square of LeakyReLU's gain, three blocks of three layers.
        wide = ModernCritic(16, width=64)
        block = next(m for m in wide.modules() if isinstance(m, Residual))
        assert float(block.main[0].weight.detach().var()) * 64 == pytest.approx(2 / 1.04 / 3**0.5, rel=0.1)
    assert next(m for m in critic.modules() if isinstance(m, Residual)).main[2].groups == 2


@pytest.mark.parametrize("shape", [(3, 12, 12), (2,)])
def test_the_scores_of_an_autoencoder_are_its_errors(shape: tuple[int, ...]) -> None:
    critic = pair("autoencoder", shape)[1]
    x = torch.randn(5, *shape, dtype=F64)
    scores, code, _ = critic(x, full=True)
    restored = critic(x, reconstruct=True)
    assert restored.shape == x.shape
    assert code.shape == (5, 64)
    torch.testing.assert_close(critic.decoder(code), restored)
    want = torch.stack([-F.mse_loss(restored[i], x[i]) for i in range(5)])
    torch.testing.assert_close(scores, want)
    torch.testing.assert_close(critic(x), want)
    assert not list(critic.head.parameters())


def test_an_autoencoder_learns_to_restore() -> None:
    critic = AutoencoderCritic((2,), width=16, code=4)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    x = torch.randn(64, 2)
    with torch.no_grad():
        before = float(critic(x).mean())
    for _ in range(60):
        optimizer.zero_grad()
        (-critic(x).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(critic(x).mean()) > 0.2 * before, "the error falls to less than a fifth"


# ---- one's own ----


def test_a_body_is_all_that_a_player_needs() -> None:
    """With it come the options, and what they refuse."""
    critic = Critic(
        (2,),
        lambda shape: nn.Sequential(nn.Linear(*shape, 6), nn.ReLU()),
        6,
        conditioning="projection",
        classes=CLASSES,
    )
    generator = Generator(
        (2,), lambda entries, norm: nn.Linear(entries, 2), latent_dim=5, conditioning="concat", classes=CLASSES
    )
    z, labels = torch.randn(4, 5), noise()[1]
    assert critic(generator(z, labels), labels, full=True).features.shape == (4, 6)
    with pytest.raises(
        ValueError, match="conditioning must not be 'projection' for Generator, which has no batch norm"
    ):
        Generator((2,), lambda entries, norm: nn.Linear(entries, 2), conditioning="projection", classes=CLASSES)
    assert MLPGenerator((2,), 5)(z).shape == (4, 2)
