"""What is asked of a penalty: the arguments that its functions share, checked and made ready for the engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lipgan._checks import as_number, check_choice, check_critic, check_real_and_fake
from lipgan._choices import PENALTY_FORMS
from lipgan.ops.gradient_penalty import NORMS
from lipgan.penalties.conditions import (
    Float32InPlaceOfFloat16,
    OutsideOfInferenceMode,
    Unsharded,
    as_data,
    check_no_transform,
    clone_if_inference,
    through_ddp,
)
from lipgan.penalties.critic_call import Critic, CriticCall, Output
from lipgan.penalties.parts import Parts, Samples, check_same_parts, join
from lipgan.penalties.task import COMPILE, ENGINES, Execution, PenaltyForm

_NEEDS_FAKE = ("wgan-gp", "lp", "max", "r2", "r1+r2")


class Request(NamedTuple):
    """Samples ``[B, ...]`` and arguments of a critic, and the penalty that is wanted.

    Attributes:
        critic: as it was given, which may be a wrapper.
        real, fake: detached.
        parts: what they consist of; None for one tensor.
        critic_args: after the samples.
        kind: of the penalty; None for none.
        form: of the penalty of that kind.
        execution: how they are computed.
        output: which of the critic's outputs are the scores.
        unsharded: to be entered while the critic runs.
    """

    critic: Critic
    real: Tensor
    fake: Tensor | None
    parts: Parts | None
    critic_args: tuple[Any, ...]
    kind: str | None
    form: PenaltyForm
    execution: Execution
    output: Output
    unsharded: Unsharded

    def call(self, critic: Critic, args: tuple[Any, ...]) -> CriticCall:
        """How the scores are had of a critic, which may have been unwrapped, and its arguments."""
        return CriticCall(critic, args, self.output, self.parts, isinstance(self.critic, DistributedDataParallel))

    def run(self, function: Callable[..., Any], *samples: Tensor) -> Any:
        """``function(critic, *samples, *critic_args)`` under the conditions under which a critic runs."""
        with (
            torch.set_grad_enabled(self.execution.differentiable),
            self.unsharded,
            Float32InPlaceOfFloat16(self.critic, samples[0]) as wide,
        ):
            return through_ddp(function, self.critic, *samples, *wide(self.critic_args))


def request(
    critic: Critic,
    real_samples: Samples,
    fake_samples: Samples | None,
    kind: str | None,
    weight: float,
    target: float,
    norm: str,
    engine: str,
    compile: bool | str,
    critic_args: Sequence[Any],
    output: Output,
) -> Request:
    """The arguments of `lipgan.gradient_penalty`, with its errors; ``kind`` None asks for no penalty."""
    check_no_transform()
    differentiable = torch.is_grad_enabled()
    checked = _remembered if are_plain(kind, weight, target, norm, engine, compile) else _settings
    form, execution = checked(kind, weight, target, norm, engine, compile, differentiable)
    if fake_samples is None and kind in _NEEDS_FAKE:
        raise ValueError(f"fake must be given for kind {kind!r}, got None")
    convert = as_data if engine != "autograd" else _unchanged
    real, parts = join("real", real_samples, convert)
    fake, fake_parts = (None, parts) if fake_samples is None else join("fake", fake_samples, convert)
    check_same_parts(parts, fake_parts)
    check_real_and_fake(real, fake)
    if norm == "pixel" and (real.ndim < 2 or parts is not None):
        shape = f"shape {tuple(real.shape)}" if parts is None else "several tensors"
        raise ValueError(f"real must have a dimension of channels for norm 'pixel', got {shape}")
    check_critic(critic, critic_args)
    if compile == "cudagraph" and real.device.type != "cuda":
        raise ValueError(f"compile 'cudagraph' needs samples on a GPU, got {real.device}")
    unsharded = Unsharded(critic)
    with OutsideOfInferenceMode():
        return Request(
            critic=critic,
            real=clone_if_inference(real).detach(),
            fake=None if fake is None else clone_if_inference(fake).detach(),
            parts=parts,
            critic_args=tuple([clone_if_inference(convert(item)) for item in critic_args]),
            kind=kind,
            form=form,
            execution=execution,
            output=output,
            unsharded=unsharded,
        )


_NUMBERS = (float, int)


def are_plain(kind: Any, weight: Any, target: Any, norm: Any, engine: Any, compile: Any) -> bool:
    """Whether settings, good or bad, are of classes whose values compare and do not change."""
    # Numbers of other classes, tensors among them, may change unseen.
    if type(weight) not in _NUMBERS or type(target) not in _NUMBERS or type(compile) not in (bool, str):
        return False
    for setting in (kind, norm, engine):  # noqa: SIM110 -- all() of a generator takes three times as long
        if type(setting) is not str and setting is not None:
            return False
    return True


def _settings(
    kind: str | None,
    weight: float,
    target: float,
    norm: str,
    engine: str,
    compile: bool | str,
    differentiable: bool,
) -> tuple[PenaltyForm, Execution]:
    """The settings of a request, checked."""
    if kind is not None:
        check_choice("kind", kind, tuple(PENALTY_FORMS))
    check_choice("norm", norm, NORMS)
    check_choice("engine", engine, ENGINES)
    _check_compile(compile, engine)
    weight, target = as_number("weight", weight), as_number("target", target, minimum=0.0)
    form = PenaltyForm("" if kind is None else PENALTY_FORMS[kind], weight, target, norm)
    return form, Execution(engine, compile, differentiable)


# By values and their classes: 1 and True are equal.
_remembered = functools.lru_cache(maxsize=64, typed=True)(_settings)


def _check_compile(compile: bool | str, engine: str) -> None:
    if not isinstance(compile, (bool, str)):
        raise TypeError(f"compile must be a bool or 'cudagraph', got {compile!r}")
    if compile not in COMPILE:
        raise ValueError(f"compile must be one of {', '.join(map(repr, COMPILE))}, got {compile!r}")
    if compile and engine == "autograd":
        raise ValueError(f"compile must be False for engine 'autograd', got {compile!r}")


def _unchanged(item: Any) -> Any:
    return item
