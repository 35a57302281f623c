"""A critic divided by the norm of its gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GradientNormalized"]


class GradientNormalized(nn.Module):
    """``f(x) / (|grad f(x)| + |f(x)|)`` in the place of a critic f, with the gradient in x and its norm per sample.

    The result lies in [-1, 1]. Where f is piecewise linear its gradient has a norm of at most 1 inside of the pieces,
    whatever the weights; this bounds the slope there, not the jumps between pieces, across which the norm of the
    gradient of f changes. Training goes through the gradient a second time (double backward), for the generator too.
    Where f and its gradient are 0 the result is 0.

    Samples must not influence each other's scores, as they do through batch normalization in training mode: the
    gradient is that of the sum of the scores.

    Args:
        critic: maps samples ``[B, ...]`` (and labels) to scores ``[B]``, or with ``full=True`` to a named tuple or data
            class with the field ``scores``.

    The forward takes what the critic takes, and returns what it returns, with the scores normalized. Without grad
    enabled, in inference mode too, the gradient is taken all the same, and the result is detached.

    Source: Wu, Shuai, Tam, Chiu 2021, "Gradient Normalization for Generative Adversarial Networks" (arXiv:2109.02235),
    Section 4.
    """

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``[B, ...]`` -> ``[B]``, or what the critic returns with its ``scores`` replaced."""
        training = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            # What was made in inference mode cannot be part of a graph.
            x, *args_ = (a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in (x, *args))
            if not (training and x.requires_grad):
                x = x.detach().requires_grad_()
            output = self.critic(x, *args_, **kwargs)
            scores = output if isinstance(output, Tensor) else output.scores
            if scores.requires_grad:
                (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=training, materialize_grads=True)
            else:
                gradient = torch.zeros_like(x)
            norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
            total = norms + scores.abs()
            normalized = scores / torch.where(total == 0, 1.0, total)
        if not training:
            normalized = normalized.detach()
        if isinstance(output, Tensor):
            return normalized
        if hasattr(output, "_replace"):
            return output._replace(scores=normalized)
        return dataclasses.replace(output, scores=normalized)
