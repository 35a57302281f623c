"""The training schemes that recipes name: what each network minimizes.

`lipgan.systems.gan` is the ordinary one, of one generator against one critic; each of the others is one file.
"""

from collections.abc import Mapping
from types import MappingProxyType

from lipgan._registry import lookup
from lipgan.systems.aae import AAE
from lipgan.systems.adaptive_divergence import AdaptiveDivergence
from lipgan.systems.ali import ALI
from lipgan.systems.alpha_gan import AlphaGAN
from lipgan.systems.avb import AVB
from lipgan.systems.base import Batch, LossOutput, System, latents
from lipgan.systems.began import BEGAN
from lipgan.systems.cramer import Cramer
from lipgan.systems.cyclegan import CycleGAN
from lipgan.systems.ebgan import EBGAN
from lipgan.systems.gan import GAN
from lipgan.systems.gan_cls import GANCLS
from lipgan.systems.infogan import InfoGAN
from lipgan.systems.lapgan import LAPGAN
from lipgan.systems.mad_gan import MADGAN
from lipgan.systems.mode_regularized import ModeRegularized
from lipgan.systems.progressive import Progressive
from lipgan.systems.seqgan import SeqGAN
from lipgan.systems.unrolled import Unrolled
from lipgan.systems.vae_gan import VAEGAN

__all__ = ["SYSTEMS", "Batch", "LossOutput", "System", "get", "latents", "names"]

#: By name.
SYSTEMS: Mapping[str, type[System]] = MappingProxyType(
    {
        "gan": GAN,
        "aae": AAE,
        "adaptive-divergence": AdaptiveDivergence,
        "ali": ALI,
        "alpha-gan": AlphaGAN,
        "avb": AVB,
        "began": BEGAN,
        "cramer": Cramer,
        "cyclegan": CycleGAN,
        "ebgan": EBGAN,
        "gan-cls": GANCLS,
        "infogan": InfoGAN,
        "lapgan": LAPGAN,
        "mad-gan": MADGAN,
        "mode-regularized": ModeRegularized,
        "progressive": Progressive,
        "seqgan": SeqGAN,
        "unrolled": Unrolled,
        "vae-gan": VAEGAN,
    }
)


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return sorted(SYSTEMS)


def get(name: str) -> type[System]:
    """The class of the system called ``name``.

    Raises:
        ValueError: unknown name; the message names the nearest ones.
    """
    return lookup(SYSTEMS, name, "system")
