"""What is asked of a penalty: the arguments that its functions share, checked and made ready for the engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import as_number, check_choice, check_critic, check_real_and_fake
from lipgan._choices import PENALTY_FORMS
from lipgan.ops.gradient_penalty import NORMS
from lipgan.penalties import engines
from lipgan.penalties.conditions import Unsharded, as_data, clone_if_inference
from lipgan.penalties.critic_call import Critic
from lipgan.penalties.engines import PenaltyForm
from lipgan.penalties.parts import Parts, Samples, check_same_parts, join

_NEEDS_FAKE = ("wgan-gp", "lp", "max", "r2", "r1+r2")


@dataclass(frozen=True)
class Request:
    """Samples ``[B, ...]`` and arguments of a critic, and the penalty that is wanted.

    Attributes:
        real, fake: detached.
        parts: what they consist of; None for one tensor.
        critic_args: after the samples.
        form: of the penalty; None for none.
        differentiable: whether a backward is wanted beside the values.
        unsharded: to be entered while the critic runs.
    """

    real: Tensor
    fake: Tensor | None
    parts: Parts | None
    critic_args: tuple[Any, ...]
    form: PenaltyForm | None
    differentiable: bool
    unsharded: Unsharded


def request(
    critic: Critic,
    real_samples: Samples,
    fake_samples: Samples | None,
    kind: str | None,
    weight: float,
    target: float,
    norm: str,
    engine: str,
    critic_args: Sequence[Any],
) -> Request:
    """The arguments of `lipgan.gradient_penalty`, with its errors; ``kind`` None asks for no penalty."""
    if kind is not None:
        check_choice("kind", kind, tuple(PENALTY_FORMS))
    check_choice("norm", norm, NORMS)
    check_choice("engine", engine, engines.NAMES)
    weight, target = as_number("weight", weight), as_number("target", target, minimum=0.0)
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
    unsharded = Unsharded(critic)
    differentiable = torch.is_grad_enabled()
    with torch.inference_mode(False):
        return Request(
            real=clone_if_inference(real).detach(),
            fake=None if fake is None else clone_if_inference(fake).detach(),
            parts=parts,
            critic_args=tuple(clone_if_inference(convert(item)) for item in critic_args),
            form=None if kind is None else PenaltyForm(PENALTY_FORMS[kind], weight, target, norm),
            differentiable=differentiable,
            unsharded=unsharded,
        )


def _unchanged(item: Any) -> Any:
    return item
