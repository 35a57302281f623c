"""Orthogonal weights, as a parametrization by the polar factor, and layers that have them."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lipgan.nn._pickling import make_picklable
from lipgan.ops.polar_factor import polar_factor

__all__ = ["Orthogonal", "OrthogonalConv2d", "OrthogonalLinear", "orthogonal"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Orthogonal(nn.Module):
    """The parametrization ``weight -> polar factor of its matrix, scaled``; :func:`orthogonal` registers it.

    The matrix of a weight has the first dimension as rows, all others as columns, and one block for each group.

    Attributes:
        groups: number of diagonal blocks that the rows are divided into.
        scale: what the polar factor is multiplied by, at most 1.
    """

    def __init__(self, groups: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        self.groups = groups
        self.scale = scale

    def _factor(self, weight: Tensor) -> Tensor:
        blocks = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        blocks = blocks if weight.dtype == torch.float64 else blocks.float()
        u = polar_factor(blocks[0] if self.groups == 1 else blocks)
        return u.to(weight.dtype).reshape(weight.shape)

    def forward(self, weight: Tensor) -> Tensor:
        """The scaled polar factor, in the shape and dtype of ``weight``."""
        u = self._factor(weight)
        return u if self.scale == 1.0 else u * self.scale

    def right_inverse(self, value: Tensor) -> Tensor:
        """Assigning to the weight sets the nearest orthogonal one."""
        with torch.no_grad():
            return self._factor(value)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, scale={self.scale:.6g}"


def windows_per_input(kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> int:
    """How many windows of a zero-padded convolution read one and the same input position, at most.

    Tap l of window j reads position ``s j + d l``: the taps that meet one position are congruent modulo
    ``s / gcd(s, d)``.
    """
    count = 1
    for k, s, d in zip(kernel_size, stride, dilation, strict=True):
        count *= -(-k // (s // math.gcd(s, d)))
    return count


def orthogonal(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make the matrix of a Linear or convolution layer orthogonal, and the layer 1-Lipschitz, at every access.

    The parameter becomes the polar factor U of what is trained, the orthogonal matrix nearest to it in the Frobenius
    norm: orthonormal rows where the matrix is wide, columns where it is tall. The weight starts at the polar factor of
    what it was; where it loses rank, U is some orthogonal matrix all the same, and never NaN.

    A Linear layer gets U itself. A convolution gets ``U / m^(1/2)``, with U of its kernel reshaped to
    ``[C_out / groups, C_in / groups * k..]`` for each group (a transposed one: the first dimension of its weight as
    rows), and m the number of windows that one input position lies in, ``ceil(k / s)`` in each dimension without
    dilation. It is then 1-Lipschitz on inputs of every size and with every zero padding. Where the stride is at least
    the kernel size, m is 1 and the operator consists of copies of U: it keeps the norm of gradients if there are no
    more outputs than inputs of a window. Overlapping windows lose norm.

    :func:`torch.nn.utils.parametrize.remove_parametrizations` undoes it, and
    :func:`torch.nn.utils.parametrize.cached` avoids a second factorization for two forwards of one step.

    Args:
        module: Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d or ConvTranspose3d.
        name: of the parameter: float64, float32 or a half type, which is factored as float32 and rounded at the end.

    Returns:
        ``module``, changed in place. ``state_dict`` has ``parametrizations.weight.original``.

    Raises:
        TypeError: another kind of module, or a parameter that is not real floating-point.
        ValueError: no parameter ``name``, one that is not initialized yet, that is empty or has fewer than two
            dimensions, that is parametrized already, or padding other than zeros.

    Example:
        >>> layer = orthogonal(torch.nn.Linear(20, 40))
        >>> torch.linalg.svdvals(layer.weight)[[0, -1]]  # the largest and the smallest singular value
        tensor([1.0000, 1.0000], grad_fn=...)

    Source: Anil, Lucas, Grosse 2019, "Sorting out Lipschitz function approximation", for orthogonal weights; Higham,
    "Functions of Matrices" (2008), Theorem 8.4, for the nearest one; Tsuzuku, Sato, Sugiyama 2018, "Lipschitz-Margin
    Training", for the factor of overlapping windows; docs/numerics/lipschitz.md.
    """
    if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        raise TypeError(f"module must be a Linear, Conv or ConvTranspose layer, got {type(module).__name__}")
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"{name!r} of module {type(module).__name__} is parametrized already")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"module {type(module).__name__} has no parameter or buffer named {name!r}")
    if is_lazy(weight):
        raise ValueError(f"name {name!r} is a parameter that is not initialized yet: run the lazy module once before")
    if not weight.is_floating_point():
        raise TypeError(f"{name} must have a real floating-point dtype, got {weight.dtype}")
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"{name} must be a matrix or a kernel with elements, got shape {tuple(weight.shape)}")
    groups, scale = 1, 1.0
    if not isinstance(module, nn.Linear):
        if module.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros' for an orthogonal weight, got {module.padding_mode!r}")
        groups = module.groups
        scale = windows_per_input(module.kernel_size, module.stride, module.dilation) ** -0.5
    parametrize.register_parametrization(module, name, Orthogonal(groups, scale))
    make_picklable(module)
    return module


def parametrization_of(module: nn.Module, name: str) -> Orthogonal | None:
    """The orthogonal parametrization of the parameter ``name``, or None."""
    if parametrize.is_parametrized(module, name):
        for parametrization in cast(Any, module.parametrizations)[name]:
            if isinstance(parametrization, Orthogonal):
                return parametrization
    return None


class OrthogonalLinear(nn.Linear):
    """:class:`torch.nn.Linear` with an orthogonal weight, see :func:`orthogonal`; the same arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        orthogonal(self)


class OrthogonalConv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` with an orthogonal weight, see :func:`orthogonal`; the same arguments.

    ``OrthogonalConv2d(c, 4 * c, 2, stride=2)`` halves a feature map and keeps its norm and that of gradients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        orthogonal(self)
