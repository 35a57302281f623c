"""Critics that the benchmarks take: of images, of points and rows, of sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- images ----


def dcgan_32(
    activation: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2), norm: Callable[[int], nn.Module] | None = None
) -> nn.Module:
    """The critic of DCGAN for 32 x 32 images; without batch norm, as WGAN-GP takes it, unless a norm is given.

    Args:
        activation: makes one.
        norm: makes one for a number of channels.
    """
    w = 64
    layers: list[nn.Module] = [nn.Conv2d(3, w, 4, 2, 1), activation()]
    for narrow in (w, 2 * w):
        layers.append(nn.Conv2d(narrow, 2 * narrow, 4, 2, 1))
        layers += [] if norm is None else [norm(2 * narrow)]
        layers.append(activation())
    return nn.Sequential(*layers, nn.Conv2d(4 * w, 1, 4, 1, 0), nn.Flatten())


class _Block(nn.Module):
    """A residual block; the first one of a critic begins with a convolution, the others with an activation."""

    def __init__(self, narrow: int, wide: int, *, down: bool, first: bool = False, smooth: bool = False) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.activation = nn.SiLU() if smooth else nn.ReLU()
        self.conv1 = nn.Conv2d(narrow, wide, 3, padding=1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1)
        self.shortcut = nn.Conv2d(narrow, wide, 1) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv2(self.activation(self.conv1(x if self.first else self.activation(x))))
        if not self.down:
            return h + x
        shortcut = self.shortcut(F.avg_pool2d(x, 2)) if self.first else F.avg_pool2d(self.shortcut(x), 2)
        return F.avg_pool2d(h, 2) + shortcut


class ResNet32(nn.Module):
    """The residual critic of SNGAN for 32 x 32 images (Miyato et al. 2018, table 4), without its normalization.

    Args:
        smooth: with SiLU in the place of ReLU.
    """

    def __init__(self, *, smooth: bool = False) -> None:
        super().__init__()
        blocks = [_Block(3, 128, down=True, first=True, smooth=smooth), _Block(128, 128, down=True, smooth=smooth)]
        blocks += [_Block(128, 128, down=False, smooth=smooth) for _ in range(2)]
        self.blocks, self.activation = nn.Sequential(*blocks), nn.SiLU() if smooth else nn.ReLU()
        self.head = nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, 32, 32]`` -> ``[B]``."""
        scores: Tensor = self.head(self.activation(self.blocks(x)).sum((2, 3)))
        return scores.squeeze(1)


class _Attention(nn.Module):
    """Self-attention between positions, as in SAGAN; ``[B, c, h, w]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels // 8, 1), nn.Conv2d(channels, channels // 8, 1)
        self.value, self.gamma = nn.Conv2d(channels, channels, 1), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2)
        weights = torch.softmax(query.mT @ key, 2)
        attended: Tensor = value @ weights.mT
        return x + self.gamma * attended.view_as(x)


def attentive() -> nn.Module:
    """DCGAN's critic with self-attention at 16 x 16."""
    layers = [*dcgan_32()]  # type: ignore[misc]
    return nn.Sequential(*layers[:2], _Attention(64), *layers[2:])


class UNet(nn.Module):
    """A critic of whole images and of each pixel (Schonfeld et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 32, 4, 2, 1), nn.Conv2d(32, 64, 4, 2, 1)
        self.up1, self.up2 = nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ConvTranspose2d(64, 32, 4, 2, 1)
        self.pixels, self.whole = nn.Conv2d(32, 1, 1), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, h, w]`` -> ``[B]``."""
        a = F.leaky_relu(self.down1(x), 0.2)
        b = F.leaky_relu(self.down2(a), 0.2)
        c = F.leaky_relu(self.up1(b), 0.2)
        d = F.leaky_relu(self.up2(torch.cat([a, c], 1)), 0.2)
        scores: Tensor = self.whole(b.mean((2, 3))).squeeze(1) + self.pixels(d).mean((1, 2, 3))
        return scores


class _Equalized(nn.Module):
    """A convolution whose weight is scaled when it is used (Karras et al. 2018)."""

    def __init__(self, narrow: int, wide: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(wide, narrow, size, size)), nn.Parameter(torch.zeros(wide))
        self.scale, self.stride, self.padding = 1 / math.sqrt(narrow * size * size), stride, size // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, stride=self.stride, padding=self.padding)


class StyleGAN2(nn.Module):
    """The critic of StyleGAN2 in small: equalized weights, blurred resampling, standard deviation of the minibatch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _Equalized(3, 64, 1)
        self.convs = nn.ModuleList([_Equalized(64, 64, 3), _Equalized(64, 128, 3)])
        self.downs = nn.ModuleList([_Equalized(64, 64, 3, 2), _Equalized(128, 128, 3, 2)])
        self.skips = nn.ModuleList([_Equalized(64, 64, 1), _Equalized(64, 128, 1)])
        self.last, self.head = _Equalized(129, 128, 3), nn.Linear(128, 1)
        blur = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", (blur[:, None] * blur / 64)[None, None])
        self.blur: Tensor

    def _blurred(self, x: Tensor, pad: int) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(F.pad(x, [pad, pad, pad, pad]), self.blur.expand(channels, 1, 4, 4), groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, 32, 32]`` -> ``[B]``, with B a multiple of 4."""
        h = F.leaky_relu(self.first(x), 0.2) * math.sqrt(2)
        for conv, down, skip in zip(self.convs, self.downs, self.skips, strict=True):
            main = F.leaky_relu(conv(h), 0.2) * math.sqrt(2)
            main = F.leaky_relu(down(self._blurred(main, 2)), 0.2)
            h = (
                main[:, :, : h.shape[2] // 2, : h.shape[3] // 2] + skip(self._blurred(h, 1)[:, :, ::2, ::2])
            ) / math.sqrt(2)
        groups = h.view(4, -1, *h.shape[1:])
        deviation = (groups - groups.mean(0)).square().mean(0).add(1e-8).sqrt().mean((1, 2, 3), keepdim=True)
        h = torch.cat([h, deviation.repeat(4, 1, *h.shape[2:])], 1)
        scores: Tensor = self.head(F.leaky_relu(self.last(h), 0.2).mean((2, 3))).squeeze(1)
        return scores


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.into, self.out = (
            nn.Conv2d(channels, 2 * channels, 1, bias=False),
            nn.Conv2d(2 * channels, channels, 1, bias=False),
        )
        self.between = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=groups, bias=False)
        self.a, self.b = nn.Parameter(torch.zeros(2 * channels)), nn.Parameter(torch.zeros(2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.into(x) + self.a[:, None, None], 0.2)
        h = F.leaky_relu(self.between(h) + self.b[:, None, None], 0.2)
        return x + self.out(h)  # type: ignore[no-any-return]


def r3gan() -> nn.Module:
    """The critic of R3GAN in small: bottlenecks with grouped convolutions, biases of activations, no norm."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 1)]
    for narrow, wide in ((64, 96), (96, 128)):
        layers += [_Bottleneck(narrow, 8), nn.AvgPool2d(2), nn.Conv2d(narrow, wide, 1, bias=False)]
    return nn.Sequential(*layers, _Bottleneck(128, 8), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(128, 1))


# ---- points and rows ----


def perceptron(
    *widths: int,
    activation: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2),
    norm: Callable[[int], nn.Module] | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """Linear layers of these widths, with what is between them."""
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(narrow, wide), *([] if norm is None else [norm(wide)]), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class Wrapped(nn.Module):
    """A critic in a module of its own, as most code has it.

    Args:
        body: of the critic.
        pack: the rows that are judged together, as in CTGAN.
    """

    def __init__(self, body: nn.Module, pack: int = 1) -> None:
        super().__init__()
        self.body, self.pack = body, pack

    def forward(self, x: Tensor) -> Tensor:
        """``[B, d]``, or packs ``[B, pack, d]`` -> ``[B, 1]``."""
        scores: Tensor = self.body(x.flatten(1) if self.pack > 1 else x)
        return scores


# ---- sequences ----


class Recurrent(nn.Module):
    """A recurrent layer and a linear one on its last state."""

    def __init__(self, layer: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.head = layer(8, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, steps, 8]`` -> ``[B, 1]``."""
        scores: Tensor = self.head(self.layer(x)[0][:, -1])
        return scores


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.mT * (self.heads / width) ** 0.5, -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, steps, width))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def transformer() -> nn.Module:
    """Two blocks of attention over 16 steps."""
    return nn.Sequential(_TransformerBlock(32, 4), _TransformerBlock(32, 4), nn.Flatten(), nn.Linear(16 * 32, 1))


def wavegan() -> nn.Module:
    """The critic of WaveGAN in small: strided convolutions over 4,096 samples of sound."""
    layers: list[nn.Module] = []
    for narrow, wide in ((1, 16), (16, 32), (32, 64), (64, 64)):
        layers += [nn.Conv1d(narrow, wide, 25, 4, 11), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 1))
