"""A small convolutional generator and critic for square images of 8 to 32 pixels.

The generator follows DCGAN (Radford et al. 2015, arXiv:1511.06434): transposed convolutions instead of
upsampling layers, batch norm, ReLU, tanh. The critic keeps DCGAN's strided convolutions and LeakyReLU but no
batch norm, which would undo the Lipschitz bound that spectral normalization gives (Miyato et al. 2018,
arXiv:1802.05957).
"""

from torch import Tensor, nn

__all__ = ["ConvCritic", "ConvGenerator", "conv_pair"]


def _base_and_doublings(size: int, channels: int) -> tuple[int, int]:
    """Write ``size`` as ``base * 2**doublings`` with a base of 3 to 7 pixels.

    Raises:
        ValueError: size or channels out of range.
    """
    if size % 4 or not 8 <= size <= 32:
        raise ValueError(f"size must be a multiple of 4 from 8 to 32, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    doublings = 0
    while size > 4 and size % 2 == 0:
        size //= 2
        doublings += 1
    return size, doublings


class ConvGenerator(nn.Module):
    """Noise ``[B, latent_dim]`` -> images ``[B, channels, size, size]`` in [-1, 1].

    Args:
        size: pixels a side, a multiple of 4 from 8 to 32.
        channels: 1 or 3.
        latent_dim: length of one noise vector.
        width: channels at full resolution; each halving of the resolution doubles them.

    Raises:
        ValueError: size or channels out of range.
    """

    def __init__(self, size: int = 16, channels: int = 1, latent_dim: int = 64, width: int = 16) -> None:
        super().__init__()
        base, doublings = _base_and_doublings(size, channels)
        self.latent_dim = latent_dim
        c = width << doublings
        # Batch norm follows every layer but the last, so biases would be dead weight.
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, c * base * base, bias=False),
            nn.Unflatten(1, (c, base, base)),
            nn.BatchNorm2d(c),
            nn.ReLU(),
        ]
        for _ in range(doublings):
            layers += [
                nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(c // 2),
            ]
            layers.append(nn.ReLU())
            c //= 2
        layers += [nn.Conv2d(c, channels, 3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """``[B, latent_dim]`` -> ``[B, channels, size, size]``."""
        images: Tensor = self.layers(z)
        return images


class ConvCritic(nn.Module):
    """Images ``[B, channels, size, size]`` -> scores ``[B]``, unbounded.

    Args:
        size: pixels a side, a multiple of 4 from 8 to 32.
        channels: 1 or 3.
        width: channels after the first convolution; each halving of the resolution doubles them.

    Raises:
        ValueError: size or channels out of range.
    """

    def __init__(self, size: int = 16, channels: int = 1, width: int = 64) -> None:
        super().__init__()
        base, doublings = _base_and_doublings(size, channels)
        layers: list[nn.Module] = []
        previous, c = channels, width
        for _ in range(doublings):
            layers += [nn.Conv2d(previous, c, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
            previous, c = c, 2 * c
        # Depth is cheap here, at 3 to 7 pixels a side.
        layers += [nn.Conv2d(previous, previous, 3, padding=1), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(previous * base * base, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels, size, size]`` -> ``[B]``."""
        scores: Tensor = self.layers(x)
        return scores.squeeze(1)


def conv_pair(shape: tuple[int, ...]) -> tuple[ConvGenerator, ConvCritic]:
    """The pair for images of ``shape = (channels, size, size)``.

    Raises:
        ValueError: not a square image, or a size or channel count out of range.
    """
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"the conv architecture needs square images (channels, size, size), got shape {shape}")
    channels, size, _ = shape
    return ConvGenerator(size, channels), ConvCritic(size, channels)
