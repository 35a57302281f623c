"""Whether a plan serves a critic, and computes what autograd does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from penalty_critics import draws, samples
from torch import Tensor, nn

import lipgan
from lipgan.penalties.tape import Tape

X, FAKE = samples(6, 5), samples(6, 5, seed=8)


def results(critic: Any, module: nn.Module, engine: str, kind: str = "r1", loss: str | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    if loss is None:
        value = lipgan.gradient_penalty(critic, X, FAKE, kind=kind, engine=engine, generator=draws())
    else:
        value = lipgan.critic_loss(critic, X, FAKE, loss, kind=kind, engine=engine, generator=draws()).total
    grads = torch.autograd.grad(value, [*module.parameters()], allow_unused=True)
    return [value.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


def agree(critic: Callable[[], Any], module: nn.Module, **options: Any) -> Tensor:
    """The value by the fused engine, after it has been compared with autograd's.

    Args:
        critic: makes the critic, as a program does at every call.
        module: whose parameters are looked at.
    """
    before = [buffer.clone() for buffer in module.buffers()]
    theirs = results(critic(), module, "autograd", **options)
    after = [buffer.clone() for buffer in module.buffers()]
    for buffer, value in zip(module.buffers(), before, strict=True):
        buffer.copy_(value)
    ours = results(critic(), module, "fused", **options)
    for a, b in zip([*ours, *module.buffers()], [*theirs, *after], strict=True):
        torch.testing.assert_close(a.expand_as(b) if a.ndim == 0 else a, b.expand_as(a), rtol=1e-9, atol=1e-11)
    return ours[0]


def served(critic: Callable[[], Any], module: nn.Module, tapes: list[Tape], **options: Any) -> Tensor:
    """The value, after as many calls as it takes until a plan serves."""
    for _ in range(2):
        agree(critic, module, **options)
    before = len(tapes)
    value = agree(critic, module, **options)
    assert len(tapes) == before, "the tape was run, where a plan was expected"
    return value


def never(critic: Callable[[], Any], module: nn.Module, tapes: list[Tape]) -> None:
    """No plan serves."""
    for _ in range(4):
        before = len(tapes)
        agree(critic, module)
        assert len(tapes) == before + 1, "a plan was run"
