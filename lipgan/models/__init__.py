"""Pairs of generator and critic, by name.

A generator has an integer ``latent_dim`` and maps noise ``[B, latent_dim]`` to samples ``[B, ...]``; a critic
maps samples to scores ``[B]``. Critics come without normalization: the recipe decides on it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from lipgan.models.conv import ConvCritic, ConvGenerator, conv_pair
from lipgan.registry import lookup

__all__ = ["ARCHITECTURES", "ConvCritic", "ConvGenerator", "build", "names"]

ARCHITECTURES: Mapping[str, Callable[[tuple[int, ...]], tuple[nn.Module, nn.Module]]] = MappingProxyType(
    {"conv": conv_pair}
)


def names() -> list[str]:
    """The names that `build` knows, sorted."""
    return sorted(ARCHITECTURES)


def build(architecture: str, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """A fresh ``(generator, critic)`` for samples of ``shape``, initialized from torch's global generator.

    Raises:
        ValueError: unknown architecture (the message names the nearest ones), or a shape that it does not
            serve.
    """
    return lookup(ARCHITECTURES, architecture, "architecture")(shape)
