"""Pairs of generator and critic, by name.

A generator has an integer ``latent_dim`` and maps noise ``[B, latent_dim]``, and labels ``[B]`` if it has classes, to
samples ``[B, ...]``; a critic maps samples, and labels, to scores ``[B]``, and with ``full=True`` to an `Output`.
Critics come without spectral normalization: the recipe decides on it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from lipgan._registry import lookup
from lipgan.models.autoencoder import AutoencoderCritic
from lipgan.models.base import Critic, Generator, Output
from lipgan.models.conv import ConvCritic, ConvGenerator, conv_or_mlp_generator
from lipgan.models.dcgan import DCGANCritic, DCGANGenerator
from lipgan.models.lipschitz import LipschitzCritic
from lipgan.models.mlp import MLPCritic, MLPGenerator
from lipgan.models.modern import ModernCritic, ModernGenerator
from lipgan.models.sagan import SAGANCritic, SAGANGenerator
from lipgan.models.sizes import square
from lipgan.models.sngan import ResNetCritic, ResNetGenerator

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "AutoencoderCritic",
    "ConvCritic",
    "ConvGenerator",
    "Critic",
    "DCGANCritic",
    "DCGANGenerator",
    "Generator",
    "LipschitzCritic",
    "MLPCritic",
    "MLPGenerator",
    "ModernCritic",
    "ModernGenerator",
    "Output",
    "ResNetCritic",
    "ResNetGenerator",
    "SAGANCritic",
    "SAGANGenerator",
    "build",
    "names",
    "serving",
]


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        generator, critic: the classes. Called with ``(size, channels, **options)`` where only images are served, else
            with ``(shape, **options)``.
        vectors: whether samples that are vectors are served.
    """

    generator: Callable[..., nn.Module]
    critic: Callable[..., nn.Module]
    vectors: bool = False


#: By name.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "autoencoder": Architecture(conv_or_mlp_generator, AutoencoderCritic, vectors=True),
        "conv": Architecture(ConvGenerator, ConvCritic),
        "dcgan": Architecture(DCGANGenerator, DCGANCritic),
        "lipschitz": Architecture(conv_or_mlp_generator, LipschitzCritic, vectors=True),
        "mlp": Architecture(MLPGenerator, MLPCritic, vectors=True),
        "modern": Architecture(ModernGenerator, ModernCritic),
        "sagan": Architecture(SAGANGenerator, SAGANCritic),
        "sngan": Architecture(ResNetGenerator, ResNetCritic),
    }
)


def names() -> list[str]:
    """The names that `build` knows, sorted."""
    return sorted(ARCHITECTURES)


def serving(architecture: str, shape: tuple[int, ...]) -> str:
    """The architecture that serves samples of ``shape``: itself, or "mlp" for vectors where it is convolutional.

    Raises:
        ValueError: unknown architecture.
    """
    row = lookup(ARCHITECTURES, architecture, "architecture")
    return "mlp" if len(shape) == 1 and not row.vectors else architecture


def build(
    architecture: str,
    shape: tuple[int, ...],
    *,
    conditioning: str = "none",
    classes: int = 0,
    minibatch: str = "none",
    batch_norm: str = "batch",
    latent_dim: int = 64,
    width: int | None = None,
) -> tuple[nn.Module, nn.Module]:
    """A fresh ``(generator, critic)`` for samples of ``shape``, initialized from torch's global generator.

    Args:
        architecture: a name of `names`.
        shape: of one sample: ``(channels, size, size)``, or ``(d,)`` for vectors.
        conditioning: how both see labels: "none", "concat", "auxiliary" or "projection", see `Generator` and `Critic`.
        classes: labels are 0 to classes - 1; not used for conditioning "none".
        minibatch: a layer of the critic that compares samples: "none", "discrimination" or "stddev".
        batch_norm: the generator's: "batch" or "virtual".
        latent_dim: length of one noise vector.
        width: of both networks, None for the architecture's own.

    Raises:
        ValueError: unknown architecture (the message names the nearest ones), or a shape or an option that it does not
            serve.
    """
    row = lookup(ARCHITECTURES, architecture, "architecture")
    first: tuple[Any, ...] = (shape,) if row.vectors else square(architecture, shape)
    common = {"conditioning": conditioning, "classes": classes, **({} if width is None else {"width": width})}
    generator = row.generator(*first, latent_dim=latent_dim, batch_norm=batch_norm, **common)
    return generator, row.critic(*first, minibatch=minibatch, **common)
