"""State dicts of other spectral norms: loaded into lipgan's layers, and back to torch.nn.utils.spectral_norm.

============================  ==========================================  ============================================
of                            keys                                        meaning
============================  ==========================================  ============================================
parametrizations              ``parametrizations.weight.original``,       lipgan's own layout
                              ``parametrizations.weight.0._u``, ``_v``
torch.nn.utils.spectral_norm  ``weight_orig``, ``weight_u``,              the same three
                              ``weight_v``
the same, before PyTorch 1.1  ``weight_orig``, ``weight_u``, ``weight``   v follows from ``weight_orig / weight``
mimicry                       ``weight``, ``sn_u`` (1, h), ``sn_sigma``   sigma is taken one iteration after ``sn_u``
BigGAN-PyTorch                ``weight``, ``u0`` (1, h), ``sv0``          likewise
a module around the layer     ``module.weight_bar``, ``module.weight_u``  likewise; the class ``SpectralNorm(layer)`` of
                              (h,), ``module.weight_v``                   pytorch-spectral-normalization-gan, which many
                                                                          have copied
============================  ==========================================  ============================================
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lipgan.reference.spectral_norm import to_matrix

#: The buffers by which the layers of mimicry and of BigGAN-PyTorch, which divide their ``weight`` in their own forward,
#: are known: u, sigma.
SELF_NORMALIZING = (("sn_u", "sn_sigma"), ("u0", "sv0"))

#: What :func:`to_their_layout` knows: the keys of the original weight, u, v and sigma, None for what is not stored.
#: The name of the parameter stands for ``{}``.
LAYOUTS: Mapping[str, tuple[str, str, str | None, str | None]] = MappingProxyType(
    {
        "hook": ("{}_orig", "{}_u", "{}_v", None),
        "mimicry": ("{}", "sn_u", None, "sn_sigma"),
        "BigGAN-PyTorch": ("{}", "u0", None, "sv0"),
    }
)


def to_own_layout(
    state_dict: dict[str, Any], prefix: str, name: str, place: int, dim: int, *, iterate: bool = True
) -> None:
    """Rename the keys of the parameter ``name`` in ``state_dict`` to those of the parametrization, in place.

    Args:
        state_dict: what is being loaded.
        prefix: of the module, with its dot.
        name: of the parameter.
        place: of the spectral normalization among the parametrizations.
        dim: the dimension of the weight that becomes the rows of its matrix.
        iterate: move the u of a layer that normalizes itself on by the iteration that it takes in eval mode; False for
            a parametrization that takes it too.
    """
    new = f"{prefix}parametrizations.{name}."
    _unwrap(state_dict, prefix, name)
    if f"{prefix}{name}_orig" in state_dict:
        original = state_dict.pop(f"{prefix}{name}_orig")
        effective = state_dict.pop(f"{prefix}{name}", None)
        u, v = (state_dict.pop(f"{prefix}{name}_{letter}", None) for letter in "uv")
        if v is None and u is not None:
            v = _v_of(original, effective, u, dim)
        vectors = (u, v)
    elif f"{prefix}{name}_bar" in state_dict and f"{prefix}{name}_u" in state_dict:
        original = state_dict.pop(f"{prefix}{name}_bar")
        u, _ = (state_dict.pop(f"{prefix}{name}_{letter}", None) for letter in "uv")
        vectors = _one_iteration(original, u, dim)
    else:
        keys = [key for key in SELF_NORMALIZING if all(f"{prefix}{part}" in state_dict for part in key)]
        if name != "weight" or not keys or f"{prefix}weight" not in state_dict:
            return
        original = state_dict.pop(f"{prefix}weight")
        u, _ = (state_dict.pop(f"{prefix}{part}") for part in keys[0])
        vectors = _one_iteration(original, u, dim) if iterate else (u.reshape(-1), half_step(original, u, dim))
    state_dict[f"{new}original"] = original
    for letter, vector in zip("uv", vectors, strict=True):
        if vector is not None:
            state_dict[f"{new}{place}._{letter}"] = vector


def _unwrap(state_dict: dict[str, Any], prefix: str, name: str) -> None:
    """Take the ``module.`` of a wrapper out of the keys, in place: the layer itself stands in its place now."""
    inner = f"{prefix}module."
    if f"{inner}{name}_bar" in state_dict:
        for key in [key for key in state_dict if key.startswith(inner)]:
            state_dict[prefix + key[len(inner) :]] = state_dict.pop(key)


def to_their_layout(state_dict: dict[str, Any], prefix: str, name: str, place: int, dim: int, layout: str) -> None:
    """The reverse of :func:`to_own_layout`, in place: the keys of ``layout``, a key of :data:`LAYOUTS`.

    sigma is that of the present weight, or 1 for a weight that is sharded. Those layers do not read it, and theirs is
    that of their last training step.
    """
    prefix_of_own = f"{prefix}parametrizations.{name}."
    own = (f"{prefix_of_own}original", f"{prefix_of_own}{place}._u", f"{prefix_of_own}{place}._v")
    if not all(key in state_dict for key in own):
        return
    original, u, v = (state_dict.pop(key) for key in own)
    weight_key, u_key, v_key, sigma_key = (key and prefix + key.format(name) for key in LAYOUTS[layout])
    state_dict[str(weight_key)] = original
    state_dict[str(u_key)] = u if sigma_key is None else u.reshape(1, -1)
    if v_key is not None:
        state_dict[v_key] = v
    if sigma_key is not None:
        with torch.no_grad():
            if hasattr(original, "_local_tensor"):
                state_dict[sigma_key] = u.new_ones(1)
            else:
                matrix = to_matrix(original.detach(), dim).to(u.dtype)
                state_dict[sigma_key] = torch.dot(u.detach(), matrix @ v.detach()).reshape(1)


def half_step(original: Tensor, u: Tensor, dim: int) -> Tensor:
    """``v = W^T u``, normalized: ``[w]``. Zeros for a u of another length; load_state_dict says what is wrong."""
    with torch.no_grad():
        dtype = torch.promote_types(u.dtype, torch.float32)
        matrix, wide = to_matrix(original, dim).to(dtype), u.reshape(-1).to(dtype)
        if matrix.shape[0] != wide.shape[0]:
            return u.new_zeros(matrix.shape[1])
        v = matrix.T @ wide
        return torch.nn.functional.normalize(v, dim=0, eps=1e-12).to(u.dtype)


def _v_of(original: Tensor, effective: Tensor | None, u: Tensor, dim: int) -> Tensor:
    """The v of old checkpoints: ``W v`` along u, and ``sigma = u^T W v`` that of the effective weight.

    Without an effective weight: ``W^T u`` normalized.
    """
    with torch.no_grad():
        matrix, wide = to_matrix(original, dim).double().cpu(), u.double().cpu()
        if effective is None:
            v: Tensor = matrix.T @ wide
            v = v / torch.linalg.vector_norm(v).clamp_min(1e-12)
        else:
            other = to_matrix(effective, dim).double().cpu()
            sigma = (matrix * matrix).sum() / (matrix * other).sum()
            v = torch.linalg.lstsq(matrix, wide[:, None], driver="gelsd").solution[:, 0]
            v = v * (sigma / (wide @ (matrix @ v)))
        return v.to(u)


def _one_iteration(original: Tensor, u: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """u and v as those layers hold them while they divide: ``v = W^T u`` and ``u = W v``, normalized."""
    with torch.no_grad():
        matrix, wide = to_matrix(original, dim).double(), u.reshape(-1).double()
        if matrix.shape[0] != wide.shape[0]:  # a layer of another size: load_state_dict says which
            return u.reshape(-1), u.new_zeros(matrix.shape[1])
        v = matrix.T @ wide
        v = v / torch.linalg.vector_norm(v).clamp_min(1e-12)
        wide = matrix @ v
        wide = wide / torch.linalg.vector_norm(wide).clamp_min(1e-12)
        return wide.to(u.dtype), v.to(u.dtype)


def hook_state_dict(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A state dict as a model with the hooks of :func:`torch.nn.utils.spectral_norm` loads it.

    ``parametrizations.weight.original``, ``parametrizations.weight.0._u`` and ``._v`` become ``weight_orig``,
    ``weight_u`` and ``weight_v``; other keys stay. The way back needs no function: lipgan's layers load that layout.

    Args:
        state_dict: of a model whose spectral normalizations are lipgan's or
            :func:`torch.nn.utils.parametrizations.spectral_norm`.

    Returns:
        A new dictionary that holds the same tensors.

    Raises:
        ValueError: a parameter that is normalized has other parametrizations too, which the hook cannot express.

    Example:
        >>> ours = lipgan.spectral_norm(torch.nn.Linear(3, 2))
        >>> hooked = torch.nn.utils.spectral_norm(torch.nn.Linear(3, 2))
        >>> hooked.load_state_dict(lipgan.nn.hook_state_dict(ours.state_dict()))
        <All keys matched successfully>
    """
    pattern = re.compile(r"(.*?)parametrizations\.([^.]+)\.(?:(\d+)\.)?([^.]+)")
    parts: dict[str, dict[str, str]] = {}
    for key in state_dict:
        match = pattern.fullmatch(key)
        if match is not None:
            prefix, name, place, part = match.groups()
            parts.setdefault(f"{prefix}{name}", {})[f"{place}.{part}" if place else part] = key
    renamed: dict[str, str] = {}
    for base, keys in parts.items():
        if not any(part.endswith("._u") for part in keys):
            continue  # another parametrization
        if set(keys) != {"original", "0._u", "0._v"}:
            raise ValueError(f"{base} has other parametrizations beside its spectral norm: {', '.join(sorted(keys))}")
        for part, new in (("original", "orig"), ("0._u", "u"), ("0._v", "v")):
            renamed[keys[part]] = f"{base}_{new}"
    return OrderedDict((renamed.get(key, key), value) for key, value in state_dict.items())
