"""A whole step of a critic as one CUDA graph: loss, penalty, backward and optimizer, without Python in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lipgan._checks import check_count
from lipgan.penalties.conditions import FreshCasts
from lipgan.penalties.critic_call import Output
from lipgan.penalties.critic_loss import CriticLoss, critic_loss
from lipgan.penalties.engines import UnsupportedCriticError
from lipgan.penalties.known import NotRepeatable
from lipgan.penalties.loss_of_scores import LossOfBoth
from lipgan.penalties.repeatable import Conditions

# Each holds the memory of a step.
_KEPT = 4


class _CudaGraph:
    """What a function has launched, to be launched again.

    Args:
        function: is run once, on a stream of its own, and launches nothing yet.
        generators: of random numbers, beside those of the devices.

    Attributes:
        outcome: of the function; `replay` writes its tensors.
    """

    def __init__(self, function: Callable[[], Any], generators: Sequence[torch.Generator]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        # Other threads may use the GPU meanwhile, as those that load data do.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.outcome = function()

    def replay(self) -> None:
        self._graph.replay()

    @staticmethod
    def warm_up(function: Callable[[], Any], device: torch.device) -> Any:
        """Run a function on another stream than the default one, as a capture does."""
        current = torch.cuda.current_stream(device)
        other = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        other.wait_stream(current)
        with torch.cuda.stream(other):
            outcome = function()
        current.wait_stream(other)
        return outcome


# By the type of a device.
_GRAPHS: dict[str, Any] = {"cuda": _CudaGraph}


class _Step(nn.Module):
    """What the reader of `Conditions` follows: a critic and a loss."""

    def __init__(self, critic: nn.Module, loss: Any) -> None:
        super().__init__()
        self.critic, self.loss = critic, loss

    def forward(self, real: Tensor, fake: Tensor) -> Any:
        return self.loss(self.critic(real), self.critic(fake))


class _Captured:
    """A step that was captured, and what has to hold for it to stand for another."""

    def __init__(self, step: GraphedCriticStep, samples: Sequence[Tensor], args: Sequence[Any]) -> None:
        module = _Step(step.critic, None if isinstance(step.loss, str) else step.loss)
        try:
            self._conditions = Conditions(module)
            if self._conditions.doubt is not None:
                raise NotRepeatable(self._conditions.doubt)
        except NotRepeatable as error:
            raise UnsupportedCriticError(f"the step cannot be captured: {error}; call critic_loss itself") from None
        self._module, self._optimizer = module, step.optimizer
        self._addresses = self._held()
        self._state = step.optimizer.state
        self._inputs = [tensor.detach().clone() for tensor in (*samples, *_tensors(args))]
        real, fake, *rest = self._inputs
        left = iter(rest)
        own = [next(left) if isinstance(item, Tensor) else item for item in args]
        generators = [] if step.generator is None else [step.generator]
        held = self._conditions.holds(module) or []
        versions = [tensor._version for tensor in held]
        try:
            self._graph = _GRAPHS[real.device.type](lambda: step.run(real, fake, own), generators)
        except Exception:
            step.optimizer.zero_grad()  # of memory that nothing has written
            raise
        self._changing = [tensor for tensor, version in zip(held, versions, strict=True) if tensor._version != version]
        self._grads = [(p, p.grad) for group in step.optimizer.param_groups for p in group["params"]]
        self._norms = [(group, group.last_sigmas) for group in self._conditions.groups]

    def _held(self) -> list[tuple[int, int]] | None:
        held = self._conditions.holds(self._module)
        return None if held is None else [(id(tensor), tensor.data_ptr()) for tensor in held]

    def holds(self) -> bool:
        """Whether the critic, the loss and the state of the optimizer are those that were captured."""
        return self._optimizer.state is self._state and self._held() == self._addresses is not None

    def run(self, samples: Sequence[Tensor], args: Sequence[Any]) -> CriticLoss:
        for own, given in zip(self._inputs, (*samples, *_tensors(args)), strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        # What Python has done in the step that was captured.
        for parameter, grad in self._grads:
            parameter.grad = grad
        for group, sigmas in self._norms:
            group.last_sigmas = sigmas
        torch.autograd.graph.increment_version(self._changing)
        return CriticLoss(*(tensor.clone() for tensor in self._graph.outcome))


class GraphedCriticStep:
    """What :func:`graphed_critic_step` returns: a step of a critic, to be called with samples."""

    def __init__(
        self,
        critic: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: str | LossOfBoth,
        options: dict[str, Any],
        generator: torch.Generator | None,
        warmup: int,
    ) -> None:
        self.critic, self.optimizer, self.loss, self.generator = critic, optimizer, loss, generator
        self._options, self._warmup = options, warmup
        self._captured: dict[Hashable, _Captured] = {}
        self._calls: dict[Hashable, int] = {}
        self._warned = False

    def __call__(self, real: Tensor, fake: Tensor, critic_args: Sequence[Any] = ()) -> CriticLoss:
        """Take a step: gradients anew, loss and penalty, backward, optimizer.

        Args:
            real, fake: ``[B, ...]``.
            critic_args: as for :func:`lipgan.critic_loss`.

        Returns:
            The losses and scores that the step began with; nothing of it depends on the critic for autograd. The
            gradients stay in the parameters.
        """
        if not _can_be_captured(real, fake, critic_args):
            return self.run(real, fake, critic_args)
        device = real.device
        self._check(device)
        key = self._key((real, fake), critic_args)
        captured = self._captured.get(key)
        if captured is not None and not captured.holds():
            self._calls.pop(key)
            del self._captured[key]
            captured = None
        if captured is not None:
            return captured.run((real, fake), critic_args)
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls <= self._warmup:
            outcome: CriticLoss = _GRAPHS[device.type].warm_up(lambda: self.run(real, fake, critic_args), device)
            return outcome
        self._make_room(key)
        captured = self._captured[key] = _Captured(self, (real, fake), critic_args)
        return captured.run((real, fake), critic_args)

    def run(self, real: Tensor, fake: Tensor, critic_args: Sequence[Any]) -> CriticLoss:
        """The step as it is without a graph."""
        self.optimizer.zero_grad()
        with torch.enable_grad(), FreshCasts():
            step = critic_loss(
                *(self.critic, real, fake, self.loss),
                generator=self.generator,
                critic_args=critic_args,
                **self._options,
            )
            step.total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return CriticLoss(*(tensor.detach() for tensor in step))

    def _check(self, device: torch.device) -> None:
        """ValueError for what a graph would do once, and never again."""
        optimizer = self.optimizer
        name = type(optimizer).__name__
        for group in optimizer.param_groups:
            if not group.get("capturable", isinstance(optimizer, torch.optim.SGD)):
                advice = f"{name}(..., capturable=True)" if "capturable" in group else "one that can be, such as Adam"
                raise ValueError(f"optimizer must be capturable on a GPU, got {name} that is not; use {advice}")
            if any(p._post_accumulate_grad_hooks for p in group["params"]):
                raise ValueError("optimizer must have parameters without hooks, which a graph would not call")
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise ValueError(f"optimizer must have no hooks, which a graph would not call, got {name} with hooks")
        if self.generator is not None and self.generator.device.type != device.type:
            raise ValueError(f"generator must be on {device.type}, as the samples are, got {self.generator.device}")

    def _key(self, samples: Sequence[Tensor], args: Sequence[Any]) -> Hashable:
        tensors = [(t.shape, t.stride(), t.dtype, t.device) for t in (*samples, *_tensors(args))]
        constants = [None if isinstance(item, Tensor) else (type(item), item) for item in args]
        kind = samples[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return tuple(tensors), tuple(constants), autocast, self._hyperparameters()

    def _hyperparameters(self) -> Hashable:
        """Of the optimizer: a graph holds numbers as they were, and reads tensors as they are."""
        return tuple(
            (tuple(map(id, group["params"])), *((k, _constant(v)) for k, v in group.items() if k != "params"))
            for group in self.optimizer.param_groups
        )

    def _make_room(self, key: Hashable) -> None:
        """Forget the oldest graph, and say once why there are so many, if it is the optimizer's doing."""
        if not self._warned and any(other[:3] == key[:3] for other in self._captured):  # type: ignore[index]
            self._warned = True
            warnings.warn(
                "the optimizer's settings have changed, and the step is captured once more; a graph reads a learning "
                "rate that is a tensor on the GPU as it is: lr=torch.tensor(2e-4, device='cuda')",
                stacklevel=4,
            )
        while len(self._captured) >= _KEPT:
            oldest = next(iter(self._captured))
            del self._captured[oldest]
            self._calls.pop(oldest, None)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [item for item in args if isinstance(item, Tensor)]


def _constant(value: Any) -> Hashable:
    return (id(value), value.data_ptr()) if isinstance(value, Tensor) else repr(value)


def _can_be_captured(real: Any, fake: Any, args: Sequence[Any]) -> bool:
    """Whether there are graphs for the samples, and none is made at present; what is wrong, `critic_loss` says."""
    if not all(isinstance(samples, Tensor) for samples in (real, fake)) or real.device.type not in _GRAPHS:
        return False
    if any(tensor.device != real.device for tensor in (fake, *_tensors(args))):
        return False
    return not (real.is_cuda and torch.cuda.is_current_stream_capturing())


def graphed_critic_step(
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: str | LossOfBoth,
    *,
    kind: str | None = None,
    weight: float = 10.0,
    target: float = 1.0,
    norm: str = "sample",
    engine: str = "auto",
    compile: bool = False,
    generator: torch.Generator | None = None,
    output: Output = None,
    warmup: int = 3,
) -> GraphedCriticStep:
    """A function that takes a whole step of a critic, on a GPU as one CUDA graph.

    A call does what these four lines do::

        optimizer.zero_grad()
        step = lipgan.critic_loss(critic, real, fake, loss, kind=kind, ...)
        step.total.backward()
        optimizer.step()

    On a GPU the first ``warmup`` calls run as they are; the next one is captured, and all later ones replay the graph
    with their samples: one launch in the place of hundreds, and no Python between them. There is a graph for each shape
    of the samples. Elsewhere each call runs as it is.

    A graph is replayed while it is the same step: a critic whose layers, flags, hooks or parametrizations have
    changed, or whose weights lie elsewhere, other settings or another state of the optimizer, another autocast
    are captured anew. Weights that are changed in place, as by ``load_state_dict``, are read as they are, and random
    numbers are drawn anew. A graph that can no longer be replayed keeps its memory until the next capture in its
    place.

    Args:
        critic: a module whose code can be shown to do the same at every call (no control flow by values, no state in
            Python, hooks of spectral norms only), not in DistributedDataParallel.
        optimizer: of the critic's parameters. On a GPU it must be capturable (``Adam(..., capturable=True)``, SGD),
            without hooks. A learning rate that changes should be a tensor on the GPU: a number is captured as it is,
            and with another one the step is captured again.
        loss: a name of :data:`lipgan.losses`, or a function of the scores of real and fake samples that can be shown
            to do the same at every call.
        kind, weight, target, norm, engine, compile, output: as for :func:`lipgan.critic_loss`.
        generator: of the points' random numbers; on the device of the samples.
        warmup: calls before a capture, at least 1; libraries and the optimizer make ready in them.

    Returns:
        A function ``(real, fake, critic_args=()) -> CriticLoss``, all of it detached.

    Raises:
        TypeError: ``critic`` is no module or in DistributedDataParallel, ``optimizer`` is no optimizer, ``warmup`` no
            int; what :func:`lipgan.critic_loss` raises, when it is called.
        ValueError: ``warmup < 1``; when it is called on a GPU: an optimizer that is not capturable or has hooks, a
            generator of another device.
        UnsupportedCriticError: on a GPU, a step that may do otherwise at another call.

    Example:
        >>> step = lipgan.graphed_critic_step(critic, torch.optim.SGD(critic.parameters(), 1e-3), "hinge", kind="r1")
        >>> step(real, fake).total
        tensor(...)
    """
    if isinstance(critic, DistributedDataParallel) or not isinstance(critic, nn.Module):
        raise TypeError(
            f"critic must be a module that is not wrapped for several processes, got {type(critic).__name__}"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not callable(loss) and not isinstance(loss, str):
        raise TypeError(f"loss must be a name of lipgan.losses or a function of two tensors of scores, got {loss!r}")
    if not isinstance(compile, bool):
        raise TypeError(f"compile must be a bool, got {compile!r}: the step is a graph as it is")
    check_count("warmup", warmup)
    options = {"kind": kind, "weight": weight, "target": target, "norm": norm, "engine": engine}
    return GraphedCriticStep(
        critic, optimizer, loss, {**options, "compile": compile, "output": output}, generator, warmup
    )
