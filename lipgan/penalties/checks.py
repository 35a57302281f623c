"""Bad input, answered with one sentence that names the argument and its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.ops._address import DTYPES


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of the names that are known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def number(name: str, value: Any) -> float:
    """``value`` as a float, if it is a finite number."""
    try:
        converted = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(converted):
        raise ValueError(f"{name} must be finite, got {converted}")
    return converted


def check_samples(real: Tensor, fake: Tensor | None) -> None:
    """Raise TypeError or ValueError for samples of which a critic has no gradient, or that do not go together."""
    for name, samples in (("real", real), ("fake", fake)):
        if samples is None and name == "fake":
            continue
        if not isinstance(samples, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(samples).__name__}")
        if samples.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {samples.dtype}")
        if samples.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {samples.layout}")
    if real.ndim == 0 or real.numel() == 0:
        raise ValueError(f"real must hold at least one sample, got shape {tuple(real.shape)}")
    if fake is not None:
        if fake.shape != real.shape:
            raise ValueError(f"fake must have the shape of real, {tuple(real.shape)}, got {tuple(fake.shape)}")
        if fake.device != real.device:
            raise ValueError(f"fake must be on the device of real, {real.device}, got {fake.device}")


def check_critic(critic: Any, critic_args: Sequence[Any]) -> None:
    """Raise TypeError for a critic that cannot be called with these arguments."""
    if not callable(critic):
        raise TypeError(f"critic must be a module or a function, got {critic!r}")
    if not isinstance(critic_args, (list, tuple)):
        raise TypeError(f"critic_args must be a list or tuple such as (labels,), got {type(critic_args).__name__}")


def check_nan(x: Tensor, real: Tensor, fake: Tensor | None) -> None:
    """Raise ValueError for NaN in the samples that ``x`` was made of; on the CPU only, elsewhere it would wait."""
    # The penalty does not show it: the slopes of piecewise-linear critics are finite at NaN.
    if x.device.type == "cpu" and math.isnan(x.sum().item()):
        for name, samples in (("real", real), ("fake", fake)):
            if samples is not None and bool(samples.isnan().any()):
                raise ValueError(f"{name} must not contain NaN, got {int(samples.isnan().sum())} of them")
