"""A penalty whose gradients are known before its backward, which then only scales them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan._dtypes import accumulation_dtype


def with_gradients(value: Tensor, parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """``value`` as a function of the parameters whose derivatives are ``grads``, None for zeros.

    ``value`` is a tensor that was made for it, and becomes the result.
    """
    if not parameters:
        return value
    # In a tuple autograd does not take it for an input, of which it would make a view, or we a copy.
    return PrecomputedGradients.apply((value,), grads, *parameters)  # type: ignore[no-any-return, no-untyped-call]


def with_zeros(value: Tensor, scores: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """``value``, which also has a gradient of zeros for the parameters that the scores depend on, such as biases.

    DistributedDataParallel waits for a gradient of each parameter, or takes one that the output of a forward pass does
    not depend on for ready, and fails where another forward pass of the step has a gradient for it.
    """
    # Where graphs end there is a node for each leaf.
    nodes, seen = [scores.grad_fn], set()
    leaves: set[int] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        nodes += [function for function, _ in node.next_functions]
    for parameter in parameters:
        if id(parameter) in leaves:
            value = value + parameter[None][:0].sum().to(value)
    return value


class PrecomputedGradients(torch.autograd.Function):
    """A value whose derivatives are known; its backward only scales them."""

    @staticmethod
    def forward(ctx: Any, value: tuple[Tensor], grads: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.dtypes = [p.dtype for p in parameters]
        # Whether the gradients are what a backward of 1 hands out.
        ctx.ready = ctx.dtypes == [None if grad is None else grad.dtype for grad in grads]
        # Zeros are made when they are asked for.
        ctx.like = None if ctx.ready else [p if g is None else None for p, g in zip(parameters, grads, strict=True)]
        # What autograd holds it frees after the backward, with its error for a second one.
        ctx.save_for_backward(*grads)
        return value[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True cannot serve a gradient penalty of engine 'fused', whose backward is not "
                "differentiable; use engine='autograd'"
            )
        unchanged = _is_one(grad)
        needed = ctx.needs_input_grad[2:]
        if unchanged and ctx.ready and all(needed):
            return None, None, *ctx.saved_tensors
        products: list[Tensor | None] = []
        together: dict[int, Tensor] = {}
        like = ctx.like or [None] * len(needed)
        for g, p, dtype, need in zip(ctx.saved_tensors, like, ctx.dtypes, needed, strict=True):
            if need and g is not None and g.dtype == dtype == grad.dtype and not unchanged:
                together[len(products)] = g
                products.append(None)
            elif not need:
                products.append(None)
            elif g is None:
                products.append(torch.zeros_like(p))
            elif unchanged and g.dtype == dtype:
                products.append(g)
            else:
                products.append(scaled(g, grad, dtype))
        if together:
            for i, product in zip(together, _all_scaled([*together.values()], grad), strict=True):
                products[i] = product
        return None, None, *products


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient times a factor, in the dtype of the parameter."""
    # Widened first: the factor of a GradScaler is beyond float16.
    product = (grad if grad.dtype == factor.dtype else grad.to(accumulation_dtype(grad.dtype))) * factor
    return product if product.dtype == dtype else product.to(dtype)


def _all_scaled(grads: list[Tensor], factor: Tensor) -> Sequence[Tensor]:
    """All of one dtype times a factor, in one launch where that can be."""
    try:
        return torch._foreach_mul(grads, factor)
    except RuntimeError:  # one of a batch of factors, under torch.func.vmap, which has no rule for lists
        return [grad * factor for grad in grads]


def _is_one(grad: Tensor) -> bool:
    """Whether a factor is known to be 1, without waiting for an accelerator."""
    if grad.device.type != "cpu":
        return False
    try:
        return grad.item() == 1.0
    except RuntimeError:  # one of a batch of factors, under torch.func.vmap
        return False
