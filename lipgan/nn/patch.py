"""Spectral norms of other packages, replaced by lipgan's within a model that exists already."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

from lipgan.nn.spectral_norm import (
    SpectralNorm,
    check_settings,
    check_weight,
    convert_from_torch,
    hook_of,
    normalized_names,
    parametrization_of,
    save_in_their_layout,
    torch_parametrization_of,
    use_fast_list,
)
from lipgan.nn.spectral_norm_group import SpectralNormGroup
from lipgan.nn.spectral_norm_layouts import LAYOUTS, half_step


def patch(model: nn.Module, *, keep_keys: bool = True) -> nn.Module:
    """Let lipgan compute every spectral norm in ``model``, in place: same numbers, same ``state_dict``.

    What it takes over, with the state, the settings and the parameters (the same objects, so optimizers go on):

    ================================================================  =============================================
    of                                                                known by
    ================================================================  =============================================
    :func:`torch.nn.utils.parametrizations.spectral_norm`             its parametrization
    :func:`torch.nn.utils.spectral_norm`                              its hook
    ``SNConv2d``, ``SNLinear``, ``SNEmbedding`` of mimicry            the buffers ``sn_u`` and ``sn_sigma``, and
                                                                      ``sn_weights()``, ``num_iters``, ``eps``
    ``SNConv2d``, ``SNLinear``, ``SNEmbedding`` of BigGAN-PyTorch     the buffers ``u0`` and ``sv0``, and ``W_()``,
                                                                      ``num_itrs``, ``num_svs``, ``transpose``, ``eps``
    ================================================================  =============================================

    The ``state_dict`` keeps its keys, so checkpoints from before load into the patched model, and its checkpoints into
    a model that is not patched; the keys of :func:`lipgan.spectral_norm` load too. Outputs and gradients are those from
    before, up to rounding, in training and in eval mode. The layers of mimicry and BigGAN-PyTorch become layers of
    PyTorch with a parametrization: ``type(layer)`` is no longer theirs, and ``layer.weight`` is the normalized weight.
    They iterate in eval mode too, without keeping the result, and go on doing so.

    What is not known is left as it is, and a warning names it: parametrizations and hooks of others, layers that look
    like a spectral norm, BigGAN's with ``num_svs`` above 1, subclasses of the layers above. A second call changes
    nothing. Call it before the model is wrapped by DistributedDataParallel or compiled, and before
    :func:`lipgan.group_spectral_norm`, which then makes one call of all of them.

    Two differences remain. Where the hook normalizes once per forward of the layer, a parametrization does so at each
    access of ``layer.weight``; a program that reads ``layer.weight`` in training mode besides moves u and v on. And
    ``named_parameters`` calls the weight ``parametrizations.weight.original``. torch.distributed.checkpoint, which
    looks each key of a state dict up in the model, needs ``keep_keys=False``.

    Args:
        model: any module, changed in place.
        keep_keys: whether ``state_dict`` keeps the keys that it had. If not, it has those of
            :func:`lipgan.spectral_norm`; what was saved before the patch loads all the same.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> theirs = torch.nn.utils.spectral_norm(torch.nn.Linear(3, 2))
        >>> ours = lipgan.patch(theirs)
        >>> ours is theirs, sorted(ours.state_dict())
        (True, ['bias', 'weight_orig', 'weight_u', 'weight_v'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    steps: list[Callable[[], None]] = []
    left: list[str] = []
    for path, module in model.named_modules():
        where = path or "model"
        for name in normalized_names(module):
            if torch_parametrization_of(module, name) is None and hook_of(module, name) is None:
                continue  # lipgan's already
            why = _why_not(module, name)
            if why is None:
                steps.append(lambda module=module, name=name: _convert(module, name, keep_keys))  # type: ignore[misc]
            else:
                left.append(f"{where}.{name} ({why})")
        layer = _layer_of(module)
        if layer is not None:
            why = layer.why_not(module)
            if why is None:
                steps.append(lambda module=module, layer=layer: layer.convert(module, keep_keys))  # type: ignore[misc]
            else:
                left.append(f"{where} ({why})")
        else:
            left += [f"{where}{rest}" for rest in _unknown(module)]
    for step in steps:  # all is looked at before any changes
        step()
    if left:
        warnings.warn(f"lipgan.patch left as they are: {'; '.join(left)}", stacklevel=2)
    return model


def _convert(module: nn.Module, name: str, keep_keys: bool) -> None:
    hooked = hook_of(module, name) is not None
    convert_from_torch(module, name)
    if hooked and keep_keys:
        _keep_layout(module, name, "hook")


def _keep_layout(module: nn.Module, name: str, layout: str) -> None:
    parametrization = parametrization_of(module, name)
    assert parametrization is not None
    parametrization.layout = layout
    if save_in_their_layout not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(save_in_their_layout)  # type: ignore[no-untyped-call]


def _why_not(module: nn.Module, name: str) -> str | None:
    """Why torch's normalization of ``name`` stays, or None."""
    hook = hook_of(module, name)
    theirs = torch_parametrization_of(module, name) if hook is None else hook
    if hook is not None:
        if module._parameters.get(f"{name}_orig") is None:
            return f"{name}_orig is no parameter"
        if getattr(module, f"{name}_orig").ndim < 2:
            return "the hook on a weight of one dimension keeps a sign that a parametrization does not"
    try:
        check_settings(getattr(theirs, "n_power_iterations", 1), theirs.eps)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


# ---- layers that divide their weight by sigma in their own forward ----


@dataclass(frozen=True)
class _Layer:
    """How to know the layers of a package, and what they are told.

    Attributes:
        package: a key of :data:`LAYOUTS`.
        method: gives the normalized weight.
        iterations: the attribute that holds the iterations of a forward in training mode.
        eval_iterations: those in eval mode, of the former. BigGAN's layers begin each anew from the stored u.
        plain: attributes that must have this value, for the layer to be what it becomes.
    """

    package: str
    method: str
    iterations: str
    eval_iterations: Callable[[int], int]
    plain: dict[str, Any]

    def knows(self, module: nn.Module) -> bool:
        _, u, _, sigma = LAYOUTS[self.package]
        return u in module._buffers and sigma in module._buffers and callable(getattr(module, self.method, None))

    def why_not(self, module: nn.Module) -> str | None:
        if _base(module) is None:
            return f"{type(module).__name__} is not the SNConv2d, SNLinear or SNEmbedding of {self.package}"
        weight, iterations, eps = (
            module._parameters.get("weight"),
            getattr(module, self.iterations, None),
            getattr(module, "eps", None),
        )
        if weight is None or iterations is None or eps is None:
            return f"{type(module).__name__} lacks weight, {self.iterations} or eps of {self.package}"
        # Options of PyTorch's layers that their forward does not look at, or not before the weight is normalized.
        for name, value in {**self.plain, **_PLAIN}.items():
            if getattr(module, name, value) != value:
                return f"{name} is {getattr(module, name)!r}, which only {value!r} is known to be the same for"
        try:
            check_settings(iterations, eps)
            check_weight(weight)
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def convert(self, module: nn.Module, keep_keys: bool) -> None:
        base = _base(module)
        assert base is not None
        _, u_key, _, sigma_key = LAYOUTS[self.package]
        u = cast(Any, module._buffers.pop(u_key)).detach().reshape(-1)
        module._buffers.pop(cast(str, sigma_key))
        weight = cast(nn.Parameter, module._parameters["weight"])
        iterations: int = getattr(module, self.iterations)
        eps = cast(float, module.eps)
        # Before the parametrization, which makes a class of its own of what the class is now.
        module.__class__ = base
        ours = SpectralNorm(
            weight, iterations, 0, eps, hook_order=True, vectors=(u, half_step(weight.detach(), u, 0))
        ).train(module.training)
        ours.eval_iterations = self.eval_iterations(iterations)
        # unsafe only skips the trial forward, which would move u and v on.
        parametrize.register_parametrization(module, "weight", ours, unsafe=True)
        use_fast_list(module, "weight")
        if keep_keys:
            _keep_layout(module, "weight", self.package)


_LAYERS = (
    _Layer("mimicry", "sn_weights", "num_iters", lambda iterations: iterations, {}),
    # Further singular values have buffers of their own, which would stand still.
    _Layer("BigGAN-PyTorch", "W_", "num_itrs", lambda _: 1, {"num_svs": 1, "transpose": False}),
)

_PLAIN = {
    "padding_mode": "zeros",
    "padding_idx": None,
    "max_norm": None,
    "scale_grad_by_freq": False,
    "sparse": False,
}


def _layer_of(module: nn.Module) -> _Layer | None:
    return next((layer for layer in _LAYERS if layer.knows(module)), None)


def _base(module: nn.Module) -> type[nn.Module] | None:
    """The layer of PyTorch that the class of ``module`` is made of; None for a subclass of such a class."""
    return next((base for base in (nn.Conv2d, nn.Linear, nn.Embedding) if base in type(module).__bases__), None)


# ---- what is not known ----

_LOOKS = re.compile(r"[Ss]pectral|^SN(?=[A-Z])")
_OURS = ("torch.", "lipgan.")


def _unknown(module: nn.Module) -> Iterator[str]:
    """What may be a spectral norm of ``module`` and is neither PyTorch's nor lipgan's, by name."""
    if parametrize.is_parametrized(module):
        for name, parametrizations in cast(nn.ModuleDict, module.parametrizations).items():
            for parametrization in cast(nn.ModuleList, parametrizations):
                if not _is_of_torch_or_lipgan(type(parametrization)):
                    yield f".{name} (the parametrization {type(parametrization).__name__} is not known)"
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", hook)
        named = hook if hasattr(hook, "__qualname__") and owner is hook else type(owner)
        title = getattr(named, "__qualname__", "")
        if not isinstance(owner, SpectralNormGroup) and _LOOKS.search(title) and not _is_of_torch_or_lipgan(named):
            yield f" (the hook {title} is not known)"
    weights = [name for name in module._parameters if name.startswith("weight")]
    if "weight_bar" in weights or (
        weights and _LOOKS.search(type(module).__name__) and not _is_of_torch_or_lipgan(type(module))
    ):
        yield f" ({type(module).__name__} looks like a spectral norm that is not known)"


def _is_of_torch_or_lipgan(thing: Any) -> bool:
    return f"{getattr(thing, '__module__', '')}.".startswith(_OURS)
