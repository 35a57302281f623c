"""Gradient penalties: exact, and first order in their backward."""

from lipgan.penalties.engines import UnsupportedCriticError
from lipgan.penalties.gradient_penalty import explain, gradient_penalty
from lipgan.penalties.lazy import LazyRegularization
from lipgan.penalties.points import interpolate

__all__ = ["LazyRegularization", "UnsupportedCriticError", "explain", "gradient_penalty", "interpolate"]
