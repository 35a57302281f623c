"""Fused kernels for Lipschitz-constrained GANs, as PyTorch ops, layers and a thin trainer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lipgan import data, linalg, lipschitz, metrics, models, nn, objectives, ops, penalties, recipes, systems
    from lipgan.metrics import frechet_distance
    from lipgan.nn.patch import patch
    from lipgan.nn.spectral_norm import spectral_norm
    from lipgan.nn.spectral_norm_group import SpectralNormGroup, group_spectral_norm
    from lipgan.objectives import divergences, losses, regularizers
    from lipgan.ops import use_backend
    from lipgan.penalties import critic_loss, gradient_penalty, graphed_critic_step, interpolate
    from lipgan.training import Trainer

    __version__: str

__all__ = [
    "SpectralNormGroup",
    "Trainer",
    "__version__",
    "critic_loss",
    "data",
    "divergences",
    "frechet_distance",
    "gradient_penalty",
    "graphed_critic_step",
    "group_spectral_norm",
    "interpolate",
    "linalg",
    "lipschitz",
    "losses",
    "metrics",
    "models",
    "nn",
    "objectives",
    "ops",
    "patch",
    "penalties",
    "recipes",
    "regularizers",
    "spectral_norm",
    "systems",
    "use_backend",
]

# The module that each name comes from. They are imported when they are first asked for: ``lipgan --help`` needs no
# PyTorch, and layers need neither scikit-learn nor matplotlib.
_FROM = {
    "SpectralNormGroup": "lipgan.nn",
    "Trainer": "lipgan.training",
    "critic_loss": "lipgan.penalties",
    "divergences": "lipgan.objectives",
    "frechet_distance": "lipgan.metrics",
    "gradient_penalty": "lipgan.penalties",
    "graphed_critic_step": "lipgan.penalties",
    "group_spectral_norm": "lipgan.nn",
    "interpolate": "lipgan.penalties",
    "losses": "lipgan.objectives",
    "patch": "lipgan.nn",
    "regularizers": "lipgan.objectives",
    "spectral_norm": "lipgan.nn",
    "use_backend": "lipgan.ops",
}
_MODULES = (
    "data",
    "linalg",
    "lipschitz",
    "metrics",
    "models",
    "nn",
    "objectives",
    "ops",
    "penalties",
    "recipes",
    "systems",
)


if not TYPE_CHECKING:  # for a type checker every name would exist

    def __getattr__(name: str) -> Any:
        if name in _FROM:
            value = getattr(importlib.import_module(_FROM[name]), name)
        elif name == "__version__":
            # Its package reads e-mail headers, which takes as long to import as all that --help needs.
            from importlib.metadata import version

            value = version("lipgan")
        elif name in _MODULES:
            value = importlib.import_module(f"lipgan.{name}")
        else:
            raise AttributeError(f"module 'lipgan' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
