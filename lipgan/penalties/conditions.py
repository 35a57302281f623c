"""The conditions under which a critic runs: autocast, modes, torch.compile, inference mode, DistributedDataParallel."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` with torch.compile kept out of it."""
    compiling = torch.compiler.is_compiling()
    if compiling or "torch._dynamo" in sys.modules:  # its import takes seconds
        from lipgan.penalties._graph_break import call

        # Where it looks at no frames, there is nothing to keep out.
        if compiling or get_eval_frame_callback() is not None:
            return call(function, *args)
    return function(*args)


class OutsideOfInferenceMode:
    """Within it autograd takes part, wherever the caller is."""

    def __enter__(self) -> None:
        self._guard = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
        if self._guard is not None:
            self._guard.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._guard is not None:
            self._guard.__exit__(*error)


def clone_if_inference(item: Any) -> Any:
    """A tensor that was made in inference mode as one that autograd takes."""
    return item.clone() if isinstance(item, Tensor) and item.is_inference() else item


def as_data(item: Any) -> Any:
    """A tensor of a class that only carries something along, such as MONAI's MetaTensor, as a plain one.

    A class with a ``__torch_dispatch__`` of its own decides what operations do, and stays.
    """
    if not isinstance(item, Tensor) or type(item) in (Tensor, nn.Parameter):
        return item
    if getattr(type(item), "__torch_dispatch__", None) is not torch._C._disabled_torch_dispatch_impl:
        return item
    with torch._C.DisableTorchFunctionSubclass():
        return item.as_subclass(Tensor)


def unwrap(critic: Any) -> Any:
    """The module within the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(critic, DistributedDataParallel):
            critic = critic.module
        elif isinstance(critic, nn.Module) and isinstance(getattr(critic, "_orig_mod", None), nn.Module):
            critic = critic._orig_mod
        else:
            return critic


def _sharded_classes() -> tuple[type, ...]:
    """The classes whose weights are in parts between forwards; none in a process that cannot have such a module."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    fsdp = sys.modules.get("torch.distributed.fsdp")
    names = ("FSDPModule", "FullyShardedDataParallel")
    return tuple(cls for name in names if isinstance(cls := getattr(fsdp, name, None), type))


def _sharded(name: str, module: object) -> ValueError:
    return ValueError(
        f"critic must not be sharded (FSDP), got {name} ({type(module).__name__}): its weights are freed after each "
        "pass, and the passes of a penalty need them all; DistributedDataParallel keeps them"
    )


class Unsharded:
    """Refuses critics with modules that are sharded: a module sooner than anything runs, a function as they run."""

    def __init__(self, critic: Any) -> None:
        self._classes = _sharded_classes()
        self._is_module = isinstance(critic, nn.Module)
        self._hook: Any = None
        if self._classes and self._is_module:
            for name, module in critic.named_modules():
                if isinstance(module, self._classes):
                    raise _sharded(f"module {name!r}" if name else "the critic itself", module)

    def __enter__(self) -> None:
        # torch.compile's modules warn of hooks on all modules, so that only a function is followed by one.
        if self._classes and not self._is_module:
            thread = threading.get_ident()

            def check(module: nn.Module, args: Any) -> None:
                if isinstance(module, self._classes) and threading.get_ident() == thread:
                    raise _sharded("a module", module)

            self._hook = nn.modules.module.register_module_forward_pre_hook(check)

    def __exit__(self, *error: Any) -> None:
        if self._hook is not None:
            self._hook.remove()


class Float32InPlaceOfFloat16:
    """Within it a penalty that autocast would run in float16 runs in float32; called, it converts arguments to that."""

    def __init__(self, critic: Any, x: Tensor) -> None:
        kind = x.device.type
        self._context: AbstractContextManager[Any] = nullcontext()
        self._applies = (
            x.dtype == torch.float32
            and torch.is_autocast_enabled(kind)
            and torch.get_autocast_dtype(kind) == torch.float16
            and not (isinstance(critic, nn.Module) and any(p.dtype == torch.float16 for p in critic.parameters()))
        )
        if self._applies:
            self._context = torch.autocast(kind, enabled=False)

    def __enter__(self) -> Float32InPlaceOfFloat16:
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def __call__(self, critic_args: Sequence[Any]) -> tuple[Any, ...]:
        if not self._applies:
            return tuple(critic_args)
        return tuple(
            item.float() if isinstance(item, Tensor) and item.dtype == torch.float16 else item for item in critic_args
        )


def hooks_may_change() -> bool:
    """Whether a program has hooks on the tensors that autograd saves, which may give other numbers back.

    PyTorch's own, of ``save_on_cpu`` and of checkpoints, give back what they were given.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and not all(str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


def check_no_transform() -> None:
    """RuntimeError within a transform of torch.func, which would have to go through the engines' own derivatives."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "a gradient penalty cannot be taken within a transform of torch.func (grad, vmap, jvp, ...): call it "
            "outside, and take its gradients by backward"
        )


NO_FORWARD_MODE = (
    "critic must not depend on dual tensors of torch.autograd.forward_ad: a gradient penalty has no derivative in "
    "forward mode; take its gradients by backward"
)


def check_not_dual(scores: Tensor) -> None:
    """RuntimeError for scores with a tangent of forward-mode differentiation, which a penalty would lose."""
    if forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(scores).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError(NO_FORWARD_MODE)


def default_device() -> torch.device | None:
    """The one that a program has set, by ``torch.set_default_device`` or ``with torch.device``; None for none."""
    return torch.get_default_device() if torch._C._len_torch_function_stack() else None


def are_calls_changed() -> bool:
    """Whether a ``TorchFunctionMode`` of a program may do otherwise than the functions that are called."""
    if not torch._C._len_torch_function_stack():
        return False
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode) is not DeviceContext for mode in modes)


def without_function_modes() -> AbstractContextManager[Any]:
    """Within it no ``TorchFunctionMode`` looks at calls: those of the engines are not the program's."""
    return torch._C.DisableTorchFunction() if torch._C._len_torch_function_stack() else nullcontext()


class WithoutAutocast:
    """Within it autocast is off: operations run in the dtypes of their operands, as they were recorded."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __enter__(self) -> None:
        self._was_on = torch.is_autocast_enabled(self._kind)
        if self._was_on:
            torch.set_autocast_enabled(self._kind, False)

    def __exit__(self, *error: Any) -> None:
        if self._was_on:
            torch.set_autocast_enabled(self._kind, True)


class FreshCasts:
    """Within it autocast casts a weight at each use, and takes no cast that an earlier forward pass has left.

    What is recorded then begins at the weights themselves, and has the same bits whatever ran before.
    """

    def __enter__(self) -> None:
        self._was_on = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *error: Any) -> None:
        torch.set_autocast_cache_enabled(self._was_on)


class EagerMathAttention:
    """Within it critics that were compiled run as they were written, and attention by operations with derivatives.

    The tape reads operations, not compiled code, and only the math form of attention has a second derivative. Both are
    settings of the process: the first thread to come makes them, the last to leave takes them back.
    """

    _lock = threading.Lock()
    _inside = 0
    _settings = ExitStack()
    _stance = False

    def __enter__(self) -> None:
        cls = EagerMathAttention
        with cls._lock:
            if cls._inside == 0:
                cls._settings.enter_context(sdpa_kernel(SDPBackend.MATH))
            # Where it is not loaded, nothing was compiled.
            if not cls._stance and "torch._dynamo" in sys.modules:
                cls._settings.enter_context(torch.compiler.set_stance("force_eager"))
                cls._stance = True
            cls._inside += 1

    def __exit__(self, *error: Any) -> None:
        cls = EagerMathAttention
        with cls._lock:
            cls._inside -= 1
            if cls._inside == 0:
                cls._stance = False
                cls._settings.close()


class _InPlaceOf(nn.Module):
    """A function in the place of a module, with the module's own parameters, buffers and submodules.

    DistributedDataParallel reads them from the module that it wraps at every forward, to broadcast the buffers.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        super().__init__()
        self.forward = function
        self.training = module.training
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules


def through_ddp(function: Callable[..., Any], critic: Any, *args: Any) -> Any:
    """``function(critic, *args)``; in DistributedDataParallel as if it were the output of the wrapped module.

    The wrapper then sees the parameters that the tensors in it depend on, and prepares for their backward.
    """
    if not isinstance(critic, DistributedDataParallel):
        return function(unwrap(critic), *args)
    module = critic.module
    critic.module = _InPlaceOf(functools.partial(function, unwrap(module)), module)
    try:
        return critic(*args)
    finally:
        critic.module = module
