"""Arithmetic of upper bounds: every result is rounded up."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor


def up(x: float) -> float:
    """The next larger number; 0 stays, as a product of factors far from underflow."""
    return math.nextafter(x, math.inf) if x > 0 else x


def times(a: float, b: float) -> float:
    return a if b == 1 else b if a == 1 else up(a * b)


def plus(a: float, b: float) -> float:
    return a if b == 0 else b if a == 0 else up(a + b)


def root(x: float) -> float:
    root = math.sqrt(x)
    return root if root * root == x and root.is_integer() else up(root)


def joint(parts: Iterable[float]) -> float:
    """Norm of the vector of the constants of several results."""
    total = 0.0
    for part in parts:
        total = plus(total, times(part, part))
    return root(total)


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0
