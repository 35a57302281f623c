"""Regularization at every k-th step only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import check_count


class LazyRegularization:
    """Calls a regularizer at every ``every``-th step and multiplies it by ``every``, which keeps its mean.

    The first step is one of those; at the others the result is a zero that costs nothing and requires no gradient. An
    optimizer of the Adam family sees the regularized steps less often: `adam` tells the settings that make up for it.

    Args:
        regularizer: returns a 0-dim tensor, such as `lipgan.gradient_penalty`.
        every: steps, at least 1; 16 in StyleGAN2.

    Attributes:
        step: calls so far; one in which the regularizer raised an exception does not count.

    Raises:
        TypeError: ``every`` that is not an int.
        ValueError: ``every`` below 1.

    Example:
        >>> r1 = LazyRegularization(lipgan.gradient_penalty, every=16)
        >>> loss = loss + r1(critic, real, kind="r1", weight=5.0)

    Source: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", appendix B.
    """

    def __init__(self, regularizer: Callable[..., Tensor], every: int) -> None:
        check_count("every", every)
        self.regularizer = regularizer
        self.every = every
        self.step = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """``every * regularizer(*args, **kwargs)`` at its steps, else a zero on the device of the first tensor."""
        if self.step % self.every == 0:
            result = self.every * self.regularizer(*args, **kwargs)
        else:
            like = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            result = torch.zeros((), device=None if like is None else like.device)
        self.step += 1
        return result

    def adam(self, lr: float, betas: tuple[float, float]) -> tuple[float, tuple[float, float]]:
        """``(c lr, betas^c)`` with ``c = every / (every + 1)``, for the optimizer of a loss with this regularizer."""
        c = self.every / (self.every + 1)
        return c * lr, (betas[0] ** c, betas[1] ** c)

    def state_dict(self) -> dict[str, int]:
        """The number of steps so far."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what `state_dict` returned."""
        self.step = state["step"]
