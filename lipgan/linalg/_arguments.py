"""What a matrix function asks of its arguments, and the sentences it answers with."""

import torch
from torch import Tensor

# Statistics in float64 have often been summed in float32, and so are symmetric and definite only as far.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}

_TILE = 256


def tolerance(dtype: torch.dtype) -> float:
    """Share of the largest entry (eigenvalue) up to which asymmetry (negative eigenvalues) passes for rounding."""
    return _TOLERANCE[dtype]


def check_matrix(name: str, a: object) -> None:
    """TypeError unless ``a`` is a real floating-point tensor, ValueError unless it has two dimensions or more."""
    if not isinstance(a, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(a).__name__}")
    if not a.is_floating_point():
        raise TypeError(f"{name} must have a real floating-point dtype, got {a.dtype}")
    if a.ndim < 2:
        raise ValueError(f"{name} must have at least two dimensions, got shape {tuple(a.shape)}")


def check_square(name: str, a: object) -> None:
    """As :func:`check_matrix`, and ValueError unless the last two dimensions are equal."""
    check_matrix(name, a)
    assert isinstance(a, Tensor)
    if a.shape[-1] != a.shape[-2]:
        raise ValueError(f"{name} must be square, got shape {tuple(a.shape)}")


def check_finite(name: str, a: Tensor) -> None:
    """ValueError unless every entry is finite."""
    # A sum of finite numbers may overflow, so it only tells that all is well.
    if not bool(a.sum().isfinite()) and not bool(a.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {int((~a.isfinite()).sum())} entries that are NaN or infinite")


def check_symmetric(name: str, a: Tensor) -> bool:
    """ValueError unless ``a`` is finite and symmetric up to rounding; returns whether it is so exactly."""
    check_finite(name, a)
    # Tile by tile, a matrix and its transpose meet in the caches.
    if all(
        torch.equal(a[..., i : i + _TILE, j : j + _TILE], a[..., j : j + _TILE, i : i + _TILE].mT)
        for i in range(0, a.shape[-1], _TILE)
        for j in range(0, i + 1, _TILE)
    ):
        return True
    refuse_asymmetry(name, (a - a.mT).abs().amax((-2, -1)), a.abs().amax((-2, -1)), a.dtype)
    return False


def refuse_asymmetry(name: str, difference: Tensor, largest: Tensor, dtype: torch.dtype) -> None:
    """ValueError where ``max|a - a^T|`` is too large a share of ``max|a|``."""
    bad = difference > tolerance(dtype) * largest
    if bool(bad.any()):
        worst = float((difference / largest)[bad].max())
        raise ValueError(f"{name} must be symmetric, got max|a - a^T| = {worst:.1e} max|a|")


def refuse_indefinite(name: str, smallest: Tensor, largest: Tensor, dtype: torch.dtype) -> None:
    """ValueError where the smallest eigenvalue is negative, and not only by rounding."""
    bad = smallest < -tolerance(dtype) * largest.abs().maximum(smallest.abs())
    if bool(bad.any()):
        worst = int((smallest / largest.abs().maximum(smallest.abs())).where(bad, 0.0).argmin())
        raise ValueError(
            f"{name} must be positive semi-definite, got the eigenvalues {float(smallest.flatten()[worst]):.3g} "
            f"to {float(largest.flatten()[worst]):.3g}"
        )
