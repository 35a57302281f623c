"""Self-attention, conditional and virtual batch norm, and the layers that compare the samples of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from lipgan.nn import (
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    MinibatchDiscrimination,
    MinibatchStdDev,
    SelfAttention2d,
    VirtualBatchNorm,
)

F64 = torch.float64
# Sums of some ten terms of order 1 in float64.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


pytestmark = pytest.mark.usefixtures("single_thread")


def check_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """First and second derivatives against finite differences, in float64."""
    leaves = tuple(t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs)
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


# ---- self-attention ----


def attention(channels: int = 5, reduction: int = 2) -> SelfAttention2d:
    layer = SelfAttention2d(channels, reduction).to(F64)
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    return layer


def test_attention_starts_as_the_identity_and_learns_its_gamma() -> None:
    layer = SelfAttention2d(16)
    x = torch.randn(2, 16, 3, 4)
    assert torch.equal(layer(x), x)
    layer(x).square().sum().backward()
    assert layer.gamma.grad is not None
    assert layer.gamma.grad != 0


def test_attention_is_the_formula_of_the_paper() -> None:
    layer = attention()
    x = torch.randn(2, 5, 2, 3, dtype=F64)
    w = {name: getattr(layer, name).weight[:, :, 0, 0] for name in "fghv"}
    assert w["f"].shape == (2, 5)
    want = torch.empty_like(x)
    for b in range(2):
        pixels = [x[b, :, r, c] for r in range(2) for c in range(3)]
        for j, x_j in enumerate(pixels):
            s = torch.stack([(w["f"] @ x_i) @ (w["g"] @ x_j) for x_i in pixels])
            beta = s.exp() / s.exp().sum()
            o = w["v"] @ sum(beta[i] * (w["h"] @ x_i) for i, x_i in enumerate(pixels))
            want[b, :, j // 3, j % 3] = 0.7 * o + x_j
    torch.testing.assert_close(layer(x), want, **CLOSE)
    strided = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(strided), want, **CLOSE)


def test_attention_is_the_scaled_dot_product_attention_of_torch() -> None:
    layer = attention()
    x = torch.randn(3, 5, 4, 3, dtype=F64)
    f, g, h = (conv(x).flatten(2).mT for conv in (layer.f, layer.g, layer.h))
    o = F.scaled_dot_product_attention(g, f, h, scale=1.0).mT.reshape(3, 2, 4, 3)
    torch.testing.assert_close(layer(x), x + 0.7 * layer.v(o), **CLOSE)


def test_attention_has_second_derivatives() -> None:
    check_gradients(attention(2, 1), torch.randn(2, 2, 2, 1, dtype=F64))


def test_attention_does_not_overflow() -> None:
    """Scores of 1e6 are far beyond the range of exp."""
    layer = attention()
    y = layer(1e3 * torch.randn(2, 5, 3, 3, dtype=F64))
    assert y.isfinite().all()


# ---- class-conditional batch norm ----


def test_conditional_batch_norm_starts_as_batch_norm() -> None:
    for layer, plain, shape in (
        (ConditionalBatchNorm1d(4, 3), nn.BatchNorm1d(4), (6, 4)),
        (ConditionalBatchNorm2d(4, 3), nn.BatchNorm2d(4), (6, 4, 2, 3)),
    ):
        x, labels = torch.randn(shape), torch.tensor([0, 1, 2, 2, 1, 0])
        torch.testing.assert_close(layer(x, labels), plain(x))
        torch.testing.assert_close(layer.running_var, plain.running_var)
        layer.eval(), plain.eval()
        torch.testing.assert_close(layer(x, labels), plain(x))


def test_each_class_has_its_own_gain_and_shift() -> None:
    layer = ConditionalBatchNorm2d(4, 3).to(F64)
    with torch.no_grad():
        layer.gain.normal_()
        layer.shift.normal_()
    x, labels = torch.randn(5, 4, 2, 3, dtype=F64), torch.tensor([2, 0, 2, 1, 0])
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    want = torch.stack(
        [
            layer.gain[y][:, None, None] * (x[i] - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
            + layer.shift[y][:, None, None]
            for i, y in enumerate(labels.tolist())
        ]
    )
    torch.testing.assert_close(layer(x, labels), want, **CLOSE)
    layer(x, labels)[labels == 2].sum().backward()
    assert layer.shift.grad is not None
    assert layer.shift.grad.tolist() == [[0.0] * 4, [0.0] * 4, [12.0] * 4]


def test_conditional_batch_norm_has_derivatives() -> None:
    layer = ConditionalBatchNorm1d(3, 2).to(F64)
    layer.momentum = 0.0  # running statistics that stay: the same function in each call
    labels = torch.tensor([0, 1, 1, 0])
    check_gradients(lambda x: layer(x, labels), torch.randn(4, 3, dtype=F64))


def test_conditional_batch_norm_keeps_images_apart_from_vectors() -> None:
    with pytest.raises(ValueError, match="4D"):
        ConditionalBatchNorm2d(4, 3)(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        ConditionalBatchNorm2d(4, 0)


def test_spectral_normalization_leaves_gains_alone() -> None:
    import lipgan

    model = nn.Sequential(nn.Linear(2, 4), ConditionalBatchNorm1d(4, 3))
    assert lipgan.group_spectral_norm(model).names == ["0"]


# ---- virtual batch norm ----


@pytest.mark.parametrize("pixels", [(), (3,), (2, 3)])
def test_virtual_batch_norm_is_the_statistics_of_the_reference_and_one_sample(pixels: tuple[int, ...]) -> None:
    layer = VirtualBatchNorm(4, reference=3).to(F64)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = torch.randn(5, 4, *pixels, dtype=F64)
    reference, others = x[:3], x[3:]
    wanted = []
    for channel in range(4):
        r = reference[:, channel].flatten(1) if pixels else reference[:, channel, None]
        column = [(v - r.mean()) / (r.var(correction=0) + layer.eps).sqrt() for v in reference[:, channel]]
        for sample in others[:, channel]:
            joined = torch.cat([r, sample.reshape(1, -1)])
            column.append((sample - joined.mean()) / (joined.var(correction=0) + layer.eps).sqrt())
        wanted.append(layer.weight[channel] * torch.stack(column) + layer.bias[channel])
    torch.testing.assert_close(layer(x), torch.stack(wanted, 1), **CLOSE)


def test_virtual_batch_norm_does_not_cancel() -> None:
    """At a mean of 1000 with a deviation of 1, mean squares less squared means lose six of float32's seven digits."""
    torch.manual_seed(1)
    x = 1000 + torch.randn(40, 3, 4, 4)
    layer = VirtualBatchNorm(3, reference=20)
    truth = VirtualBatchNorm(3, reference=20).to(F64)(x.double())
    # The input itself is exact; its mean is rounded once, to 1000 eps.
    assert (layer(x) - truth).abs().max() < 4 * 1000 * torch.finfo(torch.float32).eps


def test_virtual_batch_norm_sees_no_other_sample() -> None:
    layer = VirtualBatchNorm(4, reference=3)
    x = torch.randn(6, 4, 2, 2)
    other = x.clone()
    other[4:] = 100 * torch.randn(2, 4, 2, 2)
    assert torch.equal(layer(x)[3], layer(other)[3])
    reference = x.clone()
    reference[0] += 1
    assert not torch.equal(layer(x)[3], layer(reference)[3])


def test_virtual_batch_norm_has_derivatives() -> None:
    layer = VirtualBatchNorm(2, reference=2).to(F64)
    check_gradients(layer, torch.randn(4, 2, 2, 1, dtype=F64))
    check_gradients(layer, torch.randn(4, 2, dtype=F64))


def test_virtual_batch_norm_takes_a_reference_alone_and_names_what_is_wrong() -> None:
    layer = VirtualBatchNorm(4, reference=3)
    assert layer(torch.randn(3, 4)).shape == (3, 4)
    with pytest.raises(
        ValueError, match=r"3 reference samples and then others, of 4 channels each, got shape \(2, 4\)"
    ):
        layer(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"got shape \(5, 3\)"):
        layer(torch.randn(5, 3))
    with pytest.raises(ValueError, match="reference must be at least 1, got 0"):
        VirtualBatchNorm(4, reference=0)


# ---- layers that compare the samples of a batch ----


def test_minibatch_discrimination_is_the_sum_over_the_batch() -> None:
    layer = MinibatchDiscrimination(6, kernels=4, kernel_dim=3).to(F64)
    x = torch.randn(5, 6, dtype=F64)
    m = (x @ layer.rows.weight.T).view(5, 4, 3)
    want = torch.zeros(5, 4, dtype=F64)
    for i in range(5):
        for j in range(5):
            for b in range(4):
                want[i, b] += torch.exp(-sum(abs(m[i, b, c] - m[j, b, c]) for c in range(3)))
    y = layer(x)
    assert y.shape == (5, 10)
    assert layer.out_features == 10
    assert torch.equal(y[:, :6], x)
    torch.testing.assert_close(y[:, 6:], want, **CLOSE)


def test_minibatch_discrimination_counts_equal_samples() -> None:
    layer = MinibatchDiscrimination(6)
    x = torch.randn(1, 6).expand(8, 6).clone().requires_grad_()
    y = layer(x)
    assert torch.equal(y[:, 6:], torch.full((8, 32), 8.0))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert torch.equal(layer(1e6 * torch.eye(6))[:, 6:], torch.ones(6, 32)), "far samples count for nothing"


def test_minibatch_discrimination_has_derivatives() -> None:
    check_gradients(MinibatchDiscrimination(2, 2, 2).to(F64), torch.randn(3, 2, dtype=F64))


@pytest.mark.parametrize(("batch", "group"), [(8, 4), (6, 2), (6, 4), (5, 5), (3, 4), (4, 1), (1, 4)])
@pytest.mark.parametrize("pixels", [(), (2, 3)])
def test_minibatch_stddev_is_the_mean_deviation_of_a_group(batch: int, group: int, pixels: tuple[int, ...]) -> None:
    layer = MinibatchStdDev(group)
    x = torch.randn(batch, 3, *pixels, dtype=F64)
    size = group if batch % group == 0 else batch
    want = torch.empty(batch, 1, *pixels, dtype=F64)
    for begin in range(0, batch, size):
        part = x[begin : begin + size]
        entries = [torch.sqrt(e.var(correction=0) + layer.eps) for e in part.flatten(1).unbind(1)]
        want[begin : begin + size] = sum(entries) / len(entries)
    y = layer(x)
    assert torch.equal(y[:, :3], x)
    torch.testing.assert_close(y[:, 3:], want, **CLOSE)


def test_minibatch_stddev_of_a_joined_batch_keeps_the_halves_apart() -> None:
    layer = MinibatchStdDev()
    real, fake = torch.randn(8, 3), 5 * torch.randn(8, 3)
    torch.testing.assert_close(layer(torch.cat([real, fake])), torch.cat([layer(real), layer(fake)]))


def test_minibatch_stddev_has_derivatives_also_where_samples_are_equal() -> None:
    layer = MinibatchStdDev(2)
    check_gradients(layer, torch.randn(4, 3, dtype=F64))
    x = torch.ones(4, 3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(4, 3))


@pytest.mark.hardware  # torch does not exchange a wrapper that a graph holds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_what_they_are(dtype: torch.dtype) -> None:
    x = torch.randn(8, 4, 3, 3)
    for layer in (SelfAttention2d(4), VirtualBatchNorm(4, 2), MinibatchStdDev()):
        y = layer.to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        # Few sums of order 1: some roundings of the type.
        assert (y.float() - layer.float()(x.to(dtype).float())).abs().max() < 8 * torch.finfo(dtype).eps
    assert MinibatchDiscrimination(4).to(dtype)(x[:, :, 0, 0].to(dtype)).dtype == dtype


def test_an_empty_batch_goes_through() -> None:
    assert MinibatchStdDev()(torch.randn(0, 3)).shape == (0, 4)
    assert MinibatchDiscrimination(3)(torch.randn(0, 3)).shape == (0, 35)
    assert SelfAttention2d(4)(torch.randn(0, 4, 2, 2)).shape == (0, 4, 2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfAttention2d(0), "channels must be at least 1, got 0"),
        (lambda: SelfAttention2d(4, 0), "reduction must be at least 1, got 0"),
        (lambda: MinibatchDiscrimination(4, kernels=0), "kernels must be at least 1, got 0"),
        (lambda: MinibatchDiscrimination(4)(torch.randn(2, 4, 3)), r"x must be \[B, 4\], got shape \(2, 4, 3\)"),
        (lambda: MinibatchStdDev(0), "group_size must be at least 1, got 0"),
        (lambda: MinibatchStdDev()(torch.randn(4)), r"x must be \[B, c, ...\], got shape \(4,\)"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
