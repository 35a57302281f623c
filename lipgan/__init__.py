"""Fused kernels for Lipschitz-constrained GANs, as PyTorch ops, layers and a thin trainer."""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from lipgan import linalg, nn, ops, penalties
from lipgan.nn import SpectralNormGroup, group_spectral_norm, spectral_norm
from lipgan.ops import use_backend
from lipgan.penalties import gradient_penalty, interpolate

if TYPE_CHECKING:
    from lipgan import data, losses, models, recipes
    from lipgan.training import Trainer

__version__ = _version("lipgan")

__all__ = [
    "SpectralNormGroup",
    "Trainer",
    "__version__",
    "data",
    "gradient_penalty",
    "group_spectral_norm",
    "interpolate",
    "linalg",
    "losses",
    "models",
    "nn",
    "ops",
    "penalties",
    "recipes",
    "spectral_norm",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # Layers and ops are the common use: scikit-learn and matplotlib are imported only for training.
    import importlib

    if name == "Trainer":
        return importlib.import_module("lipgan.training").Trainer
    if name in {"data", "losses", "models", "recipes"}:
        return importlib.import_module(f"lipgan.{name}")
    raise AttributeError(f"module 'lipgan' has no attribute {name!r}")
