"""A critic's body as the body of another network: an encoder, a classifier, a part of a joint critic."""

from __future__ import annotations

from torch import Tensor, nn

from lipgan.models import Critic

__all__ = ["Readout", "body_of"]


def body_of(critic: nn.Module) -> tuple[nn.Module, int]:
    """The layers of a fresh critic without the last one, and how many features they give.

    Raises:
        ValueError: a critic that does not end in a linear layer.
    """
    head = getattr(critic, "head", None)
    if not (isinstance(critic, Critic) and isinstance(head, nn.Linear)):
        raise ValueError(
            f"architecture must be one whose critic has a linear last layer, got one with {type(critic).__name__}"
        )
    return critic.body, head.in_features


class Readout(nn.Module):
    """Samples ``[B, ...]`` to ``outputs`` numbers each, ``[B, outputs]``, by the layers of a critic.

    Args:
        critic: a fresh `lipgan.models.Critic` without labels, whose layers but the last are taken.
        outputs: how many numbers, at least 1.

    Raises:
        ValueError: a critic that does not end in a linear layer.
    """

    def __init__(self, critic: nn.Module, outputs: int) -> None:
        super().__init__()
        self.body, features = body_of(critic)
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, ...]`` -> ``[B, outputs]``."""
        numbers: Tensor = self.head(self.body(x).flatten(1))
        return numbers
