"""Which plans there are of a critic, and when one is made.

A plan stands for the tape where four things hold: the critic is a module, or a function of one, whose code does the
same at every call, as `repeatable` has shown; what that depends on is as it was (`Conditions`, compared at every call);
so are the samples, the other arguments and the settings of the process (`case`); and the operations can be run again
(`plan`).

A penalty is computed by the tape at first. When the same is asked for a second time it is recorded on the way, and when
it is to be compiled at once. For a critic that changes all the time, or that cannot be recorded, this is tried again at
the 4th, 8th, 16th, ... time.

With ``LIPGAN_CHECK_PLANS=1`` in the environment everything is recorded at once, and each plan and each closed form is
compared with the tape, from the same random state and the same buffers: a difference is a `RuntimeError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lipgan.nn.spectral_norm_group import SpectralNormGroup
from lipgan.ops._backend import is_unobserved
from lipgan.penalties.conditions import (
    WithoutAutocast,
    are_calls_changed,
    default_device,
    hooks_may_change,
    without_function_modes,
)
from lipgan.penalties.critic_call import Critic, CriticCall
from lipgan.penalties.known import NotRepeatable
from lipgan.penalties.loss_of_scores import Loss, loss_by_scores
from lipgan.penalties.plan import Recorder
from lipgan.penalties.program import Program
from lipgan.penalties.reach import form, owner
from lipgan.penalties.repeatable import Conditions
from lipgan.penalties.undo import Undo

# Of one critic: enough for the batch sizes and states that a training program goes through.
_KEYS, _KEPT = 16, 4

# (the loss, the penalty, parameters, a gradient for each)
Outcome = tuple[Tensor | None, Tensor, list[Tensor], list[Tensor | None]]


class Plan:
    """A penalty and its gradients as a program.

    Args:
        program: of the samples, the tensors among the critic's arguments, and the critic's tensors; it hands out the
            scores, where there is a loss, and results in the penalty and the gradients.
        places: for each gradient that of its parameter among the inputs.
        coarsest: dtype that anything in it is rounded to.
        norms: groups of spectral norms, and the names of the weights of each call that one of them has made. They are
            told the norms, which follow the scores, or, where there is no loss, the gradients.
    """

    def __init__(
        self,
        program: Program,
        places: Sequence[int],
        coarsest: torch.dtype,
        norms: Sequence[tuple[SpectralNormGroup, list[list[str]]]] = (),
    ) -> None:
        self._program, self._places, self._norms = program, places, norms
        self.coarsest = coarsest

    def run(self, inputs: Sequence[Tensor], loss: Loss | None, differentiable: bool) -> Outcome:
        """The loss, if there is one, the penalty, the parameters, and the gradient for each, None for zeros."""
        value: Tensor | None = None

        def by_score(scores: Tensor) -> Tensor | None:
            nonlocal value
            assert loss is not None
            value, derivative = loss_by_scores(loss, scores, differentiable)
            return torch.zeros_like(scores) if derivative is None and differentiable else derivative

        penalty, parameters, grads = self.penalize(inputs, None if loss is None else by_score)
        return value, penalty, parameters, grads

    def penalize(
        self, inputs: Sequence[Tensor], by_score: Callable[[Tensor], Tensor | None] | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """`run`, given the derivative of a loss with respect to the scores as a function of them."""
        running = self._program(*inputs)
        kind = inputs[0].device.type
        received: Any = None
        if by_score is not None:
            with torch.no_grad(), WithoutAutocast(kind), without_function_modes():
                scores, *norms = next(running)
            self._tell(norms)
            derivative = by_score(scores)
            received = None if derivative is None else (derivative,)
        try:
            with torch.no_grad(), WithoutAutocast(kind), without_function_modes():
                running.send(received)
        except StopIteration as stop:
            penalty, *grads = stop.value
        assert isinstance(penalty, Tensor)
        if by_score is None:
            self._tell(grads[len(self._places) :])
            del grads[len(self._places) :]
        return penalty, [inputs[place] for place in self._places], grads

    def _tell(self, norms: Sequence[Any]) -> None:
        left = iter(norms)
        for group, calls in self._norms:
            group.last_sigmas = [(names, next(left)) for names in calls]


class _OfOneCritic:
    """What is known of one critic, for each key: what was kept, the newest first, and how often nothing was found."""

    def __init__(self) -> None:
        self.kept: dict[Hashable, list[tuple[Conditions, Any]]] = {}
        self.misses: dict[Hashable, int] = {}


_known: WeakKeyDictionary[nn.Module, _OfOneCritic] = WeakKeyDictionary()


def _holding(known: _OfOneCritic, key: Hashable, critic: Critic) -> tuple[Any, list[Tensor]] | None:
    """What was kept for a key, if its conditions hold, with the critic's tensors."""
    for conditions, kept in known.kept.get(key, ()):
        held = conditions.holds(critic)
        if held is not None:
            return kept, held
    return None


def find(critic: nn.Module, key: Hashable) -> tuple[Any, list[Tensor]] | None:
    """What was kept of a critic for the key of a `Case`, if its conditions hold, with the critic's tensors."""
    known = _known.get(critic)
    return None if known is None else _holding(known, key, critic)


class Case:
    """What is asked for, so that it can be recognized.

    Args:
        critic: a module, or a function.
        owner: a module, with which what is kept goes: the critic, or one that the function uses.
        tensors: the samples, and the tensors among the critic's arguments.
        key: what else the operations depend on; it holds nothing of the critic.
    """

    def __init__(self, critic: Critic, owner: nn.Module, tensors: list[Tensor], key: Hashable) -> None:
        self._critic, self._owner, self._tensors, self.key = critic, owner, tensors, key
        self._conditions: Conditions | None = None
        self._held: list[Tensor] = []
        self._reason: str | None = None

    def find(self) -> tuple[Any, list[Tensor]] | None:
        """What was kept, if its conditions hold, with the inputs as they are now; or None, which is counted."""
        known = _known.get(self._owner)
        if known is None:
            known = _known[self._owner] = _OfOneCritic()
        found = _holding(known, self.key, self._critic)
        if found is not None:
            kept, held = found
            return kept, [*self._tensors, *held]
        known.misses[self.key] = known.misses.get(self.key, 0) + 1
        if len(known.misses) > _KEYS:
            oldest = next(iter(known.misses))
            del known.misses[oldest]
            known.kept.pop(oldest, None)
        return None

    def is_due(self, *, at_once: bool = False) -> bool:
        """Whether it is worth while to record, for all that is known: `begin`."""
        misses = _known[self._owner].misses.get(self.key, 0)
        return misses & (misses - 1) == 0 and misses >= 2 - at_once

    def begin(
        self,
        leaf: Tensor,
        *,
        always: bool = False,
        at_once: bool = False,
        rehearsal: bool = False,
        harmless: bool = False,
    ) -> Recorder | None:
        """What is to record the operations on ``leaf``, the samples; None where it is not worth while, or in vain.

        Args:
            always: whether or not it is worth while.
            at_once: when nothing was found for the first time, not the second.
            rehearsal: whether the critic runs for the recording alone, and must change nothing.
            harmless: whether it has been seen to change nothing.
        """
        if not always and not self.is_due(at_once=at_once):
            return None
        if leaf.is_cuda and torch.cuda.is_current_stream_capturing():
            self._reason = "a CUDA graph is being captured"
            return None
        try:
            self._conditions = Conditions(self._critic)
        except NotRepeatable as error:
            self._reason = str(error)
            return None
        if rehearsal and not harmless and self._conditions.doubt is not None:
            self._reason = self._conditions.doubt
            return None
        held = self._conditions.holds(self._critic)
        if held is None:
            self._reason = "there are hooks on all modules"
            return None
        if any(argument is tensor for argument in self._tensors[1:] for tensor in held):
            self._reason = "an argument is a tensor of the critic"  # and need not be at the next call
            return None
        self._held = held
        inputs, conditions = [leaf, *self._tensors[1:], *held], self._conditions
        return Recorder(inputs, conditions.buffers, conditions.groups, watch=conditions.watch(), rehearsal=rehearsal)

    def keep(self, recorder: Recorder, found: Any) -> None:
        """Remember what was found by a recording, unless the critic has changed meanwhile."""
        conditions = self._conditions
        assert conditions is not None
        if recorder.refusal is None:
            held = conditions.holds(self._critic)
            if held is None or any(one is not other for one, other in zip(self._held, held, strict=True)):
                recorder.refusal = "the critic changes as it runs"
        conditions.close()
        if recorder.refusal is None:
            kept = _known[self._owner].kept.setdefault(self.key, [])
            kept.insert(0, (conditions, found))
            del kept[_KEPT:]

    def forget(self) -> None:
        """Forget what was kept last."""
        del _known[self._owner].kept[self.key][0]

    def refusal(self, recorder: Recorder | None) -> str | None:
        """Why nothing was kept, by what `begin` returned; None if something was."""
        return self._reason if recorder is None else recorder.refusal


def plan(recorder: Recorder, outcome: Outcome, compile: bool | str = False) -> Plan | None:
    """The plan of a computation that was recorded, or None if there can be none.

    Args:
        compile: as for `Recorder.program`.
    """
    _, penalty, parameters, grads = outcome
    with torch.no_grad(), WithoutAutocast(penalty.device.type), without_function_modes(), recorder:
        by_leaf = _by_leaf(parameters, grads, [tensor for tensor in recorder.inputs if tensor.requires_grad])
    places = [recorder.input(leaf) for leaf, _ in by_leaf]
    if None in places:
        recorder.refusal = "a gradient belongs to none of the critic's parameters"
        return None
    norms = [] if recorder.has_stage else [sigma for _, calls in recorder.norms for _, sigma in calls]
    program = recorder.program([penalty, *(grad for _, grad in by_leaf), *norms], compile)
    if program is None:
        return None
    told = [(group, [names for names, _ in calls]) for group, calls in recorder.norms]
    return Plan(program, [place for place in places if place is not None], recorder.coarsest, told)


def tried(
    plan: Plan, recorder: Recorder, before: State, outcome: Outcome, call: CriticCall, x: Tensor, *, reordered: bool
) -> bool:
    """Whether a plan runs, and computes from the same state what was recorded; else ``recorder.refusal`` says why.

    Args:
        reordered: whether it may add in another order.
    """
    after = State(call, x)
    told = [(group, group.last_sigmas) for group, _ in recorder.norms]
    before.restore()
    by_score = None if not recorder.has_stage else lambda scores: recorder.received
    try:
        # Later samples are no leaf that requires a gradient, for which what is compiled is compiled anew.
        inputs = [recorder.inputs[0].detach(), *recorder.inputs[1:]]
        ours = outcome[0], *plan.penalize(inputs, by_score)
        compare(ours, outcome, call, reordered=plan.coarsest if reordered else None)
    except Exception as error:
        # Such as an operation that needs autograd around it, or more memory: the tape's outcome stands.
        if checking():
            raise
        recorder.refusal = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        return False
    finally:
        after.restore()
        for group, sigmas in told:
            group.last_sigmas = sigmas
    return True


def _by_leaf(
    parameters: Sequence[Tensor], grads: Sequence[Tensor | None], leaves: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor | None]]:
    """The parameters with their gradients, where those of what was computed from parameters are carried to them.

    Args:
        parameters, grads: a gradient for each, None for zeros.
        leaves: the parameters that there are.
    """
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    for p, grad in zip(parameters, grads, strict=True):
        if p.is_leaf:  # a closed form names one as often as it is used
            before = found.get(id(p), (p, None))[1]
            found[id(p)] = p, before if grad is None else grad if before is None else before + grad
    derived = [(p, grad) for p, grad in zip(parameters, grads, strict=True) if not p.is_leaf]
    if derived:
        along = [torch.zeros_like(p) if grad is None else grad.to(p.dtype) for p, grad in derived]
        carried = torch.autograd.grad([p for p, _ in derived], leaves, along, retain_graph=True, allow_unused=True)
        for leaf, grad in zip(leaves, carried, strict=True):
            before = found.get(id(leaf), (leaf, None))[1]
            if grad is not None:
                found[id(leaf)] = leaf, grad if before is None else before + grad
    return [*found.values()]


def case(call: CriticCall, x: Tensor, *asked: Hashable, autocast: bool = False) -> Case | None:
    """What is asked for, or None where no plan could serve it.

    Args:
        call: of the critic.
        x: ``[B, ...]``, the points.
        asked: what else decides what is computed.
        autocast: whether it can be served under autocast.
    """
    module = owner(call.critic)
    if module is None or callable(call.output) or not is_unobserved((x,)):
        return None
    narrow = _autocast_dtype(x.device.type)
    if (narrow is not None and not autocast) or are_calls_changed() or hooks_may_change():
        return None
    if _autocast_dtype("cuda" if x.device.type == "cpu" else "cpu") is not None:
        return None
    if forward_ad._current_level >= 0:  # a tensor of the critic may carry a tangent
        return None
    tensors, kinds = [x], [form(call.critic), _kind(x)]
    for argument in call.args:
        if isinstance(argument, Tensor):
            if argument.requires_grad or not is_unobserved((argument,)) or argument.layout != torch.strided:
                return None
            kinds.append((_kind(argument), next((k for k, t in enumerate(tensors) if t is argument), None)))
            tensors.append(argument)
        elif argument is None or type(argument) in (bool, int, float, str):
            kinds.append((type(argument), argument))
        else:
            return None
    around = (
        *(torch.get_default_dtype(), default_device(), torch.are_deterministic_algorithms_enabled()),
        *(call.output, call.parts, narrow),
    )
    return Case(call.critic, module, tensors, (asked, around, *kinds))


def _autocast_dtype(kind: str) -> torch.dtype | None:
    """That of autocast on a kind of device, None where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _kind(tensor: Tensor) -> Hashable:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


# ---- comparing with the tape ----


def checking() -> bool:
    """Whether plans are to be compared with the tape."""
    return os.environ.get("LIPGAN_CHECK_PLANS", "0") not in ("", "0")


class State:
    """What a critic may change while it runs, as it is now: its buffers, and the random state."""

    def __init__(self, call: CriticCall, x: Tensor) -> None:
        self._undo = Undo(x)
        self._undo.keep_random_state()
        for buffer in call.buffers():
            self._undo.keep(buffer)

    def restore(self) -> None:
        """Take it back."""
        self._undo.restore()


def checked(
    run: Callable[[], Outcome],
    tape: Callable[[], Outcome],
    call: CriticCall,
    x: Tensor,
    *,
    reordered: torch.dtype | None,
) -> Outcome:
    """The outcome of ``run``, compared with that of the tape, which runs from the same state.

    Args:
        reordered: as for `compare`.
    """
    before = State(call, x)
    outcome = run()
    before.restore()
    compare(outcome, tape(), call, reordered=reordered)
    return outcome


def compare(ours: Outcome, tapes: Outcome, call: CriticCall, *, reordered: torch.dtype | None = None) -> None:
    """RuntimeError where two computations of the same differ by more than rounding.

    Args:
        reordered: where one may add in another order, the coarsest dtype that it rounds to: gradients that are zero
            but for rounding differ then.
    """
    leaves = call.parameters()
    by_leaf = {id(leaf): grad for leaf, grad in _by_leaf(*ours[2:], leaves)}
    pairs = [("loss", ours[0], tapes[0]), ("penalty", ours[1], tapes[1])]
    for leaf, grad in _by_leaf(*tapes[2:], leaves):
        what = f"the gradient of the parameter of shape {tuple(leaf.shape)}"
        pairs.append((what, by_leaf.pop(id(leaf), None), grad))
    pairs += [("a gradient that the tape does not know", grad, None) for grad in by_leaf.values()]
    largest = max(_size(grad) for _, _, grad in pairs) if reordered is not None else 0.0
    for what, one, other in pairs:
        like = one if other is None else other
        if like is not None and not _agree(one, other, like, reordered, largest):
            by = f"a plan's up to {_size(one):.3g}, the tape's up to {_size(other):.3g}"
            name = getattr(call.critic, "__qualname__", type(call.critic).__name__)
            raise RuntimeError(f"{what} of {name} differs: {by}")


def _size(tensor: Tensor | None) -> float:
    """The largest of the finite numbers, without their signs."""
    finite = None if tensor is None else tensor.detach()[tensor.isfinite()]
    return 0.0 if finite is None or not finite.numel() else float(finite.abs().max())


def _agree(
    one: Tensor | None, other: Tensor | None, like: Tensor, coarsest: torch.dtype | None, largest: float
) -> bool:
    """Whether two tensors, None for zeros, are equal up to the half of the digits.

    Args:
        like: one of them.
        coarsest: dtype that was rounded to, None for theirs.
        largest: number that rounding may come from, in three quarters of the digits.
    """
    one, other = (torch.zeros_like(like) if t is None else t.detach() for t in (one, other))
    digits = torch.finfo(coarsest or like.dtype)
    bound = digits.eps**0.5 * max(_size(other), digits.eps**0.25 * largest, digits.tiny**0.5)
    return torch.allclose(one, other, rtol=0.0, atol=bound, equal_nan=True)
