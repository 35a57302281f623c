"""The ops as PyTorch sees them: schema, one implementation per backend, fake implementation, autograd."""

from lipgan.ops._backend import BACKENDS, UnavailableError, explain, resolve, use_backend
from lipgan.ops._memory import empty_cache
from lipgan.ops.gradient_penalty import gradient_penalty, interpolate
from lipgan.ops.spectral_norm import spectral_norm, spectral_norm_group

__all__ = [
    "BACKENDS",
    "UnavailableError",
    "empty_cache",
    "explain",
    "gradient_penalty",
    "interpolate",
    "resolve",
    "spectral_norm",
    "spectral_norm_group",
    "use_backend",
]
