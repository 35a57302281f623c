"""A critic's loss as a function of its scores, and what it owes to each of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipgan.objectives import losses
from lipgan.objectives.divergences import widen

Loss = Callable[[Tensor], Tensor]  # of the scores of one batch
LossOfBoth = Callable[[Tensor, Tensor], Tensor]  # of the scores of real and of fake samples


@functools.lru_cache(maxsize=64)
def named(name: str) -> losses.Loss:
    """The loss of `lipgan.losses` called ``name``, with its errors."""
    return losses.get(name)


def own(loss: str | LossOfBoth) -> losses.Loss | None:
    """The loss of `lipgan.losses` that is meant by its name or by its ``critic_loss``; None for any other function."""
    if type(loss) is str:
        return named(loss)
    one: Any = getattr(loss, "__self__", None)
    kind = type(one)
    if kind.__module__ != losses.__name__ or getattr(loss, "__func__", None) is not getattr(kind, "critic_loss", None):
        return None
    known: losses.Loss = one
    return known


def real_and_fake(scores: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The scores of real and of fake samples, which are the first of so many parts of a batch, of equal size.

    There may be more scores than samples, or fewer: those of patches in one dimension.
    """
    n = len(scores) // parts
    return scores[:n], scores[n : 2 * n]


def checked(value: Any) -> Tensor:
    """What a loss returned, with its errors."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 0:
        got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else f"{value!r}"
        raise ValueError(f"loss must return a 0-dim floating-point tensor, got {got}")
    return value


def of_batch(loss: losses.Loss | LossOfBoth, parts: int, note: Callable[[Tensor, Tensor], None]) -> OwnLoss | Loss:
    """A loss, one of `lipgan.losses` or a function, of the scores of a batch: the arguments of `OwnLoss`."""
    return functools.partial(_noted, loss, parts, note) if callable(loss) else OwnLoss(loss, parts, note)


def _noted(loss: LossOfBoth, parts: int, note: Callable[[Tensor, Tensor], None], scores: Tensor) -> Tensor:
    both = real_and_fake(scores, parts)
    note(*both)
    return checked(loss(*both))


class OwnLoss:
    """One of `lipgan.losses` as a function of a batch of scores: it depends on nothing else that autograd follows.

    Args:
        loss: which.
        parts: of the batch, see `real_and_fake`; the loss does not depend on the third.
        note: is told the scores of real and of fake samples at each call.
    """

    def __init__(self, loss: losses.Loss, parts: int, note: Callable[[Tensor, Tensor], None]) -> None:
        self._loss, self._parts, self._note = loss, parts, note

    def __call__(self, scores: Tensor) -> Tensor:
        """The loss."""
        return _noted(self._loss.critic_loss, self._parts, self._note, scores)

    def with_derivative(self, scores: Tensor) -> tuple[Tensor, Tensor] | None:
        """The loss, detached, and its derivative, without autograd; None, and nothing done, where that is not known."""
        derivatives = getattr(self._loss, "critic_derivatives", None)
        if derivatives is None:
            return None
        with torch.no_grad():
            value = self(scores)
            pieces = derivatives(*map(widen, real_and_fake(scores, self._parts)))
            if self._parts > 2:
                pieces = *pieces, torch.zeros_like(scores[2 * (len(scores) // self._parts) :])
            by_score = torch.cat(pieces)
        return value, by_score if by_score.dtype == scores.dtype else by_score.to(scores.dtype)


def loss_by_scores(loss: Loss, scores: Tensor, differentiable: bool) -> tuple[Tensor, Tensor | None]:
    """A loss, which stays what autograd knows but for the scores, and its derivative with respect to them."""
    if isinstance(loss, OwnLoss) and differentiable and (known := loss.with_derivative(scores)) is not None:
        value, derivative = known
        return value.requires_grad_(), derivative
    alone = isinstance(loss, OwnLoss)
    leaf = scores.detach().requires_grad_()
    by_score: Tensor | None = None
    with torch.set_grad_enabled(differentiable):
        value = loss(leaf)
    if value.requires_grad:
        (by_score,) = torch.autograd.grad(value, leaf, retain_graph=not alone, allow_unused=True)
        if alone or _depends_on_alone(value, leaf):
            # Or a backward of the total would go through the loss again, for a derivative that nobody reads.
            value = value.detach().requires_grad_()
    return value, by_score


# Nodes of the graph of a loss that are looked at; larger graphs are those of networks.
_NODES = 64


def _depends_on_alone(value: Tensor, leaf: Tensor) -> bool:
    """Whether a leaf is the only tensor that autograd would hand a gradient of the value; False for a large graph."""
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if len(seen) > _NODES:
            return False
        following = node.next_functions
        # The end of a graph: AccumulateGrad, or a function whose backward is the user's own business.
        if not following and getattr(node, "variable", None) is not leaf:
            return False
        nodes += [function for function, _ in following]
    return True
