"""A critic's body as the body of another network: an encoder, or a classifier."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

__all__ = ["Readout"]


class Readout(nn.Module):
    """Samples ``[B, ...]`` to ``outputs`` numbers each, ``[B, outputs]``, by the layers of a critic.

    Args:
        critic: a `lipgan.models.Critic` without labels; its last layer is replaced in place.
        outputs: how many numbers, at least 1.
    """

    def __init__(self, critic: nn.Module, outputs: int) -> None:
        super().__init__()
        head = cast(Any, critic).head
        if not isinstance(head, nn.Linear):
            raise ValueError(f"the architecture's critic must end in a linear layer, got {type(head).__name__}")
        cast(Any, critic).head = nn.Linear(head.in_features, outputs)
        self.critic, self.outputs = critic, outputs

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, ...]`` -> ``[B, outputs]``."""
        numbers: Tensor = self.critic(x)
        return numbers.view(len(x), self.outputs)
