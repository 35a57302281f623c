"""How a weight lies in memory, in the two integers that the kernels take.

The memory of a dense weight is ``[outer, h, inner]``, with h the rows of its matrix ``[h, w]`` and
``w = outer * inner``: row i of memory column m lies at ``i * inner + m // inner * h * inner + m % inner``. The entry of
v that belongs to memory column m is ``m % channels * (w // channels) + m // channels``.

==========================  ================  =========  ========
weight                      memory            inner      channels
==========================  ================  =========  ========
contiguous, dim 0           ``[O, C * K]``    w          w
channels last, dim 0        ``[O, K, C]``     w          C
contiguous, dim 1           ``[I, O, K]``     K          w
channels last, dim 1        ``[I, K, O]``     1          w
==========================  ================  =========  ========
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


@functools.lru_cache(maxsize=1024)
def _memory_order(shape: tuple[int, ...], strides: tuple[int, ...], dim: int) -> tuple[int, int] | None:
    w = math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])
    if 0 in shape:
        return w, w
    # The dimensions from the outermost to the innermost; the stride of a size of 1 says nothing.
    lying = sorted((d for d, size in enumerate(shape) if size > 1), key=lambda d: -strides[d])
    step = 1
    for d in reversed(lying):
        if strides[d] != step:
            return None
        step *= shape[d]
    columns = [d for d in lying if d != dim]
    inner = math.prod(shape[d] for d in lying[lying.index(dim) + 1 :]) if dim in lying else w
    natural = sorted(columns)
    if columns == natural:
        return inner, w
    first = natural.index(columns[0])
    if inner < w or columns != natural[first:] + natural[:first]:
        return None
    return w, math.prod(shape[d] for d in natural[:first])


def memory_order(weight: Tensor, dim: int) -> tuple[int, int] | None:
    """``(inner, channels)`` of a weight whose rows are its dimension ``dim``, or None where no such pair describes it.

    At most one of them is below w. Weights of one shape and ``dim`` that have the same pair lie alike. An empty weight
    has ``(w, w)``.

    Args:
        weight: of at least one dimension.
        dim: not negative.
    """
    return _memory_order(weight.shape, weight.stride(), dim)


# (dim, inner, channels) of each weight; None where each is contiguous and its rows are dimension 0.
Layouts = tuple[tuple[int, int, int], ...] | None


def are_contiguous(tensors: Sequence[Tensor]) -> bool:
    for tensor in tensors:  # noqa: SIM110 -- all() of a generator takes three times as long
        if not tensor.is_contiguous():
            return False
    return True


def layouts_of(tensors: Sequence[Tensor], dims: Sequence[int]) -> tuple[Sequence[Tensor], Layouts]:
    """``tensors`` and how they lie; in place of one that no layout describes a copy that is contiguous."""
    if not any(dims) and are_contiguous(tensors):
        return tensors, None
    lying, layouts = list(tensors), []
    for layer, dim in enumerate(dims):
        order = memory_order(lying[layer], dim)
        if order is None:
            lying[layer] = lying[layer].contiguous()
            order = memory_order(lying[layer], dim)
            assert order is not None
        layouts.append((dim, *order))
    return lying, tuple(layouts)


def laid_alike(tensors: Sequence[Tensor], lying: Sequence[Tensor], layouts: Layouts) -> list[Tensor]:
    """Gradients of Y, or by dW, where they lie as their Y does, else copies that do."""
    if layouts is None:
        return [tensor.contiguous() for tensor in tensors]
    return [
        tensor if memory_order(tensor, dim) == tuple(order) else torch.empty_like(y).copy_(tensor)
        for tensor, y, (dim, *order) in zip(tensors, lying, layouts, strict=True)
    ]


def as_lying(results: list[Tensor], tensors: Sequence[Tensor], lying: Sequence[Tensor]) -> list[Tensor]:
    """Results that lie as ``lying``, in the memory format of ``tensors``."""
    if lying is tensors:
        return results
    return [
        result if copy is tensor else torch.empty_like(tensor).copy_(result)
        for result, tensor, copy in zip(results, tensors, lying, strict=True)
    ]
