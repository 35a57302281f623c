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

Loss = Callable[[Tensor], Tensor]  # of scores


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
    if engine != "autograd" and _may_be_perceptron(call, form):
        solution = perceptron.solve(call.critic, x, form.kind, form.weight, form.target)
        if solution is not None:
            return with_gradients(*solution) if differentiable else solution[0]
    return _by_engine(call, x, form, engine, differentiable, apart, None)[1]


def loss_and_penalty(
    call: CriticCall,
    x: Tensor,
    form: PenaltyForm,
    engine: str,
    differentiable: bool,
    loss: Loss,
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
    if is_small(call, x, engine):
        engine = "autograd"
    value, result = _by_engine(call, x, form, engine, differentiable, apart, loss)
    assert value is not None
    return value, result


def _by_engine(
    call: CriticCall, x: Tensor, form: PenaltyForm, engine: str, differentiable: bool, apart: bool, loss: Loss | None
) -> tuple[Tensor | None, Tensor]:
    """The loss, None if there is none, and the penalty, by the tape or by autograd."""
    if apart and _coupled.get(call, x) is not None:
        raise CoupledSamples
    try:
        if engine == "autograd" or (engine == "auto" and (_refused.get(call, x) or slower(call, x)) is not None):
            return _autograd(call, x, form, differentiable, apart, loss)
        # A fresh tensor object: the tape hangs on it, and it requires a gradient.
        leaf = x.detach().requires_grad_()
        # Whether the samples are coupled decides how a loss is taken along, too.
        samples = None if loss is None and not apart else SampleTracker(leaf)
        tape = Tape(leaf, samples=samples, until_curved=not apart)
        try:
            return _fused(call, leaf, form, differentiable, tape, apart, loss)
        except CoupledSamples:
            tape.undo.restore()
            raise
        except Unsupported as error:
            tape.undo.restore()
            reason = error.reason
        if engine == "fused":
            raise UnsupportedCriticError(f"engine 'fused' cannot follow the critic: {explain(call, x) or reason}")
        _refused.set(call, x, reason)
        return _autograd(call, x, form, differentiable, apart, loss)
    except CoupledSamples:
        _coupled.set(call, x, "coupled")
        raise


def explain(call: CriticCall, x: Tensor) -> str | None:
    """Why the fused engine cannot follow the critic at the points ``x``, or None if it can."""
    x = x.detach().clone().requires_grad_()
    tape = Tape(x, functools.partial(_running_module, _names(call.critic)))
    try:
        _fused(call, x, PenaltyForm("squared", 1.0, 0.0, "sample"), True, tape, False, None)
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


def _autograd(
    call: CriticCall, x: Tensor, form: PenaltyForm, differentiable: bool, apart: bool, loss: Loss | None
) -> tuple[Tensor | None, Tensor]:
    """The textbook: the gradient as a part of the graph, and autograd's double backward."""
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
        with torch.set_grad_enabled(differentiable):
            value = None if loss is None else loss(scores)
        (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=differentiable, allow_unused=True)
        if gradient is None:
            raise _independent()
        result, _ = gradient_penalty(gradient, form.kind, weight=form.weight, target=form.target, norm=form.norm)
    return value, result if differentiable else result.detach()


def _fused(
    call: CriticCall,
    x: Tensor,
    form: PenaltyForm,
    differentiable: bool,
    tape: Tape,
    apart: bool,
    loss: Loss | None,
) -> tuple[Tensor | None, Tensor]:
    """The tape's: see `lipgan.penalties.tape`."""
    with torch.enable_grad(), EagerMathAttention(), tape:
        scores = call.scores(x)
        output = tape.score(scores)
    if output is None:
        raise _independent()
    if apart and not (tape.samples is not None and tape.samples.apart(scores)):
        raise CoupledSamples
    ones = torch.ones_like(scores, requires_grad=False)
    value: Tensor | None = None
    by_score: Tensor | None = None
    if loss is not None:
        # The loss stays what autograd knows, but for the scores of x: those are a leaf.
        leaf = scores.detach().requires_grad_()
        with torch.set_grad_enabled(differentiable):
            value = loss(leaf)
        if value.requires_grad:
            (by_score,) = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)
    del scores
    return value, _passes(x, form, differentiable, tape, output, ones, by_score)


def _passes(
    x: Tensor,
    form: PenaltyForm,
    differentiable: bool,
    tape: Tape,
    scores: Value,
    ones: Tensor,
    by_score: Tensor | None,
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
    while frame is not None and frame.f_code is not _fused.__code__:
        if frame.f_code is nn.Module._call_impl.__code__:
            module = frame.f_locals["self"]
            return names.get(module, type(module).__name__)
        frame = frame.f_back
    return ""
