"""A critic with its arguments, and the scores among what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Critic = Callable[..., Any]
Output = int | str | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class CriticCall:
    """A critic, and how its scores are had.

    Attributes:
        critic: called with the samples and ``args``.
        args: whatever the critic takes after the samples.
        output: which of the critic's outputs are the scores, see `lipgan.gradient_penalty`.
    """

    critic: Critic
    args: tuple[Any, ...]
    output: Output

    def scores(self, x: Tensor) -> Tensor:
        """The scores of the samples ``x``: one number each."""
        return _score(self.critic(x, *self.args), self.output, x.shape[0])


def _score(outcome: Any, output: Output, batch: int) -> Tensor:
    """The scores among what the critic returned: a tensor of one number for each sample."""
    if callable(output):
        scores = output(outcome)
    elif output is not None:
        try:
            scores = outcome[output]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"output {output!r} does not select from the critic's {_shape(outcome)}") from error
    else:
        scores = outcome
    if not isinstance(scores, Tensor):
        advice = ": say which one counts by output" if isinstance(scores, (list, tuple, dict)) else ""
        raise ValueError(f"critic must return one tensor of scores, got {_shape(scores)}{advice}")
    if scores.is_complex():
        raise ValueError(f"critic must return real numbers, got {scores.dtype}")
    if scores.shape[:1] != (batch,) or scores.numel() != batch:
        raise ValueError(
            f"critic must return one score for each of {batch} samples, got shape {tuple(scores.shape)}: say which one "
            "counts by output, such as output=lambda scores: scores.flatten(1).sum(1)"
        )
    return scores


def _shape(outcome: Any) -> str:
    if isinstance(outcome, (list, tuple)):
        return f"{type(outcome).__name__} of {len(outcome)}"
    if isinstance(outcome, dict):
        return f"dict with keys {', '.join(map(repr, outcome))}"
    if isinstance(outcome, Tensor):
        return f"tensor of shape {tuple(outcome.shape)}"
    return type(outcome).__name__
