"""The scores of a critic and its penalty, in a graph that has the loss of the scores in it: `lipgan.critic_loss` with
a loss that is a function.

The loss is the caller's own code, which torch.compile traces: it may depend on whatever that code can see. So what it
owes to the scores is known in the backward of the graph only, while eager calls ask for it in the middle of their
passes. The operation of the forward gives scores, penalty and buffers; that of the backward takes the same step once
more, from the same buffers and random states, with the linear loss that has the derivatives that have come: for each
score `r_i` and `f_i` those are numbers, and the gradient of `sum_i a_i r_i + sum_i b_i f_i` is what the loss
hands to the parameters. Both are functions without side effects, and neither leaves anything behind for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan._dtypes import accumulation_dtype
from lipgan.penalties.traced import AsTraced, distinct, fake_grads, fake_scores, operation

_library = torch.library.Library("lipgan", "FRAGMENT")  # type: ignore[no-untyped-call]
_GIVEN = "Tensor real, Tensor fake, Tensor[] args, Tensor[] parameters, Tensor[] buffers, float[] numbers, int task"
_library.define(  # type: ignore[no-untyped-call]
    f"critic_scores({_GIVEN}, float weight, float target) -> Tensor[]",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
_library.define(  # type: ignore[no-untyped-call]
    f"critic_scores_backward({_GIVEN}, Tensor[] states, Tensor by_penalty, Tensor by_real, Tensor by_fake, "
    "float weight, float target) -> Tensor[]",
    tags=(torch.Tag.cudagraph_unsafe,),
)

_N_VALUES = 3  # penalty, scores of real and of fake samples
_PENALTY = 2  # its place in a `CriticLoss`, before the scores


class OfScores(torch.autograd.Function):
    """Penalty and scores, and what the critic's buffers become; takes the arguments of `traced.WithGradients`."""

    @staticmethod
    def forward(
        ctx: Any,
        task: int,
        weight: float,
        target: float,
        differentiable: bool,
        n_args: int,
        n_buffers: int,
        numbers: list[float],
        real: Tensor,
        fake: Tensor,
        *tensors: Tensor,
    ) -> Any:
        args, buffers = tensors[:n_args], tensors[n_args : n_args + n_buffers]
        parameters = tensors[n_args + n_buffers :]
        results = torch.ops.lipgan.critic_scores(real, fake, args, parameters, buffers, numbers, task, weight, target)
        values, changed = results[:_N_VALUES], results[_N_VALUES : _N_VALUES + n_buffers]
        # The buffers themselves are about to change, and copies that are made here would be made when they have.
        before, states = (
            results[_N_VALUES + n_buffers : _N_VALUES + 2 * n_buffers],
            results[_N_VALUES + 2 * n_buffers :],
        )
        ctx.save_for_backward(real, fake, *args, *before, *parameters, *states)
        ctx.sizes = n_args, n_buffers, len(parameters)
        ctx.settings = numbers, task, weight, target
        ctx.mark_non_differentiable(*changed)
        return (*values, *changed)

    @staticmethod
    def backward(ctx: Any, by_penalty: Tensor, by_real: Tensor, by_fake: Tensor, *others: Any) -> Any:
        n_args, n_buffers, n_parameters = ctx.sizes
        numbers, task, weight, target = ctx.settings
        real, fake, *tensors = ctx.saved_tensors
        args, buffers = tensors[:n_args], tensors[n_args : n_args + n_buffers]
        parameters = tensors[n_args + n_buffers : n_args + n_buffers + n_parameters]
        states = tensors[n_args + n_buffers + n_parameters :]
        found = torch.ops.lipgan.critic_scores_backward(
            *(real, fake, args, parameters, buffers, numbers, task),
            *(states, by_penalty, by_real, by_fake, weight, target),
        )
        needed = ctx.needs_input_grad[9 + n_args + n_buffers :]
        grads = [g if need else None for g, need in zip(found, needed, strict=True)]
        return (*[None] * (9 + n_args + n_buffers), *grads)


# ---- outside of the graph ----


def _generators(own: torch.Generator | None, x: Tensor) -> list[torch.Generator]:
    """Those that a step may draw from: the caller's, that of the process, and that of the samples' GPU."""
    found = [torch.default_generator] if own is None else [torch.default_generator, own]
    return [*found, torch.cuda.default_generators[x.get_device()]] if x.is_cuda else found


def _scores(
    real: Tensor,
    fake: Tensor,
    args: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    numbers: list[float],
    key: int,
    weight: float,
    target: float,
) -> list[Tensor]:
    """Penalty, scores of real and of fake samples, buffers, and what both they and the generators began with."""
    with AsTraced(key, parameters, buffers, real.device.type, differentiable=False) as traced:
        task = traced.task
        states = [generator.get_state() for generator in _generators(task.generator, real)]
        step = task.run(
            *(traced.critic, real, fake, task.arguments(args, numbers), weight, target, task.generator),
            lambda real_scores, fake_scores: real_scores.new_zeros(()),
            True,
        )
        changed = traced.buffers()
    dtype = accumulation_dtype(torch.promote_types(real.dtype, fake.dtype))
    penalty, real_scores, fake_scores = step[_PENALTY:]
    before = [buffer.clone() for buffer in buffers]
    return distinct([penalty.to(dtype), real_scores, fake_scores, *changed, *before, *states])


def _scores_backward(
    real: Tensor,
    fake: Tensor,
    args: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    numbers: list[float],
    key: int,
    states: list[Tensor],
    by_penalty: Tensor,
    by_real: Tensor,
    by_fake: Tensor,
    weight: float,
    target: float,
) -> list[Tensor]:
    """A gradient for each parameter, of no elements for those that require none."""
    # The penalty's gradients and the loss's are made together, and share this factor, which is 1 but for a scaled loss.
    factor = by_penalty.item()
    penalized = factor != 0.0

    def along(scores: Tensor, by_score: Tensor) -> Tensor:
        return (scores * (by_score / factor if penalized and factor != 1.0 else by_score).to(scores.dtype)).sum()

    with AsTraced(key, parameters, buffers, real.device.type, differentiable=True) as traced:
        task, leaves = traced.task, traced.leaves
        generators = _generators(task.generator, real)
        now = [generator.get_state() for generator in generators]
        try:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            total = task.run(
                *(traced.critic, real, fake, task.arguments(args, numbers), weight, target, task.generator),
                lambda real_scores, fake_scores: along(real_scores, by_real) + along(fake_scores, by_fake),
                penalized,
            )[0]
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if total.requires_grad and leaves:
                along_total = by_penalty.to(total.dtype) if penalized else None
                found = torch.autograd.grad(total, leaves, along_total, allow_unused=True)
        finally:
            for generator, state in zip(generators, now, strict=True):
                generator.set_state(state)
    return distinct(traced.by_parameter(found))


def _fake(
    real: Tensor,
    fake: Tensor,
    args: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    numbers: list[float],
    key: int,
    weight: float,
    target: float,
) -> list[Tensor]:
    task, critic = operation(key)
    dtype = torch.promote_types(real.dtype, fake.dtype)
    scores = fake_scores(task, critic, [real.to(dtype), fake.to(dtype)], args, parameters, buffers, numbers)
    penalty = real.new_empty((), dtype=accumulation_dtype(dtype))
    sizes = [generator.get_state().numel() for generator in _generators(task.generator, real)]
    states = [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes]
    return [penalty, *scores, *map(torch.empty_like, [*buffers, *buffers]), *states]


def _fake_backward(
    real: Tensor, fake: Tensor, args: list[Tensor], parameters: list[Tensor], *others: Any
) -> list[Tensor]:
    key = others[2]
    return fake_grads(operation(key)[0], parameters)


for _name, _implementation, _meta in (
    ("critic_scores", _scores, _fake),
    ("critic_scores_backward", _scores_backward, _fake_backward),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lipgan::{_name}", _meta, lib=_library)
