"""A critic with its arguments, and the scores among what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lipgan.penalties.parts import Parts
from lipgan.penalties.reach import reached

Critic = Callable[..., Any]
Output = int | str | Callable[[Any], Tensor] | None


class CriticCall(NamedTuple):
    """A critic, and how its scores are had.

    Attributes:
        critic: called with the samples and ``args``.
        args: whatever the critic takes after the samples.
        output: which of the critic's outputs are the scores, see `lipgan.gradient_penalty`.
        parts: what the samples consist of; None for one tensor.
        replicated: whether DistributedDataParallel waits for the gradients of the critic.
    """

    critic: Critic
    args: tuple[Any, ...]
    output: Output
    parts: Parts | None = None
    replicated: bool = False

    def scores(self, x: Tensor) -> Tensor:
        """The scores of the samples ``x``, of which the sum counts: one for each sample, or for each patch or pack."""
        samples = (x,) if self.parts is None else self.parts.arguments(x)
        return _score(self.critic(*samples, *self.args), self.output, x.shape[0])

    def parameters(self) -> list[Tensor]:
        """What the critic is trained by: the parameters that require a gradient, of the modules that it may use."""
        found: dict[int, Tensor] = {}
        for thing in reached(self.critic):
            tensors = [thing] if isinstance(thing, Tensor) else thing.parameters()
            found.update({id(p): p for p in tensors if p.requires_grad})
        return [*found.values()]

    def buffers(self) -> list[Tensor]:
        """The buffers of the modules that the critic may use."""
        modules = [thing for thing in reached(self.critic) if isinstance(thing, nn.Module)]
        return list({id(b): b for module in modules for b in module.buffers()}.values())


def _score(outcome: Any, output: Output, batch: int) -> Tensor:
    """The scores among what the critic returned: a tensor of any shape, whose sum counts."""
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
    if scores.numel() == 0:
        raise ValueError(f"critic must return scores, got a tensor of shape {tuple(scores.shape)}")
    if scores.ndim == 0 and batch > 1:
        raise ValueError(
            f"critic must return scores, not their mean over {batch} samples, got shape (): give the scores by output; "
            "if it is their sum, output=lambda score: score[None] says so"
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
