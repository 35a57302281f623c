"""Modules as the interpreter meets them: with plain weights, and those that are bounded as a whole."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as _TorchHook

from lipgan.lipschitz.interpreter import Interpreter
from lipgan.lipschitz.rounding import times
from lipgan.lipschitz.rules import conv_bound
from lipgan.nn.group_sort import GroupSort
from lipgan.nn.spectral_norm_group import SpectralNormGroup

# ---- modules whose operations say less than is known of the whole ----


def is_bounded_as_a_whole(module: nn.Module) -> bool:
    circular = getattr(module, "padding_mode", "zeros") == "circular"
    return isinstance(module, GroupSort) or (isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and circular)


def bound_of_module(interpreter: Interpreter, module: nn.Module, x: Tensor) -> float:
    if isinstance(module, GroupSort):
        return interpreter.constant(x)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    dims = len(module.kernel_size)
    bound = conv_bound(
        module.weight,
        x.shape[-dims:],
        interpreter.n_iterations,
        "circular",
        stride=module.stride,
        padding=module._reversed_padding_repeated_twice[::-2],
        dilation=module.dilation,
        groups=module.groups,
        transposed=False,
    )
    return times(interpreter.constant(x), bound)


def watch_module(interpreter: Interpreter, name: str, module: nn.Module) -> None:
    """Let the interpreter know when the forward of ``module`` begins and ends."""
    whole = is_bounded_as_a_whole(module)
    description = f"{name!r} ({type(module).__name__})" if name else type(module).__name__

    def before(_: nn.Module, args: Any) -> None:
        interpreter.modules.append(description)
        if whole:
            interpreter.suspended = True

    def after(_: nn.Module, args: Any, output: Any) -> None:
        if whole:
            interpreter.suspended = False
            if interpreter.depends(args[0]):
                interpreter.note(bound_of_module(interpreter, module, args[0]), output)
        interpreter.modules.pop()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


# ---- a copy with plain weights ----


def fold_parametrizations(module: nn.Module) -> None:
    """Replace what is parametrized by its effective values.

    torch's remove_parametrizations takes the property from the class, which a copy shares with the module it is of.
    """
    names = list(module.parametrizations)  # type: ignore[arg-type]
    with torch.no_grad():
        values = {name: getattr(module, name).clone() for name in names}
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def plain_copy(critic: nn.Module) -> nn.Module:
    """The critic as it acts in eval mode, with its effective weights as parameters, in float64 and without hooks."""
    # Some modules keep weights that were computed, which deepcopy refuses.
    held = [item for module in critic.modules() for item in vars(module).values() if isinstance(item, Tensor)]
    critic = copy.deepcopy(critic, {id(t): t.detach().clone() for t in held}).eval()
    for name, module in list(critic.named_modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _TorchHook):
                    torch.nn.utils.remove_spectral_norm(module, hook.name)
                elif isinstance(getattr(hook, "__self__", None), SpectralNormGroup) or hasattr(hook, "layout_only"):
                    del hooks[key]
                else:
                    kind = type(module).__name__
                    raise ValueError(f"no Lipschitz bound is known for the hook {hook!r} of module {name!r} ({kind})")
        if parametrize.is_parametrized(module):
            fold_parametrizations(module)
    return critic.double().requires_grad_(False)
