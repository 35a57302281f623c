"""All spectral normalizations of a model by one call per forward, instead of one per layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipgan._checks import check_count
from lipgan.nn.spectral_norm import (
    Parametrizations,
    SpectralNorm,
    check_settings,
    check_weight,
    convert_from_torch,
    normalized_names,
    overwrite_vectors,
    parametrization_of,
    spectral_norm,
    this_thread,
    use_fast_list,
)
from lipgan.nn.spectral_norm_layouts import SELF_NORMALIZING
from lipgan.ops.spectral_norm import normalize

_TARGETS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)


class _Member:
    """One weight of the group."""

    def __init__(self, name: str, module: nn.Module, tensor_name: str) -> None:
        self.name = name
        parametrization = parametrization_of(module, tensor_name)
        assert parametrization is not None
        use_fast_list(module, tensor_name)
        self.parametrization: SpectralNorm = parametrization
        self.list: Parametrizations = cast(Any, module.parametrizations)[tensor_name]
        self.served: dict[int, Tensor] = {}
        self.list.served = self.served
        # The dictionaries in which the modules hold their tensors: an attribute of a module takes ten times as long.
        self._parameters: dict[str, Any] = self.list._parameters
        self._chain: dict[str, Any] = self.list._modules
        self._vectors: dict[str, Any] = parametrization._buffers
        self._moved: tuple[int, ...] = ()  # the shape of the weight with dim in front
        if parametrization.hook_order:
            with torch.no_grad():
                self._moved = tuple(self.list.before_normalization().movedim(parametrization.dim, 0).shape)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, int, SpectralNorm]:
        """The weight that is to be normalized, u, v and dim as the op takes them, and the settings."""
        alone = len(self._chain) == 1 and "original" in self._parameters
        weight = self._parameters["original"] if alone else self.list.before_normalization()
        parametrization = self.parametrization
        if parametrization.hook_order:
            return (*parametrization.in_hook_order(weight), parametrization)
        return weight, self._vectors["_u"], self._vectors["_v"], parametrization.dim, parametrization

    def shaped(self, y: Tensor) -> Tensor:
        """The normalized weight in the shape of the weight."""
        if not self.parametrization.hook_order:
            return y
        return y.reshape(self._moved).movedim(0, self.parametrization.dim)


class SpectralNormGroup:
    """What :func:`group_spectral_norm` returns: the spectrally normalized weights of a model, handled together.

    A forward of the model normalizes all of them by one call before its first layer runs; outside of a forward each
    ``layer.weight`` normalizes itself as :func:`lipgan.spectral_norm` does. The members of the group hold their own
    parametrizations, so ``state_dict`` is that of the single layers. Of a weight with several parametrizations, the
    group computes those before the normalization in that call too, and those after it at each access.

    Threads may run forwards of the model at the same time. A part of the model within
    ``torch.utils.checkpoint(use_reentrant=False)`` runs again with the weights of its forward.

    Attributes:
        names: the weights of the group: ``weight`` by the name of its module, as in ``model.named_modules()``, another
            one by that of the parameter, such as ``"attention.in_proj_weight"``.
    """

    def __init__(self, model: nn.Module, members: list[_Member]) -> None:
        self._members = members
        self.names = [member.name for member in members]
        # Of the last call: names, and sigma of each. A plan of a penalty, which calls no hook, writes it as well.
        self.last_sigmas: list[tuple[list[str], Tensor]] = []
        self._handles = (
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
        )

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"SpectralNormGroup({len(self)} weights)"

    def normalize(self) -> list[Tensor]:
        """The normalized weights in the order of :attr:`names`, as a forward of the model takes them.

        In training mode u and v move on. The result carries the gradient to the original weights.
        """
        return self._normalize(lambda parametrization: (parametrization.iterations, parametrization.training))

    def step(self, n_power_iterations: int | None = None) -> None:
        """Run power iterations now, without a forward of the model: u and v of every member change, weights do not.

        Args:
            n_power_iterations: None for each member's own number.

        Raises:
            ValueError: ``n_power_iterations < 1``.
        """
        if n_power_iterations is not None:
            check_count("n_power_iterations", n_power_iterations)
        with torch.no_grad():
            self._normalize(lambda parametrization: (n_power_iterations or parametrization.n_power_iterations, True))

    def sigmas(self) -> dict[str, float]:
        """The spectral norm of each weight, by module name, as of the last forward or :meth:`step`.

        Copies one small tensor from the device. Before the first forward it is ``u^T W v`` of the present state.
        """
        if not self.last_sigmas:
            with torch.no_grad():
                self._normalize(lambda _: (0, False))
        values: dict[str, float] = {}
        for names, sigma in list(self.last_sigmas):
            values.update(zip(names, (sigma.abs() if sigma.is_complex() else sigma).tolist(), strict=True))
        return {name: values[name] for name in self.names}

    def remove(self) -> None:
        """Undo the grouping: every member normalizes itself again, at each access of its weight."""
        for handle in self._handles:
            handle.remove()
        for member in self._members:
            member.list.served = None

    def _before(self, model: nn.Module, args: Any) -> None:
        # A replica of nn.DataParallel holds copies of the weights on its own device, which its layers normalize.
        if getattr(model, "_is_replica", False):
            return
        thread = this_thread()
        for member, y in zip(self._members, self.normalize(), strict=True):
            member.served[thread] = y

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        thread = this_thread()
        for member in self._members:
            member.served.pop(thread, None)

    def _normalize(self, iterations_of: Callable[[SpectralNorm], tuple[int, bool]]) -> list[Tensor]:
        """The normalized weights. ``iterations_of`` gives the number, and whether u and v move on by them."""
        members = self._members
        rows = [member.operands() for member in members]
        # One call for each combination that the members of a call have in common; in nearly every model there is one.
        keys = []
        for member, (weight, _, _, _, parametrization) in zip(members, rows, strict=True):
            if type(weight) is not nn.Parameter and hasattr(weight, "_local_tensor"):
                raise ValueError(
                    f"model must hold whole weights when its forward begins, got a part of {member.name}.weight, "
                    "sharded by fully_shard: normalize each layer by lipgan.spectral_norm instead"
                )
            keys.append((weight.dtype, weight.device, *iterations_of(parametrization), parametrization.eps))
        normalized: list[Any] = [None] * len(rows)
        sigmas = []
        for key in dict.fromkeys(keys):
            indices = [index for index, other in enumerate(keys) if other == key]
            weights, us, vs, dims, _ = zip(*[rows[index] for index in indices], strict=True)
            _, _, iterations, moves, eps = key
            ys, sigma, uv = normalize(weights, us, vs, iterations, eps, dims)
            if iterations > 0 and moves:
                overwrite_vectors(us, vs, uv)
            for index, y in zip(indices, ys, strict=True):
                normalized[index] = members[index].shaped(y)
            sigmas.append(([members[index].name for index in indices], sigma.detach()))
        self.last_sigmas = sigmas  # at once: another thread may be reading them
        return normalized


def group_spectral_norm(model: nn.Module, *, n_power_iterations: int = 1, eps: float = 1e-12) -> SpectralNormGroup:
    """Normalize every weight of ``model`` by its spectral norm, all of them in one call per forward of ``model``.

    The group takes in the layers that are spectrally normalized already, by lipgan or by either form of torch's, with
    their state and their settings, whatever the name of the parameter. If there are none, it normalizes the ``weight``
    of every ``Linear``, ``Conv1d/2d/3d``, ``ConvTranspose1d/2d/3d`` and ``Embedding``, and the ``in_proj_weight`` (or
    ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``) of every ``MultiheadAttention`` first. A weight that is
    parametrized otherwise, by a mask for example, is normalized after that.

    A layer that a forward of ``model`` calls twice, as HiFi-GAN's discriminators do for real and generated samples, has
    one weight in both calls, and u and v move on once; without the group, twice.

    Args:
        model: changed in place. The call that normalizes is a hook on its forward.
        n_power_iterations: of layers that the group normalizes itself.
        eps: likewise.

    Returns:
        The group.

    Raises:
        ValueError: ``model`` has no such layer, is in a group already, ``n_power_iterations < 1``, ``eps <= 0``, a
            weight is empty, or made by a hook (as of torch.nn.utils.weight_norm), or a layer has a spectral norm of
            its own (those of mimicry and BigGAN-PyTorch). The model is then unchanged.
        TypeError: a weight is integer.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> group = lipgan.group_spectral_norm(critic)
        >>> critic(torch.randn(8, 2)).sum().backward()
        >>> group.sigmas()
        {'0': ..., '2': ...}
    """
    check_settings(n_power_iterations, eps)
    for hook in model._forward_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), SpectralNormGroup):
            raise ValueError(f"model {type(model).__name__} is in a SpectralNormGroup already")
    modules = dict(model.named_modules())
    chosen = [(path, module, name) for path, module in modules.items() for name in normalized_names(module)]
    fresh = not chosen
    if fresh:
        chosen = [(path, module, name) for path, module in modules.items() for name in _targets(module)]
    for path, module in modules.items():  # all of them before any changes
        _check_module(path, module)
    for path, module, name in chosen:
        _check_target(path, module, name, fresh)
    if not chosen:
        raise ValueError(f"model {type(model).__name__} has no Linear, Conv, ConvTranspose or Embedding weight")
    members = []
    for path, module, name in chosen:
        if fresh:
            spectral_norm(module, name, n_power_iterations, eps)
        else:
            convert_from_torch(module, name)
        parametrization = parametrization_of(module, name)
        # A weight of one dimension has no u and v: it stays with its own cheap normalization.
        if parametrization is not None and hasattr(parametrization, "_u"):
            members.append(_Member(_full_name(path, name), module, name))
    return SpectralNormGroup(model, members)


def _targets(module: nn.Module) -> list[str]:
    """The parameters that the group normalizes in a model where nothing is normalized yet."""
    if isinstance(module, _TARGETS):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [name for name in names if getattr(module, name, None) is not None]
    return []


def _check_module(path: str, module: nn.Module) -> None:
    """Raise ValueError for a layer that divides its weight by sigma in its own forward: it would be divided twice."""
    for buffers in SELF_NORMALIZING:
        if all(buffer in module._buffers for buffer in buffers):
            raise ValueError(
                f"{path or 'model'} ({type(module).__name__}) has a spectral norm of its own, with the buffers "
                f"{' and '.join(buffers)}: lipgan.patch(model) takes it over; or build the model of "
                "lipgan.nn.SNConv2d, SNLinear and SNEmbedding, which load its state dict"
            )


def _full_name(path: str, name: str) -> str:
    return path if name == "weight" else ".".join(part for part in (path, name) if part)


def _check_target(path: str, module: nn.Module, name: str, fresh: bool) -> None:
    """Raise an error, with nothing changed yet, for a weight that the group cannot take."""
    full = ".".join(part for part in (path, name) if part)
    if not fresh:
        return
    parametrized = parametrize.is_parametrized(module, name)
    if not parametrized and name not in module._parameters and name not in module._buffers:
        raise ValueError(
            f"{full} is made by a hook of {type(module).__name__} before each forward, as torch.nn.utils.weight_norm "
            "and torch.nn.utils.prune do: remove it, or use a parametrization, such as "
            "torch.nn.utils.parametrizations.weight_norm"
        )
    weight = getattr(module, name)
    check_weight(cast(Tensor, weight), full)
