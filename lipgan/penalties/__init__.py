"""Gradient penalties: exact, and first order in their backward."""

from lipgan.penalties.critic_loss import CriticLoss, critic_loss
from lipgan.penalties.engines import UnsupportedCriticError
from lipgan.penalties.gradient_penalty import explain, gradient_penalty
from lipgan.penalties.graphed_step import GraphedCriticStep, graphed_critic_step
from lipgan.penalties.lazy import LazyRegularization
from lipgan.penalties.points import interpolate

__all__ = [
    "CriticLoss",
    "GraphedCriticStep",
    "LazyRegularization",
    "UnsupportedCriticError",
    "critic_loss",
    "explain",
    "gradient_penalty",
    "graphed_critic_step",
    "interpolate",
]
