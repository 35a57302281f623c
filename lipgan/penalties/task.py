"""What is asked of an engine: a penalty of a form, of a critic's scores at points, and how it is to be had."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipgan.penalties.critic_call import CriticCall
from lipgan.penalties.loss_of_scores import Loss

ENGINES = ("auto", "fused", "autograd")
COMPILE = (False, True, "cudagraph")


class PenaltyForm(NamedTuple):
    """A penalty as a function of the critic's gradients: the arguments of the op ``gradient_penalty``."""

    kind: str
    weight: float
    target: float
    norm: str


class Execution(NamedTuple):
    """How a penalty is computed.

    Attributes:
        engine: one of `ENGINES`.
        compile: one of `COMPILE`; "cudagraph" on a GPU only.
        differentiable: whether a backward is wanted beside the values.
    """

    engine: str
    compile: bool | str
    differentiable: bool


class Task(NamedTuple):
    """What is asked of an engine.

    Attributes:
        call: of the critic.
        x: ``[B, ...]``, the points.
        form: of the penalty.
        execution: how.
        apart: whether the samples must not see each other.
        loss: of the scores of x, None for none.
    """

    call: CriticCall
    x: Tensor
    form: PenaltyForm
    execution: Execution
    apart: bool
    loss: Loss | None

    @property
    def differentiable(self) -> bool:
        return self.execution.differentiable


def as_one_batch(call: CriticCall, form: PenaltyForm, x: Tensor) -> tuple[CriticCall, PenaltyForm]:
    """The call and the form for real and fake samples in one batch ``x``, for those for each of the two."""
    half = x.shape[0] // 2
    # The mean over 2 B samples is half of the sum of two means.
    joined = call._replace(args=tuple(_twice(item, half) for item in call.args))
    return joined, form._replace(weight=2 * form.weight)


def _twice(argument: Any, batch: int) -> Any:
    if isinstance(argument, Tensor) and argument.ndim and argument.shape[0] == batch:
        return torch.cat([argument, argument])
    return argument
