"""Spectral normalization as a parametrization: a drop-in for torch.nn.utils.parametrizations.spectral_norm."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as _TorchSpectralNorm

from lipgan._checks import check_count, check_floating, check_int, check_positive
from lipgan.nn._pickling import make_picklable
from lipgan.nn._recomputation import keep, recall
from lipgan.nn.spectral_norm_layouts import to_own_layout, to_their_layout
from lipgan.ops import _transforms
from lipgan.ops.spectral_norm import move_vectors, normalize
from lipgan.reference.spectral_norm import from_matrix, to_matrix

# Of the constructor: brings u and v near the leading singular vectors, as in torch.nn.utils.parametrizations.
_WARM_UP_ITERATIONS = 15

_COMPLEX = (torch.complex64, torch.complex128)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class SpectralNorm(nn.Module):
    """The parametrization ``weight -> weight / sigma``; :func:`spectral_norm` registers it.

    Attributes:
        dim: the dimension of the weight that becomes the rows ``h`` of its matrix ``[h, w]``.
        n_power_iterations: iterations per forward in training mode; in eval mode there is none.
        eps: lower bound on a norm that is divided by.

        hook_order: whether an iteration takes ``v = W^T u`` first, as the hook :func:`torch.nn.utils.spectral_norm`
            does, and u and v start at random, without iterations.

        eval_iterations: iterations per forward in eval mode, after which u and v stay as they were: 0, but 1 or more
            in the place of layers that iterate there too (:func:`lipgan.patch`).
        layout: the keys that ``state_dict`` has, a key of :data:`lipgan.nn.spectral_norm_layouts.LAYOUTS`; None for
            those of a parametrization.

    ``vectors`` gives u and v, where they are known; they are kept, not copied.

    Buffers ``_u`` ``[h]`` and ``_v`` ``[w]`` in the dtype of the weight; none for a weight of one dimension, which is
    divided by its Euclidean norm.
    """

    _u: Tensor
    _v: Tensor
    # Of one that was pickled by an earlier version:
    hook_order = False
    eval_iterations = 0
    layout: str | None = None

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        *,
        hook_order: bool = False,
        vectors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_weight(weight)
        check_settings(n_power_iterations, eps)
        check_int("dim", dim)
        if not -weight.ndim <= dim < weight.ndim:
            raise IndexError(
                f"dim must be in [{-weight.ndim}, {weight.ndim - 1}] for a weight of shape {tuple(weight.shape)}, "
                f"got {dim}"
            )
        self.dim = dim % weight.ndim
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        self.hook_order = hook_order
        if weight.ndim > 1:
            u, v = self._initial_vectors(weight.detach()) if vectors is None else vectors
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    @torch.no_grad()
    def _initial_vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # The same draws in the same order as torch's, so that one seed gives the same layer.
        h = weight.shape[self.dim]
        u = F.normalize(weight.new_empty(h).normal_(0, 1), dim=0, eps=self.eps)
        v = F.normalize(weight.new_empty(weight.numel() // h).normal_(0, 1), dim=0, eps=self.eps)
        if self.hook_order:
            return u, v
        _, _, uv = normalize((weight,), (u,), (v,), _WARM_UP_ITERATIONS, self.eps, (self.dim,))
        return uv[:h].clone(), uv[h:].clone()

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` divided by its spectral norm, in the same shape."""
        if weight.ndim == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        iterations = self.iterations
        u, v, dim, like = self._u, self._v, self.dim, weight
        if self.hook_order:
            weight, u, v, dim = self.in_hook_order(weight)
        (y,), _, uv = normalize((weight,), (u,), (v,), iterations, self.eps, (dim,))
        if iterations and self.training:
            overwrite_vectors((u,), (v,), uv)
        return from_matrix(y, like, self.dim) if self.hook_order else y

    @property
    def iterations(self) -> int:
        """Of a forward in the present mode."""
        return self.n_power_iterations if self.training else self.eval_iterations

    def in_hook_order(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """``(weight, u, v, dim)`` by which the op takes the half steps in the order of the hook.

        The op begins with ``u = W v``. Of the transposed matrix, with u and v exchanged, that is ``v = W^T u``.
        """
        return to_matrix(weight, self.dim), self._v, self._u, 1

    def right_inverse(self, value: Tensor) -> Tensor:
        """Assigning to the normalized weight sets the original one."""
        return value

    def extra_repr(self) -> str:
        order = ", hook_order=True" if self.hook_order else ""
        return f"dim={self.dim}, n_power_iterations={self.n_power_iterations}, eps={self.eps}{order}"


def overwrite_vectors(us: Sequence[Tensor], vs: Sequence[Tensor], uv: Tensor) -> None:
    """Move u and v on to those in ``uv``.

    In place: replicas and graphs hold the buffers. The gradient uses the fresh u and v, so that another forward, or a
    broadcast of the buffers, before the backward changes nothing.
    """
    buffers = [vector for pair in zip(us, vs, strict=True) for vector in pair]
    if move_vectors(uv, buffers):
        return
    new = torch.split_with_sizes(uv, [buffer.shape[0] for buffer in buffers])
    if _transforms.active() and not torch.compiler.is_compiling():
        for buffer, vector in zip(buffers, new, strict=True):
            _transforms.overwrite(buffer, vector)
    elif len(buffers) == 2:
        buffers[0].copy_(new[0])
        buffers[1].copy_(new[1])
    else:
        torch._foreach_copy_(buffers, list(new))


def this_thread() -> int:
    """The key of this thread in ``Parametrizations.served``; torch.compile, which cannot ask for it, takes 0."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Parametrizations(parametrize.ParametrizationList):
    """torch's list of the parametrizations of a parameter, with a shorter way where there is only one.

    ``layer.weight`` otherwise spends as long in the search of the list as in a small layer's arithmetic.

    Attributes:
        served: None without a SpectralNormGroup. Otherwise, for each thread that is within a forward of the model, the
            weight up to and including its spectral normalization, as the group has made it.
    """

    served: dict[int, Tensor] | None = None

    def forward(self) -> Tensor:
        served = self.served
        if served is not None:
            weight = self._from_group(served)
            if weight is not None:
                return weight
        if len(self._modules) > 1 or torch.compiler.is_compiling():
            return super().forward()
        held = self._parameters if "original" in self._parameters else self._buffers
        return self._modules["0"](held["original"])  # type: ignore[no-any-return]

    def _from_group(self, served: dict[int, Tensor]) -> Tensor | None:
        weight = served.get(this_thread())
        if not torch.compiler.is_compiling():
            if weight is None and torch._C._current_graph_task_id() != -1:
                weight = recall(self)
            else:
                keep(self, weight)
        if weight is None:
            return None
        if len(self._modules) > 1:
            for parametrization in list(self)[self.position + 1 :]:
                weight = parametrization(weight)
        return weight

    @property
    def position(self) -> int:
        """The place of the spectral normalization in the list, of the first one if there are several."""
        for position, parametrization in enumerate(self):
            if isinstance(parametrization, SpectralNorm):
                return position
        raise ValueError("the weight is not spectrally normalized by lipgan any more")

    def before_normalization(self) -> Tensor:
        """What the spectral normalization divides: the original, or what the members before it make of it."""
        return _input_of(self, self.position)

    def _get_name(self) -> str:
        return "ParametrizationList"


def _input_of(parametrizations: Any, place: int) -> Tensor:
    """What the member at ``place`` of a ParametrizationList is given."""
    count = None if parametrizations.is_tensor else parametrizations.ntensors
    names = ["original"] if count is None else [f"original{k}" for k in range(count)]
    values: list[Tensor] = [getattr(parametrizations, name) for name in names]
    for parametrization in list(parametrizations)[:place]:
        values = [parametrization(*values)]
    return values[0]


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raise TypeError or ValueError for a tensor that has no spectral norm."""
    if is_lazy(weight):
        raise ValueError(f"{name} is not initialized yet: run the lazy module once before")
    if weight.dtype not in _COMPLEX:
        check_floating(name, weight)
    if weight.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a 0-dim tensor")
    if weight.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(weight.shape)}")


def check_settings(n_power_iterations: int, eps: float) -> None:
    """Raise TypeError or ValueError for settings that no layer can have."""
    check_count("n_power_iterations", n_power_iterations)
    check_positive("eps", eps)


def default_dim(module: nn.Module) -> int:
    """1 for transposed convolutions, whose outputs are the second dimension of the weight; 0 for others."""
    return 1 if isinstance(module, _TRANSPOSED) else 0


def parametrization_of(module: nn.Module, name: str) -> SpectralNorm | None:
    """lipgan's parametrization of the parameter ``name``, or None."""
    for parametrization in _parametrizations(module, name):
        if isinstance(parametrization, SpectralNorm):
            return parametrization
    return None


def _parametrizations(module: nn.Module, name: str) -> Any:
    """The ParametrizationList of the parameter ``name``, or an empty tuple."""
    return cast(Any, module.parametrizations)[name] if parametrize.is_parametrized(module, name) else ()


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    hook_order: bool = False,
) -> nn.Module:
    """Divide the parameter ``name`` of ``module`` by its spectral norm at every access.

    A drop-in for :func:`torch.nn.utils.parametrizations.spectral_norm`: the same numbers for the same seed, the same
    ``state_dict`` keys (``parametrizations.weight.original``, ``parametrizations.weight.0._u`` and ``._v``), the same
    behaviour in train and eval mode, and :func:`torch.nn.utils.parametrize.remove_parametrizations` undoes it. State
    dicts of ``torch.nn.utils.spectral_norm`` (``weight_orig``, ``weight_u``, ``weight_v``) load too, and those of the
    layers of mimicry and BigGAN-PyTorch and of a module ``SpectralNorm(layer)`` with a ``weight_bar``;
    :func:`lipgan.nn.hook_state_dict` makes the first of these. A second normalization of a parameter follows the first
    one, as in PyTorch.

    ``module.weight`` is computed anew at every access, as with PyTorch's: initialize the module before, or
    ``module.parametrizations.weight.original``. ``torch.nn.init.orthogonal_(module.weight)`` changes nothing.

    Args:
        module: holds the parameter: float32, float64, float16, bfloat16, complex64 or complex128, of any shape.
            Complex ones are computed by plain PyTorch.
        name: of the parameter.
        n_power_iterations: iterations per forward in training mode.
        eps: lower bound on a norm that is divided by. Norms are taken in float32 or wider, so 1e-12 serves half types.
        dim: the dimension that becomes the rows of the matrix; None for 1 in ``ConvTranspose1d/2d/3d``, else 0.
        hook_order: compute as the older hook :func:`torch.nn.utils.spectral_norm` does: v before u in an iteration,
            from random vectors. The numbers of a fresh model are then those of the hook.

    Returns:
        ``module``, changed in place.

    Raises:
        ValueError: no such parameter, one that has the hook :func:`torch.nn.utils.spectral_norm` already, an empty or
            0-dim parameter, ``n_power_iterations < 1``, ``eps <= 0``.
        TypeError: an integer parameter; a setting that is no number, or no int.
        IndexError: ``dim`` out of range.

    Example:
        >>> layer = lipgan.spectral_norm(torch.nn.Linear(20, 40))
        >>> torch.linalg.matrix_norm(layer.weight, 2)  # close to 1, from above
        tensor(1.0..., grad_fn=...)

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", Algorithm 1.
    """
    if hook_of(module, name) is not None:
        raise ValueError(f"{name!r} of module {type(module).__name__} is spectrally normalized already")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"module {type(module).__name__} has no parameter or buffer named {name!r}")
    check_weight(weight, name)
    dim = default_dim(module) if dim is None else dim
    parametrization = SpectralNorm(weight.detach(), n_power_iterations, dim, eps, hook_order=hook_order)
    # unsafe skips the trial forward, which moves u and v on: PyTorch's parametrization makes it, the hook does not.
    parametrize.register_parametrization(module, name, parametrization, unsafe=hook_order)
    use_fast_list(module, name)
    return module


def use_fast_list(module: nn.Module, name: str) -> None:
    """What a module has beside lipgan's parametrization: a short way, loading of other layouts, pickling."""
    parametrizations = _parametrizations(module, name)
    if isinstance(parametrizations, Parametrizations):
        return
    parametrizations.__class__ = Parametrizations
    module.register_load_state_dict_pre_hook(_load_other_layouts)  # type: ignore[no-untyped-call]
    make_picklable(module)


def convert_from_torch(module: nn.Module, name: str) -> None:
    """Put lipgan's parametrization in the place of torch's, of either form, with its settings, u and v.

    The parameter stays the same object, so an optimizer that holds it goes on working.
    """
    hook = hook_of(module, name)
    while (theirs := torch_parametrization_of(module, name)) is not None:
        parametrizations = _parametrizations(module, name)
        place = list(parametrizations).index(theirs)
        weight = _input_of(parametrizations, place)
        iterations = getattr(theirs, "n_power_iterations", 1)  # absent for a weight of one dimension
        vectors = (theirs._u, theirs._v) if weight.ndim > 1 else None
        ours = SpectralNorm(weight, iterations, theirs.dim, theirs.eps, vectors=vectors).train(theirs.training)
        parametrizations[place] = ours
        use_fast_list(module, name)
    if hook is not None:
        original = getattr(module, f"{name}_orig")
        vectors = getattr(module, f"{name}_u"), getattr(module, f"{name}_v")
        iterations, eps, dim = hook.n_power_iterations, hook.eps, hook.dim
        torch.nn.utils.remove_spectral_norm(module, name)
        _remove_load_hook(module, hook)
        delattr(module, name)
        module.register_parameter(name, original)
        parametrization = SpectralNorm(original, iterations, dim, eps, hook_order=True, vectors=vectors)
        parametrization.train(module.training)
        # unsafe only skips the trial forward, which would move u and v on.
        parametrize.register_parametrization(module, name, parametrization, unsafe=True)
        use_fast_list(module, name)


def _remove_load_hook(module: nn.Module, hook: Any) -> None:
    """Remove what ``hook`` does before ``load_state_dict``.

    PyTorch does not find it in its wrapper, and would go on asking for ``weight_orig``.
    """
    for key, registered in list(module._load_state_dict_pre_hooks.items()):
        if getattr(getattr(registered, "hook", registered), "fn", None) is hook:
            del module._load_state_dict_pre_hooks[key]


def is_normalized(module: nn.Module, name: str) -> bool:
    """Whether ``name`` is spectrally normalized, by lipgan or by either form of torch's."""
    if parametrization_of(module, name) is not None or torch_parametrization_of(module, name) is not None:
        return True
    return hook_of(module, name) is not None


def normalized_names(module: nn.Module) -> list[str]:
    """The parameters of ``module`` that are spectrally normalized, by lipgan or by either form of torch's."""
    names = list(cast(nn.ModuleDict, module.parametrizations)) if parametrize.is_parametrized(module) else []
    names += [hook.name for hook in _hooks(module)]
    return [name for name in names if is_normalized(module, name)]


def torch_parametrization_of(module: nn.Module, name: str) -> Any:
    """torch's parametrization of the parameter ``name``, or None."""
    for parametrization in _parametrizations(module, name):
        if isinstance(parametrization, _TorchSpectralNorm):
            return parametrization
    return None


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of torch.nn.utils.spectral_norm."""
    from torch.nn.utils.spectral_norm import SpectralNorm as Hook

    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Hook)]


def hook_of(module: nn.Module, name: str) -> Any:
    """The hook of torch.nn.utils.spectral_norm for the parameter ``name``, or None."""
    return next((hook for hook in _hooks(module) if hook.name == name), None)


def _load_other_layouts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the keys of other spectral norms in ``state_dict`` to those of the parametrization."""
    for name, place, ours in _own(module):
        to_own_layout(state_dict, prefix, name, place, ours.dim, iterate=not ours.eval_iterations)


def save_in_their_layout(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """A hook on ``state_dict``: the keys that the layer had before lipgan took it over."""
    for name, place, ours in _own(module):
        if ours.layout is not None:
            to_their_layout(state_dict, prefix, name, place, ours.dim, ours.layout)


def _own(module: nn.Module) -> Iterator[tuple[str, int, SpectralNorm]]:
    """Name, place among the parametrizations, and parametrization of each parameter that lipgan normalizes."""
    # There are none after remove_parametrizations, which leaves the hooks of the module.
    for name, parametrizations in getattr(module, "parametrizations", {}).items():
        if isinstance(parametrizations, Parametrizations):
            for place, parametrization in enumerate(parametrizations):
                if isinstance(parametrization, SpectralNorm):
                    yield name, place, parametrization
                    break
