"""The engines: a penalty and its derivatives by autograd's double backward, by the tape, or in closed form."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn

from lipgan.ops.gradient_penalty import gradient_penalty, penalize
from lipgan.penalties import perceptron
from lipgan.penalties import rules as _rules  # noqa: F401  (fills the table of the tape)
from lipgan.penalties.conditions import EagerMathAttention
from lipgan.penalties.coupling import CoupledSamples, SampleTracker, Watched
from lipgan.penalties.critic_call import Critic, CriticCall
from lipgan.penalties.memory import CriticMemory
from lipgan.penalties.precomputed import with_gradients
from lipgan.penalties.tape import Tape, Unsupported, Value

NAMES = ("auto", "fused", "autograd")


class UnsupportedCriticError(RuntimeError):
    """The fused engine was asked for by name and cannot follow the critic; the message names the module."""


@dataclass(frozen=True)
class PenaltyForm:
    """A penalty as a function of the critic's gradients: the arguments of the op ``gradient_penalty``."""

    kind: str
    weight: float
    target: float
    norm: str


# Why a critic is served by autograd: to try the tape again would cost a forward pass each time.
_refused = CriticMemory()
# Which critics couple the samples of a batch: to try both halves in one would cost a forward pass each time.
_coupled = CriticMemory()


def penalty(
    call: CriticCall, x: Tensor, form: PenaltyForm, engine: str, differentiable: bool, *, apart: bool = False
) -> Tensor:
    """The penalty of a critic at the points ``x``.

    Args:
        x: ``[B, ...]``.
        engine: one of `NAMES`.
        differentiable: whether a backward is wanted beside the value.
        apart: whether the samples must not see each other.

    Raises:
        CoupledSamples: ``apart``, and a critic whose score of a sample depends on the others. Nothing has changed then.
    """
    if apart and _coupled.get(call, x) is not None:
        raise CoupledSamples
    try:
        return _penalty(call, x, form, engine, differentiable, apart)
    except CoupledSamples:
        _coupled.set(call, x, "coupled")
        raise


def _penalty(call: CriticCall, x: Tensor, form: PenaltyForm, engine: str, differentiable: bool, apart: bool) -> Tensor:
    if engine == "autograd" or (engine == "auto" and (_refused.get(call, x) or slower(call, x)) is not None):
        return _autograd(call, x, form, differentiable, apart)[1]
    if _may_be_perceptron(call, form):
        solution = perceptron.solve(call.critic, x, form.kind, form.weight, form.target)
        if solution is not None:
            return with_gradients(*solution) if differentiable else solution[0]
    # A fresh tensor object: the tape hangs on it, and it requires a gradient.
    x = x.detach().requires_grad_()
    tape = Tape(x, samples=SampleTracker(x) if apart else None)
    try:
        return _fused(call, x, form, differentiable, tape)
    except CoupledSamples:
        tape.undo.restore()
        raise
    except Unsupported as error:
        tape.undo.restore()
        reason = error.reason
    if engine == "fused":
        raise UnsupportedCriticError(f"engine 'fused' cannot follow the critic: {explain(call, x) or reason}")
    _refused.set(call, x.detach(), reason)
    return _autograd(call, x.detach(), form, differentiable, apart)[1]


def explain(call: CriticCall, x: Tensor) -> str | None:
    """Why the fused engine cannot follow the critic at the points ``x``, or None if it can."""
    x = x.detach().clone().requires_grad_()
    tape = Tape(x, functools.partial(_running_module, _names(call.critic)))
    try:
        _fused(call, x, PenaltyForm("squared", 1.0, 0.0, "sample"), True, tape)
    except Unsupported as error:
        return f"module {error.module!r}: {error.reason}" if error.module else error.reason
    finally:
        tape.undo.restore()
    return None


def slower(call: CriticCall, x: Tensor) -> str | None:
    """Why engine "auto" takes autograd for a critic that the fused engine may well follow, or None if it does not.

    The steps of a recurrent layer are many small operations, each of which costs the tape some Python.
    """
    if x.device.type != "cpu" or not isinstance(call.critic, nn.Module):
        return None
    for module in call.critic.modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return (
                f"module {_names(call.critic)[module]!r}: engine 'auto' takes autograd, which is faster for recurrent "
                "layers on a CPU; engine 'fused' can be asked for by name"
            )
    return None


def in_closed_form(call: CriticCall, x: Tensor, form: PenaltyForm, engine: str) -> bool:
    """Whether `penalty` takes the closed form, for a critic whose scores come from one forward pass as from another."""
    return engine != "autograd" and _may_be_perceptron(call, form) and perceptron.serves(call.critic, x)


def _may_be_perceptron(call: CriticCall, form: PenaltyForm) -> bool:
    return not call.args and call.output is None and call.parts is None and form.norm == "sample"


# Multiplications of a forward pass, below which Python takes the tape more time than double backward takes: perceptrons
# 256-256-256-1 of 256 samples break even on two cores.
_SMALL = 2**25


def is_small(call: CriticCall, x: Tensor, engine: str) -> bool:
    """Whether engine "auto" takes autograd for a loss with its penalty: for a small perceptron, where it is faster."""
    if engine != "auto" or x.device.type != "cpu" or not isinstance(call.critic, nn.Module):
        return False
    rows = x.shape[0] * (x.shape[1] if x.ndim == 3 else 1)
    work = 0
    for parameter in call.critic.parameters():
        if parameter.ndim > 2:  # a convolution takes its weights to every place of an image
            return False
        work += rows * parameter.numel()
    return work < _SMALL


def loss_and_penalty(
    call: CriticCall,
    x: Tensor,
    form: PenaltyForm,
    engine: str,
    differentiable: bool,
    loss: Callable[[Tensor], Tensor],
    *,
    apart: bool = False,
) -> tuple[Tensor, Tensor]:
    """A loss of the scores of ``x``, and the penalty there, from one forward pass.

    Args:
        loss: a function of the scores; it is called again where the engine has to be changed.
        Others as for `penalty`.

    Returns:
        Two 0-dim tensors, whose sum has the gradients of both: the fused engine hands out those that the loss owes to
        the scores of x with those of the penalty.

    Raises:
        CoupledSamples: as for `penalty`.
    """
    if apart and _coupled.get(call, x) is not None:
        raise CoupledSamples
    try:
        return _loss_and_penalty(call, x, form, engine, differentiable, loss, apart)
    except CoupledSamples:
        _coupled.set(call, x, "coupled")
        raise


def _loss_and_penalty(
    call: CriticCall,
    x: Tensor,
    form: PenaltyForm,
    engine: str,
    differentiable: bool,
    loss: Callable[[Tensor], Tensor],
    apart: bool,
) -> tuple[Tensor, Tensor]:
    by_autograd = engine == "auto" and (_refused.get(call, x) or slower(call, x)) is not None
    by_autograd = by_autograd or is_small(call, x, engine)
    if engine == "autograd" or by_autograd:
        return _autograd(call, x, form, differentiable, apart, loss)
    x = x.detach().requires_grad_()
    tape = Tape(x, samples=SampleTracker(x), until_curved=not apart)
    try:
        return _fused_with_loss(call, x, form, differentiable, tape, loss, apart)
    except CoupledSamples:
        tape.undo.restore()
        raise
    except Unsupported as error:
        tape.undo.restore()
        reason = error.reason
    if engine == "fused":
        raise UnsupportedCriticError(f"engine 'fused' cannot follow the critic: {explain(call, x) or reason}")
    _refused.set(call, x.detach(), reason)
    return _autograd(call, x.detach(), form, differentiable, apart, loss)


def _no_loss(scores: Tensor) -> Tensor:
    return scores.new_zeros(())


def _autograd(
    call: CriticCall,
    x: Tensor,
    form: PenaltyForm,
    differentiable: bool,
    apart: bool,
    loss: Callable[[Tensor], Tensor] = _no_loss,
) -> tuple[Tensor, Tensor]:
    """The textbook: the gradient as a part of the graph, and autograd's double backward; the loss and the penalty."""
    x = x.detach().requires_grad_()
    watched = Watched(x) if apart else None
    with torch.enable_grad():
        with EagerMathAttention(), watched or nullcontext():
            # A view: hooks that wait for the gradients of a module's inputs, as FlopCounterMode's, take no leaf.
            scores = call.scores(x.view_as(x))
        if not scores.requires_grad:
            raise _independent()
        if watched is not None and not watched.samples.apart(scores):
            watched.undo.restore()
            raise CoupledSamples
        value = loss(scores)
        (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=differentiable, allow_unused=True)
        if gradient is None:
            raise _independent()
        result, _ = gradient_penalty(gradient, form.kind, weight=form.weight, target=form.target, norm=form.norm)
    return (value, result) if differentiable else (value.detach(), result.detach())


def _recorded(call: CriticCall, x: Tensor, tape: Tape) -> tuple[Tensor, Value]:
    """The scores of x, and their value on the tape."""
    with torch.enable_grad(), EagerMathAttention(), tape:
        scores = call.scores(x)
        value = tape.score(scores)
    if value is None:
        raise _independent()
    return scores, value


def _fused(call: CriticCall, x: Tensor, form: PenaltyForm, differentiable: bool, tape: Tape) -> Tensor:
    """The tape's: see `lipgan.penalties.tape`."""
    scores, value = _recorded(call, x, tape)
    if tape.samples is not None and not tape.samples.apart(scores):
        raise CoupledSamples
    ones = torch.ones_like(scores, requires_grad=False)
    del scores
    return _passes(x, form, differentiable, tape, value, ones)


def _fused_with_loss(
    call: CriticCall,
    x: Tensor,
    form: PenaltyForm,
    differentiable: bool,
    tape: Tape,
    loss: Callable[[Tensor], Tensor],
    apart: bool,
) -> tuple[Tensor, Tensor]:
    scores, value = _recorded(call, x, tape)
    if apart and (tape.samples is None or not tape.samples.apart(scores)):
        raise CoupledSamples
    ones = torch.ones_like(scores, requires_grad=False)
    # The loss stays what autograd knows, but for the scores of x: those are a leaf.
    scores = scores.detach().requires_grad_()
    with torch.set_grad_enabled(differentiable):
        of_loss = loss(scores)
    by_score: Tensor | None = None
    if differentiable and of_loss.requires_grad:
        (by_score,) = torch.autograd.grad(of_loss, scores, retain_graph=True, allow_unused=True)
    return of_loss, _passes(x, form, differentiable, tape, value, ones, by_score)


def _passes(
    x: Tensor,
    form: PenaltyForm,
    differentiable: bool,
    tape: Tape,
    scores: Value,
    ones: Tensor,
    by_score: Tensor | None = None,
) -> Tensor:
    """The penalty, with its gradients, and those of a loss whose derivative by the scores is given."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        gradient = tape.backward(scores, ones, loss=by_score is not None)
        if gradient is None:
            raise _independent()
        result, _, cotangent = penalize(gradient, form.kind, form.weight, form.target, form.norm)
        del gradient
        if differentiable:
            tape.differentiate(cotangent, scores, by_score)
    if not differentiable:
        return result
    parameter_gradients = tape.parameter_gradients.values()
    return with_gradients(
        result,
        [parameter_gradient.tensor for parameter_gradient in parameter_gradients],
        [parameter_gradient.grad for parameter_gradient in parameter_gradients],
    )


def _independent() -> ValueError:
    return ValueError("critic must return scores that depend on the samples, got scores that do not (detached?)")


# ---- names of modules, for messages ----


def _names(critic: Critic) -> dict[nn.Module, str]:
    modules = critic.named_modules() if isinstance(critic, nn.Module) else ()
    return {module: f"{name or '(the critic itself)'} ({type(module).__name__})" for name, module in modules}


def _running_module(names: dict[nn.Module, str]) -> str:
    """The name of the innermost module of the critic that runs, "" for none. Slow: it looks through the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _recorded.__code__:
        if frame.f_code is nn.Module._call_impl.__code__:
            module = frame.f_locals["self"]
            return names.get(module, type(module).__name__)
        frame = frame.f_back
    return ""
