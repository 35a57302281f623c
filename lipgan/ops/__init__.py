"""The ops as PyTorch sees them: schema, one implementation per backend, fake implementation, autograd."""

from lipgan.ops._backend import BACKENDS, UnavailableError, explain, resolve, use_backend
from lipgan.ops._memory import empty_cache
from lipgan.ops.gradient_penalty import gradient_penalty, interpolate
from lipgan.ops.nearest_neighbours import ball_counts, nearest_neighbours
from lipgan.ops.spectral_norm import spectral_norm, spectral_norm_group

__all__ = [
    "BACKENDS",
    "UnavailableError",
    "ball_counts",
    "empty_cache",
    "explain",
    "gradient_penalty",
    "interpolate",
    "nearest_neighbours",
    "resolve",
    "spectral_norm",
    "spectral_norm_group",
    "use_backend",
]
