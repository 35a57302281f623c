"""A penalty, or a loss with its penalty, as one operation of a graph that torch.compile traces.

The critic is not traced: the operation runs it as `lipgan.gradient_penalty` does outside of compiled code, and hands
out the gradients of its parameters with the value, which the backward in the graph scales. To the graph the operation
is a function without side effects: it is given the buffers of the critic and returns what they become.

What is no tensor (the critic itself, names) enters the graph as a number, the key of a table. It is made
while the function is traced, and dynamo's guards on the critic see to it that another critic is traced anew.

Imported only while something is compiled: torch.compile's machinery loads for seconds.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
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

# What runs a task outside of the graph: (critic, real, fake, critic_args, weight, target) -> values, the first of which
# has gradients.
Run = Callable[[nn.Module, Tensor, Tensor | None, tuple[Any, ...], float, float], tuple[Tensor, ...]]
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
    """

    critic: weakref.ref[nn.Module]
    run: Run
    score: Score | None
    args: tuple[Any, ...]
    trained: tuple[bool, ...]
    autocast: tuple[bool, torch.dtype]

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
    # A program may make one for each step, and would be traced anew for each.
    if generator is not None:
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
    make: Make,
    settings: tuple[Any, ...],
    n_values: int,
    critic: Any,
    real: Any,
    fake: Any,
    critic_args: Sequence[Any],
    weight: float,
    target: float,
) -> tuple[Tensor, ...]:
    """The values, of which the first has gradients; dynamo traces this.

    Args:
        make: of the settings, what runs the task.
        settings: of the task.
        n_values: how many values there are.
        critic, real, fake, critic_args, weight, target: as for `lipgan.gradient_penalty`; they fit.
    """
    kind = real.device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    constants = tuple([None if isinstance(item, (Tensor, float)) else item for item in critic_args])
    places = tuple([isinstance(item, Tensor) + 2 * isinstance(item, float) for item in critic_args])
    # `id` is what makes dynamo guard on this very critic.
    task = _key(make, critic, id(critic), constants, places, autocast, *settings)
    parameters = list(critic.parameters())
    buffers = list(critic.buffers())
    tensors = [item for item in critic_args if isinstance(item, Tensor)]
    numbers = [item for item in critic_args if isinstance(item, float)]
    settings = task, float(weight), float(target), torch.is_grad_enabled(), len(tensors), len(buffers)
    if fake is not None:
        fake = fake.detach()
    results = _Traced.apply(*settings, numbers, real.detach(), fake, *tensors, *buffers, *parameters)  # type: ignore[no-untyped-call]
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
    identity: int,
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
    _operations[key] = _Operation(weakref.ref(critic), run, score, args, trained, autocast)
    weakref.finalize(critic, _operations.pop, key, None)
    return key


class _Traced(torch.autograd.Function):
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
    task = _operations.get(key)
    critic = None if task is None else task.critic()
    if task is None or critic is None:
        raise RuntimeError("the critic of this compiled function does not exist any more")
    held, own = [*critic.parameters()], [*critic.buffers()]
    same = len(held) == len(parameters) and len(own) == len(buffers)
    if not same or any(a.data_ptr() != b.data_ptr() for a, b in zip(held, parameters, strict=True)):
        raise RuntimeError("the critic's parameters are others than those of this compiled function")
    enabled, dtype = task.autocast
    with (
        _outermost(),
        _Content(own, buffers) as content,
        torch.set_grad_enabled(differentiable),
        torch.autocast(real.device.type, dtype=dtype, enabled=enabled),
    ):
        values = task.run(critic, real, fake, task.arguments(args, numbers), weight, target)
        leaves = [p for p, trained in zip(held, task.trained, strict=True) if trained]
        found: list[Tensor | None] = [None] * len(leaves)
        if values[0].requires_grad and leaves:
            found[:] = torch.autograd.grad(values[0], leaves, allow_unused=True)
        changed = content.now()
    left = iter(found)
    grads = [_like(p, next(left)) if trained else p.new_empty(0) for p, trained in zip(held, task.trained, strict=True)]
    return _distinct([*(value.detach() for value in values), *grads, *changed])


def _like(parameter: Tensor, grad: Tensor | None) -> Tensor:
    """A gradient, None for zeros, in the layout that the graph expects."""
    if grad is None:
        return torch.zeros_like(parameter, requires_grad=False)
    expected = torch.empty_like(parameter, requires_grad=False)
    return (
        grad.detach() if grad.stride() == expected.stride() and grad.dtype == expected.dtype else expected.copy_(grad)
    )


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
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
    task = _operations[key]
    dtype = real.dtype if fake is None else torch.promote_types(real.dtype, fake.dtype)
    value = real.new_empty((), dtype=accumulation_dtype(dtype))
    values = [value]
    if task.score is not None:
        critic = task.critic()
        assert critic is not None
        assert fake is not None
        arguments = task.arguments(args, numbers)
        held = {name: tensor for (name, _), tensor in zip(critic.named_parameters(), parameters, strict=True)}
        held |= {name: tensor.clone() for (name, _), tensor in zip(critic.named_buffers(), buffers, strict=True)}
        with torch.no_grad(), torch.nn.utils.stateless._reparametrize_module(critic, held):
            scores = [task.score(critic, x.to(dtype), arguments) for x in (real, fake)]
        loss = scores[0].new_empty(())
        values = [torch.empty_like(value + loss), loss, value, *map(torch.empty_like, scores)]
    grads = [
        torch.empty_like(p, requires_grad=False) if trained else p.new_empty(0)
        for p, trained in zip(parameters, task.trained, strict=True)
    ]
    return [*values, *grads, *(torch.empty_like(buffer) for buffer in buffers)]


_library.impl("critic_penalty", _eager, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("critic_penalty", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("lipgan::critic_penalty", _fake, lib=_library)
