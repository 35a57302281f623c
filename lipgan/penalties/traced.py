"""A penalty, or a loss with its penalty, as one operation of a graph that torch.compile traces.

The critic is not traced: the operation runs it as `lipgan.gradient_penalty` does outside of compiled code, and hands
out the gradients of its parameters with the value, which the backward in the graph scales. To the graph the operation
is a function without side effects: it is given the buffers of the critic and returns what they become.

What is no tensor (the critic itself, a generator, names) enters the graph as a number, the key of a table. It is made
while the function is traced, and dynamo's guards on the critic and the generator see to it that others are traced anew.

A loss that is a function is traced as the caller's own code, see `lipgan.penalties.traced_scores`.

Imported only while something is compiled: torch.compile's machinery loads for seconds.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lipgan._dtypes import accumulation_dtype
from lipgan.penalties.precomputed import scaled

#: Whether dynamo takes a module, and its `id`, to a function whose result is a constant of the graph: that of torch
#: 2.11 does not, and 2.12 has not been tried.
SERVES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)

# What runs a task outside of the graph: (critic, real, fake, critic_args, weight, target, generator, ...) -> values, of
# which the first has gradients; what follows the generator, `lipgan.penalties.traced_scores` tells.
Run = Callable[..., tuple[Tensor, ...]]
# (critic, samples, critic_args) -> scores
Score = Callable[[nn.Module, Tensor, tuple[Any, ...]], Tensor]
# Both of settings that are no tensors; the second for a loss, to tell the shapes of scores, else None.
Make = Callable[..., tuple[Run, Score | None]]


@dataclass(frozen=True)
class _Operation:
    """What an operation of a graph is to do, but for its tensors.

    Attributes:
        critic: a reference to it.
        run, score: see `Make`. With a loss the values are those of a `CriticLoss`, else a penalty.
        args: the critic's other arguments, `_TENSOR` in the place of tensors and `_NUMBER` in that of floats.
        trained: which of the critic's parameters require a gradient.
        autocast: (whether it is on, in which dtype), for the device of the samples.
        generator: of the random numbers, None for that of the process.
    """

    critic: weakref.ref[nn.Module]
    run: Run
    score: Score | None
    args: tuple[Any, ...]
    trained: tuple[bool, ...]
    autocast: tuple[bool, torch.dtype]
    generator: torch.Generator | None

    def arguments(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> tuple[Any, ...]:
        """The critic's other arguments."""
        left: dict[object, Iterator[Any]] = {_TENSOR: iter(tensors), _NUMBER: iter(numbers)}
        return tuple([next(left[item]) if item in (_TENSOR, _NUMBER) else item for item in self.args])


_TENSOR, _NUMBER = object(), object()
_operations: dict[int, _Operation] = {}
_keys = itertools.count()

_library = torch.library.Library("lipgan", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "critic_penalty(Tensor real, Tensor? fake, Tensor[] args, Tensor[] parameters, Tensor[] buffers, "
    "float[] numbers, int task, float weight, float target, bool differentiable) -> Tensor[]",
    # It draws, and must run as often as it is called. What the critic depends on beside tensors, such as its hooks, is
    # compared in Python at each call, which a CUDA graph would leave out.
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)


def fits(
    critic: Any, samples: Sequence[Any], critic_args: Any, numbers: Sequence[Any], output: Any, generator: Any
) -> bool:
    """Whether a call can be an operation; otherwise it breaks the graph."""
    if not SERVES:
        return False
    if not isinstance(critic, nn.Module) or isinstance(critic, DistributedDataParallel) or callable(output):
        return False
    if generator is not None and not (isinstance(generator, torch.Generator) and _few_generators(critic)):
        return False
    if not isinstance(critic_args, (tuple, list)):
        return False
    for number in numbers:
        if not isinstance(number, (int, float)):
            return False
    for item in samples:
        if item is not None and not isinstance(item, Tensor):
            return False
    for item in critic_args:
        if isinstance(item, Tensor):
            if item.requires_grad:
                return False
        elif not (item is None or isinstance(item, (bool, int, float, str))):
            return False
    return True


def call(
    function: Any,
    make: Make,
    settings: tuple[Any, ...],
    n_values: int,
    critic: Any,
    real: Any,
    fake: Any,
    critic_args: Sequence[Any],
    weight: float,
    target: float,
    generator: Any,
) -> tuple[Tensor, ...]:
    """The values, of which the first ones may have gradients; dynamo traces this.

    Args:
        function: `WithGradients`, or what takes its arguments.
        make: of the settings, what runs the task.
        settings: of the task.
        n_values: how many values there are.
        critic, real, fake, critic_args, weight, target, generator: as for `lipgan.gradient_penalty`; they fit.
    """
    kind = real.device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    constants = tuple([None if isinstance(item, (Tensor, float)) else item for item in critic_args])
    places = tuple([isinstance(item, Tensor) + 2 * isinstance(item, float) for item in critic_args])
    # `id` is what makes dynamo guard on this very critic, and on this generator.
    identity = id(critic), None if generator is None else id(generator)
    task = _key(make, critic, generator, identity, constants, places, autocast, *settings)
    parameters = list(critic.parameters())
    buffers = list(critic.buffers())
    tensors = [item for item in critic_args if isinstance(item, Tensor)]
    numbers = [item for item in critic_args if isinstance(item, float)]
    settings = task, float(weight), float(target), torch.is_grad_enabled(), len(tensors), len(buffers)
    if fake is not None:
        fake = fake.detach()
    results = function.apply(*settings, numbers, real.detach(), fake, *tensors, *buffers, *parameters)
    values, changed = results[:n_values], results[n_values:]
    if len(buffers) != 0:
        # The operations themselves change some buffers without autograd's notice, which may have saved them.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(buffers)):  # type: ignore[attr-defined]
            for buffer, content in zip(buffers, changed, strict=True):
                buffer.copy_(content)
    return tuple(values)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key(
    make: Make,
    critic: nn.Module,
    generator: torch.Generator | None,
    identity: tuple[int, int | None],
    constants: tuple[Any, ...],
    places: tuple[int, ...],
    autocast: tuple[bool, torch.dtype],
    *settings: Any,
) -> int:
    """A number for a task; dynamo calls this while it traces."""
    key = next(_keys)
    args = tuple((item, _TENSOR, _NUMBER)[place] for item, place in zip(constants, places, strict=True))
    run, score = make(*settings)
    trained = tuple(p.requires_grad for p in critic.parameters())
    _operations[key] = _Operation(weakref.ref(critic), run, score, args, trained, autocast, generator)
    weakref.finalize(critic, _operations.pop, key, None)
    return key


# A program that makes a generator for each step would be traced anew for each: from then on it breaks the graph.
_MOST_GENERATORS = 4


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _few_generators(critic: Any) -> bool:
    """Whether a critic has had few generators so far; dynamo calls this while it traces, without a guard."""
    known = {id(task.generator) for task in _operations.values() if task.critic() is critic}
    return len(known - {id(None)}) < _MOST_GENERATORS


class WithGradients(torch.autograd.Function):
    """The operation, with the gradients of its first result."""

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
        fake: Tensor | None,
        *tensors: Tensor,
    ) -> Any:
        args, buffers = tensors[:n_args], tensors[n_args : n_args + n_buffers]
        parameters = tensors[n_args + n_buffers :]
        results = torch.ops.lipgan.critic_penalty(
            real, fake, args, parameters, buffers, numbers, task, weight, target, differentiable
        )
        n = len(results) - n_buffers - len(parameters)
        grads = results[n : n + len(parameters)]
        ctx.save_for_backward(*grads)
        ctx.n_others = n_args + n_buffers
        others = (*results[1:n], *results[n + len(parameters) :])
        ctx.mark_non_differentiable(*others)
        return (results[0], *others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: Any) -> Any:
        needed = ctx.needs_input_grad[9 + ctx.n_others :]
        grads = [scaled(g, grad, g.dtype) if need else None for g, need in zip(ctx.saved_tensors, needed, strict=True)]
        return (*[None] * (9 + ctx.n_others), *grads)


# ---- outside of the graph ----


def operation(key: int) -> tuple[_Operation, nn.Module]:
    """What was noted under a number, and its critic."""
    task = _operations.get(key)
    critic = None if task is None else task.critic()
    if task is None or critic is None:
        raise RuntimeError("the critic of this compiled function does not exist any more")
    return task, critic


class AsTraced:
    """Within it the critic of an operation, and all around it, are as where the function was traced.

    Args:
        key: of the operation.
        parameters, buffers: of the critic; the buffers are to hold what these do.
        kind: of the device of the samples.
        differentiable: whether gradients are wanted.

    Attributes:
        task, critic: the operation, and its critic.
        leaves: the parameters that require a gradient.

    Raises:
        RuntimeError: the critic has other parameters, or is gone.
    """

    def __init__(
        self, key: int, parameters: list[Tensor], buffers: list[Tensor], kind: str, *, differentiable: bool
    ) -> None:
        self.task, self.critic = operation(key)
        self._held, own = [*self.critic.parameters()], [*self.critic.buffers()]
        same = len(self._held) == len(parameters) and len(own) == len(buffers)
        if not same or not all(map(_is_one, self._held, parameters)):
            raise RuntimeError("the critic's parameters are others than those of this compiled function")
        self.leaves = [p for p, trained in zip(self._held, self.task.trained, strict=True) if trained]
        enabled, dtype = self.task.autocast
        self._content = _Content(own, buffers)
        self._contexts = (
            _outermost(),
            self._content,
            torch.set_grad_enabled(differentiable),
            torch.autocast(kind, dtype=dtype, enabled=enabled),
        )

    def __enter__(self) -> AsTraced:
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context)
            self._left = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._left.__exit__(*error)

    def buffers(self) -> list[Tensor]:
        """A copy of what the buffers hold now."""
        return self._content.now()

    def by_parameter(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """A gradient for each parameter, of no elements for those that require none.

        Args:
            grads: those of `leaves`, None for zeros.
        """
        left = iter(grads)
        return [
            _like(p, next(left)) if trained else p.new_empty(0)
            for p, trained in zip(self._held, self.task.trained, strict=True)
        ]


def _is_one(held: Tensor, given: Tensor) -> bool:
    """Whether what a graph gives is a parameter of the critic, or the copy in another layout that Inductor may make."""
    if held.data_ptr() == given.data_ptr():
        return True
    return held.shape == given.shape and torch.allclose(held.detach(), given, rtol=0.0, atol=0.0, equal_nan=True)


def _eager(
    real: Tensor,
    fake: Tensor | None,
    args: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    numbers: list[float],
    key: int,
    weight: float,
    target: float,
    differentiable: bool,
) -> list[Tensor]:
    """Values, a gradient for each parameter (of no elements for those that require none), and the buffers."""
    with AsTraced(key, parameters, buffers, real.device.type, differentiable=differentiable) as traced:
        task, leaves = traced.task, traced.leaves
        values = task.run(traced.critic, real, fake, task.arguments(args, numbers), weight, target, task.generator)
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if values[0].requires_grad and leaves:
            found = torch.autograd.grad(values[0], leaves, allow_unused=True)
        changed = traced.buffers()
    return distinct([*(value.detach() for value in values), *traced.by_parameter(found), *changed])


def _like(parameter: Tensor, grad: Tensor | None) -> Tensor:
    """A gradient, None for zeros, in the layout that the graph expects."""
    if grad is None:
        return torch.zeros_like(parameter, requires_grad=False)
    expected = torch.empty_like(parameter, requires_grad=False)
    return (
        grad.detach() if grad.stride() == expected.stride() and grad.dtype == expected.dtype else expected.copy_(grad)
    )


def distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of which none shares memory with another: the graph may use it for something else."""
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        memory = tensor.untyped_storage()._cdata
        result.append(tensor.clone() if memory in seen else tensor)
        seen.add(memory)
    return result


class _Content:
    """Within it the buffers of a critic have a given content.

    Args:
        own: the buffers.
        given: what they are to hold.
    """

    def __init__(self, own: list[Tensor], given: list[Tensor]) -> None:
        self._own, self._given = own, given
        self._versions = [tensor._version for tensor in own]

    def __enter__(self) -> _Content:
        self._before = self.now()
        self._set(self._given)
        return self

    def __exit__(self, *error: Any) -> None:
        self._set(self._before)
        torch._C._autograd._unsafe_set_version_counter(tuple(self._own), tuple(self._versions))

    def now(self) -> list[Tensor]:
        """A copy of their content."""
        return [tensor.detach().clone() for tensor in self._own]

    def _set(self, content: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, values in zip(self._own, content, strict=True):
                if tensor.data_ptr() != values.data_ptr():
                    tensor.copy_(values)


def _of_a_new_thread() -> tuple[Any, Any]:
    """The dispatcher's keys that a thread starts with."""
    found: list[tuple[Any, Any]] = []

    def look() -> None:
        found.append((torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


_KEYS_OUTSIDE = _of_a_new_thread()


def _outermost() -> Any:
    """Within it operations are dispatched as outside of any other, autograd and all."""
    return torch._C._ForceDispatchKeyGuard(*_KEYS_OUTSIDE)


def _fake(
    real: Tensor,
    fake: Tensor | None,
    args: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    numbers: list[float],
    key: int,
    weight: float,
    target: float,
    differentiable: bool,
) -> list[Tensor]:
    task, critic = operation(key)
    dtype = real.dtype if fake is None else torch.promote_types(real.dtype, fake.dtype)
    value = real.new_empty((), dtype=accumulation_dtype(dtype))
    values = [value]
    if task.score is not None:
        assert fake is not None
        scores = fake_scores(task, critic, [real.to(dtype), fake.to(dtype)], args, parameters, buffers, numbers)
        loss = scores[0].new_empty(())
        values = [torch.empty_like(value + loss), loss, value, *scores]
    return [*values, *fake_grads(task, parameters), *(torch.empty_like(buffer) for buffer in buffers)]


def fake_scores(
    task: _Operation,
    critic: nn.Module,
    samples: Sequence[Tensor],
    args: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    numbers: list[float],
) -> list[Tensor]:
    """Tensors like the scores of samples."""
    assert task.score is not None
    arguments = task.arguments(args, numbers)
    held = {name: tensor for (name, _), tensor in zip(critic.named_parameters(), parameters, strict=True)}
    held |= {name: tensor.clone() for (name, _), tensor in zip(critic.named_buffers(), buffers, strict=True)}
    with torch.no_grad(), torch.nn.utils.stateless._reparametrize_module(critic, held):
        return [torch.empty_like(task.score(critic, x, arguments)) for x in samples]


def fake_grads(task: _Operation, parameters: list[Tensor]) -> list[Tensor]:
    """Tensors like the gradients of the parameters."""
    return [
        torch.empty_like(p, requires_grad=False) if trained else p.new_empty(0)
        for p, trained in zip(parameters, task.trained, strict=True)
    ]


_library.impl("critic_penalty", _eager, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("critic_penalty", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("lipgan::critic_penalty", _fake, lib=_library)
