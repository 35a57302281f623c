"""The engines: a penalty and its derivatives by autograd's double backward, by the tape, or in closed form."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lipgan._dtypes import accumulation_dtype
from lipgan.ops.gradient_penalty import gradient_penalty, penalize
from lipgan.penalties import perceptron
from lipgan.penalties import rules as _rules  # noqa: F401  (fills the table of the tape)
from lipgan.penalties.conditions import Plainly
from lipgan.penalties.tape import Tape, Unsupported

Critic = Callable[..., Any]
Output = int | str | Callable[[Any], Tensor] | None

NAMES = ("auto", "fused", "autograd")


class UnsupportedCriticError(RuntimeError):
    """The fused engine was asked for by name and cannot follow the critic; the message names the module."""


@dataclass(frozen=True)
class Form:
    """A penalty as a function of the critic's gradients: the arguments of the op ``gradient_penalty``."""

    kind: str
    weight: float
    target: float
    norm: str


@dataclass(frozen=True)
class Call:
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


# Why a critic is served by autograd, once that is known: trying again would cost a forward pass each time.
_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def penalty(call: Call, x: Tensor, form: Form, engine: str, differentiable: bool) -> Tensor:
    """The penalty of a critic at the points ``x``.

    Args:
        x: ``[B, ...]``.
        engine: one of `NAMES`.
        differentiable: whether a backward is wanted beside the value.
    """
    critic = call.critic
    module = critic if isinstance(critic, nn.Module) else None
    if engine == "autograd" or (engine == "auto" and module is not None and module in _refused):
        return _autograd(call, x, form, differentiable)
    if not call.args and call.output is None and form.norm == "sample":
        solution = perceptron.solve(critic, x, form.kind, form.weight, form.target)
        if solution is not None:
            return _with_gradients(*solution) if differentiable else solution[0]
    # A fresh tensor object: the tape hangs on it, and it requires a gradient.
    x = x.detach().requires_grad_()
    tape = Tape(x)
    try:
        return _fused(call, x, form, differentiable, tape)
    except Unsupported as error:
        tape.undo()
        reason = error.reason
    if engine == "fused":
        raise UnsupportedCriticError(f"engine 'fused' cannot follow the critic: {explain(call, x) or reason}")
    if module is not None and torch._C._len_torch_dispatch_stack() == 0:  # a mode such as a counter may be the reason
        _refused[module] = reason
    return _autograd(call, x.detach(), form, differentiable)


def explain(call: Call, x: Tensor) -> str | None:
    """Why the fused engine cannot follow the critic at the points ``x``, or None if it can."""
    x = x.detach().clone().requires_grad_()
    tape = Tape(x, functools.partial(_running_module, _names(call.critic)))
    try:
        _fused(call, x, Form("squared", 1.0, 0.0, "sample"), True, tape)
    except Unsupported as error:
        return f"module {error.module!r}: {error.reason}" if error.module else error.reason
    finally:
        tape.undo()
    return None


def _autograd(call: Call, x: Tensor, form: Form, differentiable: bool) -> Tensor:
    """The textbook: the gradient as a part of the graph, and autograd's double backward."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        with Plainly():
            # A view: hooks that wait for the gradients of a module's inputs, as FlopCounterMode's, take no leaf.
            scores = call.scores(x.view_as(x))
        if not scores.requires_grad:
            raise _independent()
        (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=differentiable, allow_unused=True)
        if gradient is None:
            raise _independent()
        result, _ = gradient_penalty(gradient, form.kind, weight=form.weight, target=form.target, norm=form.norm)
    return result if differentiable else result.detach()


def _fused(call: Call, x: Tensor, form: Form, differentiable: bool, tape: Tape) -> Tensor:
    """The tape's: see `lipgan.penalties.tape`."""
    with torch.enable_grad(), Plainly(), tape:
        scores = call.scores(x)
        value = tape.score(scores)
    if value is None:
        raise _independent()
    ones = torch.ones_like(scores, requires_grad=False)
    del scores
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        gradient = tape.backward(value, ones)
        if gradient is None:
            raise _independent()
        result, _, cotangent = penalize(gradient, form.kind, form.weight, form.target, form.norm)
        del gradient
        if differentiable:
            tape.differentiate(cotangent)
    if not differentiable:
        return result
    sinks = tape.sinks.values()
    return _with_gradients(result, [sink.tensor for sink in sinks], [sink.grad for sink in sinks])


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


def _independent() -> ValueError:
    return ValueError("critic must return scores that depend on the samples, got scores that do not (detached?)")


# ---- a penalty whose derivatives are known ----


def _with_gradients(value: Tensor, parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """``value`` as a function of the parameters whose derivatives are ``grads``, None for zeros."""
    if not parameters:
        return value
    return Ready.apply(value, len(parameters), *parameters, *grads)  # type: ignore[no-any-return, no-untyped-call]


class Ready(torch.autograd.Function):
    """A value whose derivatives are known; its backward only scales them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, n: int, *tensors: Tensor | None) -> Tensor:
        parameters, grads = tensors[:n], tensors[n:]
        # Zeros are made when they are asked for.
        ctx.like = [None if grad is not None else p for p, grad in zip(parameters, grads, strict=True)]
        ctx.dtypes = [p.dtype for p in parameters if p is not None]
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True cannot serve a gradient penalty of engine 'fused', whose backward is not "
                "differentiable; use engine='autograd'"
            )
        unchanged = _is_one(grad)
        scaled: list[Tensor | None] = []
        for g, p, dtype, need in zip(ctx.saved_tensors, ctx.like, ctx.dtypes, ctx.needs_input_grad[2:], strict=False):
            if not need:
                scaled.append(None)
            elif g is None:
                scaled.append(torch.zeros_like(p))
            elif unchanged and g.dtype == dtype:
                scaled.append(g)
            else:
                # Widened first: the factor of a GradScaler is beyond float16.
                product = (g if g.dtype == grad.dtype else g.to(accumulation_dtype(g.dtype))) * grad
                scaled.append(product if product.dtype == dtype else product.to(dtype))
        return (None, None, *scaled, *[None] * len(scaled))


def _is_one(grad: Tensor) -> bool:
    """Whether a factor is known to be 1, without waiting for an accelerator."""
    if grad.device.type != "cpu":
        return False
    try:
        return grad.item() == 1.0
    except RuntimeError:  # one of a batch of factors, under torch.func.vmap
        return False


# ---- names of modules, for messages ----


def _names(critic: Critic) -> dict[nn.Module, str]:
    modules = critic.named_modules() if isinstance(critic, nn.Module) else ()
    return {module: f"{name or '(the critic itself)'} ({type(module).__name__})" for name, module in modules}


def _running_module(names: dict[nn.Module, str]) -> str:
    """The name of the innermost module of the critic that runs, "" for none. Slow: it looks through the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _fused.__code__:
        if frame.f_code is nn.Module._call_impl.__code__:
            module = frame.f_locals["self"]
            return names.get(module, type(module).__name__)
        frame = frame.f_back
    return ""
