"""Fused kernels for Lipschitz-constrained GANs, as PyTorch ops, layers and a thin trainer."""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from lipgan import linalg, nn, ops, penalties
from lipgan.nn import SpectralNormGroup, group_spectral_norm, spectral_norm
from lipgan.ops import use_backend
from lipgan.penalties import gradient_penalty, interpolate

if TYPE_CHECKING:
    from lipgan import data, divergences, lipschitz, losses, metrics, models, recipes, regularizers, systems
    from lipgan.metrics import frechet_distance
    from lipgan.training import Trainer

__version__ = _version("lipgan")

__all__ = [
    "SpectralNormGroup",
    "Trainer",
    "__version__",
    "data",
    "divergences",
    "frechet_distance",
    "gradient_penalty",
    "group_spectral_norm",
    "interpolate",
    "linalg",
    "lipschitz",
    "losses",
    "metrics",
    "models",
    "nn",
    "ops",
    "penalties",
    "recipes",
    "regularizers",
    "spectral_norm",
    "systems",
    "use_backend",
]


_MODULES = (
    "data",
    "divergences",
    "lipschitz",
    "losses",
    "metrics",
    "models",
    "recipes",
    "regularizers",
    "systems",
)


def __getattr__(name: str) -> Any:
    # Layers and ops are the common use: scikit-learn and matplotlib are imported only for training.
    import importlib

    if name == "Trainer":
        return importlib.import_module("lipgan.training").Trainer
    if name == "frechet_distance":
        return importlib.import_module("lipgan.metrics").frechet_distance
    if name in _MODULES:
        return importlib.import_module(f"lipgan.{name}")
    raise AttributeError(f"module 'lipgan' has no attribute {name!r}")
