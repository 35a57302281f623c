"""Checks of arguments: bad input is answered with one sentence that names the argument and its value."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lipgan._choices import RANGES
from lipgan._dtypes import FLOATING, FLOATING_NAMES

# ---- plain values ----


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of the names that are known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_int(name: str, value: object) -> None:
    """TypeError unless ``value`` is an int."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """TypeError unless ``value`` is an int, ValueError unless it is at least ``minimum``."""
    check_int(name, value)
    if value < minimum:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_range(name: str, value: object) -> None:
    """TypeError unless ``value`` is an int, ValueError unless it lies in the range of that name, of `RANGES`."""
    least, largest = RANGES[name]
    check_count(name, value, least)
    if value > largest:  # type: ignore[operator]
        raise ValueError(f"{name} must be at most {largest}, got {value}")


def as_number(name: str, value: Any, *, minimum: float = -math.inf) -> float:
    """``value`` as a float; TypeError if it is no number, ValueError if it is not finite or below ``minimum``."""
    if type(value) is float and minimum <= value < math.inf and value > -math.inf:
        return value
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        converted = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(converted) or converted < minimum:
        bound = {-math.inf: "", 0.0: " and not negative"}.get(minimum, f" and at least {minimum:g}")
        raise ValueError(f"{name} must be finite{bound}, got {converted}")
    return converted


def check_positive(name: str, value: object) -> None:
    """TypeError unless ``value`` is a number, ValueError unless it is finite and above 0."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be positive, got {value!r}")
    as_number(name, value)


def check_generator(generator: object) -> None:
    """TypeError unless ``generator`` is one of torch's, or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def as_whole(name: str, value: float, minimum: int = 1) -> int:
    """``value``, which may be a float, as an int; ValueError unless it is a whole number of at least ``minimum``."""
    if not math.isfinite(value) or value != int(value) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    return int(value)


# ---- tensors ----


def check_floating(name: str, tensor: object) -> None:
    """TypeError unless ``tensor`` is a tensor of one of the dtypes that the package serves."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be {FLOATING_NAMES}, got {tensor.dtype}")


def check_samples(name: str, samples: object) -> None:
    """TypeError unless ``samples`` is dense and floating point, ValueError unless it holds samples ``[B, ...]``."""
    check_floating(name, samples)
    assert isinstance(samples, Tensor)
    if samples.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {samples.layout}")
    if samples.ndim == 0 or samples.numel() == 0:
        raise ValueError(f"{name} must hold at least one sample, [B, ...], got shape {tuple(samples.shape)}")


# ---- matrices ----

# Statistics in float64 have often been summed in float32, and so are symmetric and definite only as far. Derived in
# docs/numerics/matrix_sqrt.md.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

_TILE = 256


def tolerance(dtype: torch.dtype) -> float:
    """Share of the largest entry (eigenvalue) up to which asymmetry (negative eigenvalues) passes for rounding."""
    return _TOLERANCE[dtype]


def check_real(name: str, a: object) -> None:
    """TypeError unless ``a`` is a real floating-point tensor."""
    if not isinstance(a, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(a).__name__}")
    if not a.is_floating_point():
        raise TypeError(f"{name} must have a real floating-point dtype, got {a.dtype}")


def check_matrix(name: str, a: object) -> None:
    """As :func:`check_real`, and ValueError unless ``a`` has two dimensions or more."""
    check_real(name, a)
    assert isinstance(a, Tensor)
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
    # Tile by tile, a matrix and its transpose meet in the caches of a CPU. A GPU makes the host wait for each answer.
    tile = _TILE if a.device.type == "cpu" else max(a.shape[-1], 1)
    if all(
        torch.equal(a[..., i : i + tile, j : j + tile], a[..., j : j + tile, i : i + tile].mT)
        for i in range(0, a.shape[-1], tile)
        for j in range(0, i + 1, tile)
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


# Where a negative eigenvalue reaches this share of the largest, not even that one is known.
_LOST = 0.25


def refuse_indefinite(
    name: str, smallest: Tensor, largest: Tensor, dtype: torch.dtype, subtracted: float = 0.0
) -> None:
    """ValueError where the smallest eigenvalue is negative, and not only by rounding in ``dtype``.

    ``subtracted`` is the size of what may have been subtracted, after rounding, for the entries of the matrix.
    """
    size = largest.abs().maximum(smallest.abs())
    bad = smallest < -(tolerance(dtype) * size).maximum((tolerance(dtype) * (size + subtracted)).minimum(_LOST * size))
    if bool(bad.any()):
        worst = int((smallest / largest.abs().maximum(smallest.abs())).where(bad, 0.0).argmin())
        raise ValueError(
            f"{name} must be positive semi-definite, got the eigenvalues {float(smallest.flatten()[worst]):.3g} "
            f"to {float(largest.flatten()[worst]):.3g}"
        )


# ---- critics and their samples ----


def check_real_and_fake(real: Tensor, fake: Tensor | None) -> None:
    """TypeError or ValueError for samples of which a critic has no gradient, or that do not fit each other."""
    check_samples("real", real)
    if fake is not None:
        check_samples("fake", fake)
        if fake.shape != real.shape:
            raise ValueError(f"fake must have the shape of real, {tuple(real.shape)}, got {tuple(fake.shape)}")
        if fake.device != real.device:
            raise ValueError(f"fake must be on the device of real, {real.device}, got {fake.device}")


def check_critic(critic: Any, critic_args: Sequence[Any]) -> None:
    """TypeError for a critic that cannot be called with these arguments."""
    if not callable(critic):
        raise TypeError(f"critic must be a module or a function, got {critic!r}")
    if not isinstance(critic_args, (list, tuple)):
        raise TypeError(f"critic_args must be a list or tuple such as (labels,), got {type(critic_args).__name__}")


def check_no_nan(x: Tensor, real: Tensor, fake: Tensor | None) -> None:
    """ValueError for NaN in the samples that ``x`` was made of; on the CPU only, elsewhere it would wait."""
    # The penalty does not show it: the slopes of piecewise-linear critics are finite at NaN.
    if x.device.type == "cpu" and math.isnan(x.sum().item()):
        for name, samples in (("real", real), ("fake", fake)):
            if samples is not None and bool(samples.isnan().any()):
                raise ValueError(f"{name} must not contain NaN, got {int(samples.isnan().sum())} of them")
