"""The engines: a penalty and its derivatives by autograd's double backward, by the tape, or in closed form."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lipgan.ops.gradient_penalty import gradient_penalty, penalize
from lipgan.penalties import plans
from lipgan.penalties import rules as _rules  # noqa: F401  (fills the table of the tape)
from lipgan.penalties.conditions import (
    EagerMathAttention,
    FreshCasts,
    check_not_dual,
    hooks_may_change,
    without_function_modes,
)
from lipgan.penalties.coupling import CoupledSamples, SampleTracker, Watched
from lipgan.penalties.critic_call import Critic, CriticCall
from lipgan.penalties.loss_of_scores import Loss, OwnLoss, loss_by_scores
from lipgan.penalties.memory import CriticMemory
from lipgan.penalties.perceptron import Perceptron, asked_for, known, may_be_perceptron, recognize, serves
from lipgan.penalties.plan import Recorder
from lipgan.penalties.precomputed import with_gradients, with_zeros
from lipgan.penalties.tape import HOOKS_ON_SAVED, Tape, Unsupported
from lipgan.penalties.task import Execution, PenaltyForm, Task, as_one_batch


class UnsupportedCriticError(RuntimeError):
    """The fused engine was asked for by name and cannot follow the critic; the message names the module."""


# Why a critic is served by autograd: to try the tape again would cost a forward pass each time.
_refused = CriticMemory()
# Which critics couple the samples of a batch: to try both halves in one would cost a forward pass each time.
_coupled = CriticMemory()


def penalty(call: CriticCall, x: Tensor, form: PenaltyForm, execution: Execution, *, apart: bool = False) -> Tensor:
    """The penalty of a critic at the points ``x``.

    Args:
        x: ``[B, ...]``.
        apart: whether the samples must not see each other.

    Raises:
        CoupledSamples: ``apart``, and a critic whose score of a sample depends on the others. Nothing has changed then.
    """
    return _by_engine(Task(call, x, form, execution, apart, None))[1]


class Again:
    """What was kept for a penalty, a plan or a perceptron, for calls that are known to be like it.

    Args:
        form, execution: of the penalty.
        plan, perceptron: the keys of what may have been kept; None for none.
    """

    def __init__(
        self, form: PenaltyForm, execution: Execution, plan: Hashable | None, perceptron: Hashable | None
    ) -> None:
        self._form, self._execution, self._plan, self._perceptron = form, execution, plan, perceptron

    @classmethod
    def of(
        cls,
        call: CriticCall,
        x: Tensor,
        form: PenaltyForm,
        execution: Execution,
        *,
        joined: bool,
        loss: bool = False,
        partly: bool = False,
    ) -> Again | None:
        """That of a call of `penalty` for points ``x``; None where nothing can be kept.

        Args:
            joined: whether they are real and fake samples in one batch, with a penalty of each.
            loss: whether of `loss_and_penalty` in its stead.
            partly: whether at some of the points alone, which only the closed form can do.
        """
        if joined:
            call, form = as_one_batch(call, form, x)
        case = None if execution.engine == "autograd" else plans.case(call, x, form, execution, joined, loss)
        if case is None:
            return None
        closed = asked_for(call, x) if _takes_closed_forms(form, execution) else None
        return cls(form, execution, None if partly else case.key, None if closed is None else closed.key)

    def find(self, critic: nn.Module) -> tuple[Any, list[Tensor]] | None:
        """What was kept, and the critic's tensors; None if there is nothing, or the critic has changed."""
        found = None if self._plan is None else plans.find(critic, self._plan)
        return plans.find(critic, self._perceptron) if found is None and self._perceptron is not None else found

    def run(self, found: tuple[Any, list[Tensor]], x: Tensor) -> Tensor | None:
        """The penalty at the points ``x``, by what `find` has returned; None if it cannot serve now."""
        kept, held = found
        form, differentiable = self._form, self._execution.differentiable
        if isinstance(kept, plans.Plan):
            _, result, parameters, grads = kept.run([x, *held], None, differentiable)
        else:
            perceptron = known(kept, [x, *held])
            if perceptron is None:
                return None
            _, result, parameters, grads = perceptron.solve(form.kind, form.weight, form.target)
        return with_gradients(result, parameters, grads) if differentiable else result

    def serves(self, found: tuple[Any, list[Tensor]], samples: Tensor, rows: int) -> bool:
        """Whether `run_with_loss` will serve, given what `find` has returned, for a batch of ``rows`` such samples."""
        kept, held = found
        if isinstance(kept, plans.Plan):
            return True
        return not kept.is_random and serves(kept, held, samples, rows)

    def run_with_loss(
        self, found: tuple[Any, list[Tensor]], x: Tensor, loss: Loss, penalized: range
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the scores of ``x``, the penalty at some of them, and their sum, which alone has gradients.

        Args:
            found: what `find` has returned, which `serves`.
            Others as for `loss_and_penalty_in_closed_form`.
        """
        kept, held = found
        execution = self._execution
        if isinstance(kept, plans.Plan):
            outcome = kept.run([x, *held], loss, execution.differentiable)
        else:
            perceptron = Perceptron(kept, [x, *held])
            outcome = _solved_with_loss(perceptron, self._form, execution, loss, penalized)
        value, penalty, parameters, grads = outcome
        assert value is not None
        if isinstance(loss, OwnLoss) and parameters and execution.differentiable:
            return value.detach(), penalty, with_gradients(value.detach() + penalty, parameters, grads)
        # What else the loss depends on gets its gradients, and the loss of a critic that is not trained has a backward.
        steep = with_gradients(penalty, parameters, grads) if execution.differentiable else penalty
        return value.detach(), steep.detach(), value + steep


def loss_and_penalty(
    call: CriticCall, x: Tensor, form: PenaltyForm, execution: Execution, loss: Loss, *, apart: bool = False
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
    value, result = _by_engine(Task(call, x, form, execution, apart, loss))
    assert value is not None
    return value, result


def _by_engine(task: Task) -> tuple[Tensor | None, Tensor]:
    """The loss, None if there is none, and the penalty: by what was recorded, by the tape or by autograd."""
    call, x, apart = task.call, task.x, task.apart
    engine, compiled = task.execution.engine, bool(task.execution.compile)
    asked = task.form, task.execution, apart, task.loss is not None
    case = None if engine == "autograd" else plans.case(call, x, *asked, autocast=True)
    if engine != "autograd" and hooks_may_change():
        if engine == "fused" or compiled:
            raise UnsupportedCriticError(f"engine 'fused' cannot follow the critic: {HOOKS_ON_SAVED}")
        return _autograd(task)
    if case is None and compiled:
        raise _uncompilable("it must be a module or a function of one, and its arguments plain tensors and constants")
    outcome = None if case is None else _recorded(task, case)
    if outcome is None and apart and _coupled.get(call, x) is not None:
        raise CoupledSamples
    # Faster by autograd than by the tape, but not by a plan.
    due = compiled or (case is not None and case.is_due())
    small = outcome is None and task.loss is not None and not due and is_small(call, x, engine)
    if small and apart:  # to look for coupling would cost more than it saves
        raise CoupledSamples
    try:
        by_tape = engine == "fused" or compiled
        if outcome is None and engine == "auto" and not compiled:
            by_tape = not small and _refused.get(call, x) is None and (due or slower(call, x) is None)
        if outcome is None and by_tape:
            try:
                outcome = _by_tape(task, case)
            except Unsupported as error:
                reason = error.reason
        if outcome is None and by_tape and (engine == "fused" or compiled):
            if forward_ad._current_level >= 0:
                check_not_dual(call.scores(x))  # whose tangents hide from the tape what it computes
            raise UnsupportedCriticError(f"engine 'fused' cannot follow the critic: {explain(call, x) or reason}")
        if outcome is None:
            if by_tape:
                _refused.set(call, x, reason)
            return _autograd(task)
    except CoupledSamples:
        _coupled.set(call, x, "coupled")
        raise
    value, result, parameters, grads = outcome
    return value, with_gradients(result, parameters, grads) if task.differentiable else result


def _recorded(task: Task, case: plans.Case) -> plans.Outcome | None:
    """By a plan or in closed form; None where there is neither."""
    form = task.form
    found = case.find()
    coarsest = task.x.dtype
    if found is not None:
        plan, inputs = found
        coarsest = plan.coarsest
        run: Callable[[], plans.Outcome] = functools.partial(plan.run, inputs, task.loss, task.differentiable)
    else:
        fits = task.loss is None and _takes_closed_forms(form, task.execution)
        perceptron = recognize(task.call, task.x) if fits else None
        if perceptron is None:
            return None
        run = functools.partial(perceptron.solve, form.kind, form.weight, form.target)
    if not plans.checking():
        return run()
    # Uncompiled, or there would have to be a plan.
    by_tape = functools.partial(_by_tape, task._replace(execution=task.execution._replace(compile=False)), None)
    return plans.checked(run, by_tape, task.call, task.x, reordered=coarsest if task.execution.compile else None)


def _by_tape(task: Task, case: plans.Case | None) -> plans.Outcome:
    """By the tape, which undoes what the critic has changed if it cannot follow; recorded where ``case`` wants it."""
    # A fresh tensor object: the tape hangs on it, and it requires a gradient.
    leaf = task.x.detach().requires_grad_()
    # Whether the samples are coupled decides how a loss is taken along, too.
    samples = None if task.loss is None and not task.apart else SampleTracker(leaf)
    compiled = task.execution.compile
    recorder = None if case is None else case.begin(leaf, always=bool(compiled), at_once=plans.checking())
    tape = Tape(leaf, samples=samples, until_curved=not task.apart)
    before = None if recorder is None else plans.State(task.call, task.x)
    try:
        outcome = _fused(task._replace(x=leaf), tape, recorder)
    except (CoupledSamples, Unsupported):
        tape.undo.restore()
        raise
    if case is not None and recorder is not None and before is not None:
        plan = plans.plan(recorder, outcome, compiled)
        if plan is not None and plans.tried(plan, recorder, before, outcome, task.call, leaf, reordered=bool(compiled)):
            case.keep(recorder, plan)
            _recognize_later(task, case, recorder)
    if case is not None and compiled and (reason := case.refusal(recorder)) is not None:
        tape.undo.restore()
        raise _uncompilable(reason)
    return outcome


def _recognize_later(task: Task, case: plans.Case, recorder: Recorder) -> None:
    """Where a plan was kept, look for a closed form, of a critic that might have left something behind."""
    if recorder.refusal is not None or not _takes_closed_forms(task.form, task.execution):
        return
    found = recognize(task.call, task.x, harmless=True)
    if found is not None and task.loss is None:
        case.forget()  # which would come before the closed form


def _uncompilable(reason: str) -> UnsupportedCriticError:
    return UnsupportedCriticError(f"the critic cannot be compiled: {reason}; use compile=False")


def explain(call: CriticCall, x: Tensor) -> str | None:
    """Why the fused engine cannot follow the critic at the points ``x``, or None if it can."""
    x = x.detach().clone().requires_grad_()
    tape = Tape(x, functools.partial(_running_module, _names(call.critic)))
    try:
        form, execution = PenaltyForm("squared", 1.0, 0.0, "sample"), Execution("fused", False, True)
        _fused(Task(call, x, form, execution, False, None), tape)
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
                f"module {_names(call.critic)[module]!r}: engine 'auto' takes autograd, which is faster than the "
                "tape for recurrent layers on a CPU, until there is a plan; engine 'fused' can be asked for by name"
            )
    return None


def may_be_in_closed_form(call: CriticCall, x: Tensor, form: PenaltyForm, execution: Execution) -> bool:
    """Whether it is worth while to ask `in_closed_form`."""
    return _takes_closed_forms(form, execution) and may_be_perceptron(call, x)


def _takes_closed_forms(form: PenaltyForm, execution: Execution) -> bool:
    # Of a captured plan the host launches nothing, where the closed form is 20 launches on a GPU.
    return execution.engine != "autograd" and execution.compile != "cudagraph" and form.norm == "sample"


def in_closed_form(call: CriticCall, x: Tensor, form: PenaltyForm, execution: Execution) -> Perceptron | None:
    """The critic as a perceptron, if `penalty` takes its closed form and one forward pass scores as another does.

    For those that `may_be_in_closed_form`.
    """
    recognized = recognize(call, x) if _takes_closed_forms(form, execution) else None
    return None if recognized is None or recognized.is_random else recognized


def loss_and_penalty_in_closed_form(
    perceptron: Perceptron,
    call: CriticCall,
    x: Tensor,
    form: PenaltyForm,
    execution: Execution,
    loss: Loss,
    penalized: range,
) -> tuple[Tensor, Tensor]:
    """As `loss_and_penalty`, the penalty at some of the samples.

    Args:
        perceptron: the critic, recognized for the samples ``x``.
        penalized: which samples.
        Others as for `loss_and_penalty`.
    """

    def by_autograd() -> plans.Outcome:
        leaf = x.detach().requires_grad_()
        parameters = call.parameters()
        with torch.enable_grad():
            scores = call.scores(leaf)
            value = loss(scores)
            (gradient,) = torch.autograd.grad(scores.sum(), leaf, create_graph=True)
            steep = gradient[penalized.start : penalized.stop]
            result, _ = gradient_penalty(steep, form.kind, weight=form.weight, target=form.target, norm=form.norm)
            grads = torch.autograd.grad(value + result, parameters, allow_unused=True)
        return value, result, parameters, [*grads]

    run = functools.partial(_solved_with_loss, perceptron, form, execution, loss, penalized)
    outcome = plans.checked(run, by_autograd, call, x, reordered=x.dtype) if plans.checking() else run()
    value, result, parameters, grads = outcome
    assert value is not None
    return value, with_gradients(result, parameters, grads) if execution.differentiable else result


def _solved_with_loss(
    perceptron: Perceptron, form: PenaltyForm, execution: Execution, loss: Loss, penalized: range
) -> plans.Outcome:
    scores, activations = perceptron.forward()
    value, by_score = loss_by_scores(loss, scores, execution.differentiable)
    grads = torch.zeros_like(scores) if by_score is None else by_score
    return value, *perceptron.solve_with_loss(form.kind, form.weight, form.target, activations, grads, penalized)


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


def _autograd(task: Task) -> tuple[Tensor | None, Tensor]:
    """The textbook: the gradient as a part of the graph, and autograd's double backward."""
    form, differentiable = task.form, task.differentiable
    x = task.x.detach().requires_grad_()
    watched = Watched(x) if task.apart else None
    with torch.enable_grad():
        try:
            with EagerMathAttention(), watched or nullcontext():
                # A view: hooks that wait for the gradients of a module's inputs, as FlopCounterMode's, take no leaf.
                scores = _scores(task, x.view_as(x))
            check_not_dual(scores)
            if not scores.requires_grad:
                raise _independent()
            if watched is not None and not watched.samples.apart(scores, in_order=task.loss is not None):
                raise CoupledSamples
        except CoupledSamples:
            assert watched is not None
            watched.undo.restore()
            raise
        with torch.set_grad_enabled(differentiable):
            value = None if task.loss is None else task.loss(scores)
        (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=differentiable, allow_unused=True)
        if gradient is None:
            raise _independent()
        result, _ = gradient_penalty(gradient, form.kind, weight=form.weight, target=form.target, norm=form.norm)
        if task.call.replicated and differentiable:
            result = with_zeros(result, scores, task.call.parameters())
    return value, result if differentiable else result.detach()


def _fused(task: Task, tape: Tape, recorder: Recorder | None = None) -> plans.Outcome:
    """The tape's: see `lipgan.penalties.tape`. The points are a leaf that requires a gradient."""
    form, differentiable = task.form, task.differentiable
    recording = recorder or nullcontext()
    watch = nullcontext() if recorder is None else recorder.watch
    with torch.enable_grad(), EagerMathAttention(), FreshCasts(), recording, tape, watch:
        scores = _scores(task, task.x)
        output = tape.score(scores)
    check_not_dual(scores)
    if output is None:
        raise _independent()
    if recorder is not None:
        recorder.note_critic()
    if task.apart and not (tape.samples is not None and tape.samples.apart(scores, in_order=task.loss is not None)):
        raise CoupledSamples
    value: Tensor | None = None
    by_score: Tensor | None = None
    if task.loss is not None:
        value, by_score = loss_by_scores(task.loss, scores, differentiable)
        if recorder is not None:
            if differentiable and by_score is None:
                recorder.refusal = "the loss has no gradient"
            recorder.stage(scores, by_score)
    with torch.no_grad(), torch.autocast(task.x.device.type, enabled=False), without_function_modes(), recording:
        ones = torch.ones_like(scores)
        del scores
        gradient = tape.backward(output, ones, loss=by_score is not None)
        if gradient is None:
            raise _independent()
        result, _, cotangent = penalize(gradient, form.kind, form.weight, form.target, form.norm)
        del gradient
        if differentiable:
            tape.differentiate(cotangent, output, by_score)
    parameter_gradients = tape.parameter_gradients.values() if differentiable else ()
    return value, result, [p.tensor for p in parameter_gradients], [p.grad for p in parameter_gradients]


def _scores(task: Task, x: Tensor) -> Tensor:
    """The critic's scores.

    Raises:
        CoupledSamples: the samples must not see each other, and the critic has failed: it may serve the real and the
            fake ones of a batch, but not all of them, because it knows their number, as it does where it has labels.
    """
    try:
        return task.call.scores(x)
    except (CoupledSamples, Unsupported):
        raise
    except Exception as error:
        if task.apart:
            raise CoupledSamples from error
        raise


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
