"""What users hand to the metrics, NumPy arrays or tensors, as tensors."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lipgan._checks import check_finite, check_floating, tolerance
from lipgan.metrics import protocols
from lipgan.metrics.protocols import Protocol
from lipgan.ops.symmetrize import symmetrize

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]] | Tensor"

__all__ = [
    "Array",
    "as_covariance",
    "as_factor",
    "as_features",
    "as_mean",
    "as_pair",
    "as_real_tensor",
    "left_to",
]

_NUMPY_DTYPES = (np.float16, np.float32, np.float64)


def as_real_tensor(name: str, value: object) -> Tensor:
    """``value`` as a tensor of its own dtype, without a copy where the memory allows it.

    Raises:
        TypeError: neither an array nor a tensor, or not a real floating-point dtype.
        ValueError: a masked array of which something is masked: what lies under the mask would count.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a real floating-point dtype, got {value.dtype}")
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array or a tensor, got {type(value).__name__}")
    if np.ma.is_masked(value):
        raise ValueError(
            f"{name} must hold no masked values, got {np.ma.count_masked(value)}: leave their samples out, or fill them"  # type: ignore[no-untyped-call]
        )
    if value.dtype.type not in _NUMPY_DTYPES:
        raise TypeError(f"{name} must have a real floating-point dtype, got {value.dtype}")
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    # torch has no negative strides, and warns of memory that it could write to but must not.
    if not value.flags.writeable or any(stride < 0 for stride in value.strides):
        value = value.copy()
    return torch.from_numpy(value)


def as_features(name: str, value: object, *, minimum: int = 1) -> Tensor:
    """``value [n, d]`` as a tensor of its own dtype, without gradient.

    Raises:
        TypeError: as :func:`as_real_tensor`.
        ValueError: another shape, fewer than ``minimum`` rows, or not finite.
    """
    rows = as_real_tensor(name, value).detach()
    check_floating(name, rows)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ValueError(f"{name} must have shape (n, d), got {tuple(rows.shape)}")
    if len(rows) < minimum:
        raise ValueError(f"{name} must have at least {minimum} sample{'s' * (minimum > 1)}, got {len(rows)}")
    check_finite(name, rows)
    return rows


def as_pair(first: str, x: object, second: str, y: object) -> tuple[Tensor, Tensor]:
    """Two sets of features as :func:`as_features`; ValueError unless they have one length and one device."""
    a, b = as_features(first, x), as_features(second, y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{second} must have {a.shape[1]} features like {first}, got {b.shape[1]}")
    if a.device != b.device:
        raise ValueError(f"{second} must be on the device of {first}, {a.device}, got {b.device}")
    return a, b


def as_mean(name: str, value: object) -> Tensor:
    """``value [d]`` in float64.

    Raises:
        TypeError: as :func:`as_real_tensor`.
        ValueError: not one dimension of at least 1, or not finite.
    """
    mean = as_real_tensor(name, value)
    if mean.ndim != 1 or not len(mean):
        raise ValueError(f"{name} must have shape (d,), got {tuple(mean.shape)}")
    check_finite(name, mean)
    return mean.double()


def as_covariance(name: str, value: object, dim: int) -> tuple[Tensor, torch.dtype]:
    """``value [dim, dim]`` in float64 and exactly symmetric, and the dtype that it had.

    Raises:
        TypeError: as :func:`as_real_tensor`.
        ValueError: another shape, not finite, or not symmetric beyond the rounding of its dtype.
    """
    cov = as_real_tensor(name, value)
    if cov.shape != (dim, dim):
        raise ValueError(f"{name} must have shape ({dim}, {dim}), got {tuple(cov.shape)}")
    symmetric, exact = symmetrize(name, cov.detach())
    if cov.requires_grad:
        wide = cov.double()
        symmetric = wide if exact else 0.5 * (wide + wide.T)
    return symmetric, cov.dtype


def as_factor(name: str, value: object, cov: Tensor, dtype: torch.dtype) -> Tensor:
    """``value [dim, r]`` in float64, a factor of ``cov``, whose numbers had ``dtype``.

    Raises:
        TypeError: as :func:`as_real_tensor`.
        ValueError: another shape, not finite, or ``value value^T`` differs from ``cov``, judged by one product of each
            with a vector.
    """
    factor = as_real_tensor(name, value).detach().double()
    dim = cov.shape[0]
    if factor.ndim != 2 or factor.shape[0] != dim:
        raise ValueError(f"{name} must have shape ({dim}, r), got {tuple(factor.shape)}")
    check_finite(name, factor)
    probe = torch.cos(torch.arange(dim, dtype=torch.float64, device=cov.device))
    expected = cov.detach() @ probe
    difference = torch.linalg.vector_norm(factor @ (factor.T @ probe) - expected)
    size = torch.linalg.matrix_norm(cov.detach()) * torch.linalg.vector_norm(probe)
    # A factor of the right covariance misses it by rounding and by what was clipped; a stale one by far more.
    if not difference <= tolerance(dtype) * size:
        raise ValueError(f"{name} must be a factor L of its covariance L L^T, but differs by {difference / size:.1e}")
    return factor


def left_to(protocol: str, metric: str, function: Callable[..., object], **given: object) -> Protocol:
    """The protocol of that name, which decides arguments of ``function``, a metric as in :meth:`Protocol.require`.

    Raises:
        ValueError: an unknown protocol, one without the metric, or a ``given`` argument that is not the default.
    """
    chosen = protocols.get(protocol)
    chosen.require(metric)
    parameters = inspect.signature(function).parameters
    for name, value in given.items():
        if value != parameters[name].default:
            raise ValueError(
                f"protocol {protocol!r} sets {name} itself; leave out {name} or protocol, got {name}={value!r}"
            )
    return chosen
