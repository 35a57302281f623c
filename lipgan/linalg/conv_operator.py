"""A convolution as a linear operator, with its adjoint."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lipgan._checks import check_choice, check_count, check_real
from lipgan._dtypes import without_autocast

__all__ = ["ConvOperator", "power_iteration"]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


def _tuple(name: str, value: int | Sequence[int], dims: int, minimum: int) -> tuple[int, ...]:
    """One integer per spatial dimension; a single integer serves them all."""
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise ValueError(f"{name} must have {dims} entries, one per spatial dimension, got {value!r}")
    for entry in values:
        if not isinstance(entry, int) or isinstance(entry, bool):
            raise TypeError(f"{name} must consist of ints, got {value!r}")
        if entry < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return values


@dataclass(frozen=True)
class ConvOperator:
    """A convolution without bias as a linear operator on one sample, ``(C_in, *in) -> (C_out, *out)``.

    Calling it applies it, ``adjoint`` applies its transpose; both take the weight first, and the weight has
    the layout of the torch layer. :meth:`create` checks its arguments as torch.nn.functional.conv2d would.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after, for each spatial dimension
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    padding_mode: str

    @classmethod
    def create(
        cls,
        weight: Tensor,
        input_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
        padding_mode: str = "zeros",
    ) -> "ConvOperator":
        """The operator of ``weight`` on feature maps of the spatial size ``input_size``."""
        check_real("weight", weight)
        if weight.ndim not in (3, 4, 5):
            raise ValueError(f"weight must have 3, 4 or 5 dimensions, got shape {tuple(weight.shape)}")
        if weight.numel() == 0:
            raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
        dims = weight.ndim - 2
        kernel = tuple(weight.shape[2:])
        size = _tuple("input_size", input_size, dims, 1)
        strides = _tuple("stride", stride, dims, 1)
        dilations = _tuple("dilation", dilation, dims, 1)
        extra = _tuple("output_padding", output_padding, dims, 0)
        check_count("groups", groups)
        if weight.shape[0] % groups:
            raise ValueError(f"groups must divide the {weight.shape[0]} rows of weight, got {groups}")
        check_choice("padding_mode", padding_mode, _PADDING_MODES)
        if transposed and padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros' when transposed, got {padding_mode!r}")
        if not transposed and any(extra):
            raise ValueError(f"output_padding needs transposed=True, got {output_padding!r}")
        if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
            raise ValueError(f"output_padding must be below stride or dilation, got {output_padding!r}")

        reach = tuple(d * (k - 1) for d, k in zip(dilations, kernel, strict=True))
        if isinstance(padding, str):
            if padding not in ("valid", "same") or transposed:
                raise ValueError(f"padding must be integers{'' if transposed else ', valid or same'}, got {padding!r}")
            if padding == "same" and any(s != 1 for s in strides):
                raise ValueError(f"padding 'same' needs stride 1, got {stride!r}")
            pads = tuple((r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach)
        else:
            pads = tuple((p, p) for p in _tuple("padding", padding, dims, 0))
        for n, pad in zip(size, pads, strict=True):
            limit = {"circular": n, "reflect": n - 1}.get(padding_mode)
            if limit is not None and max(pad) > limit:
                raise ValueError(f"padding must be at most {limit} in mode {padding_mode!r}, got {padding!r}")

        if transposed:
            out = tuple(
                (n - 1) * s - before - after + r + 1 + e
                for n, s, (before, after), r, e in zip(size, strides, pads, reach, extra, strict=True)
            )
            channels_in, channels_out = weight.shape[0], weight.shape[1] * groups
        else:
            out = tuple(
                (n + before + after - r - 1) // s + 1
                for n, s, (before, after), r in zip(size, strides, pads, reach, strict=True)
            )
            channels_in, channels_out = weight.shape[1] * groups, weight.shape[0]
        if min(out) < 1:
            raise ValueError(f"input_size {size} gives an output of size {out}")
        return cls(
            (channels_in, *size),
            (channels_out, *out),
            kernel,
            strides,
            pads,
            dilations,
            groups,
            transposed,
            extra,
            padding_mode,
        )

    @property
    def _conv_pads(self) -> bool:
        """Whether torch's convolution can do the padding: by zeros, equally on both sides."""
        return self.padding_mode == "zeros" and all(before == after for before, after in self.padding)

    @without_autocast  # a convolution in a half type would spoil the vectors of the power iteration
    def __call__(self, weight: Tensor, x: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        padding = tuple(before for before, _ in self.padding)
        x = x[None]
        if self.transposed:
            y = _CONV_TRANSPOSE[dims](
                x, weight, None, self.stride, padding, self.output_padding, self.groups, self.dilation
            )
        elif self._conv_pads:
            y = _CONV[dims](x, weight, None, self.stride, padding, self.dilation, self.groups)
        else:
            widths = [width for pair in reversed(self.padding) for width in pair]
            x = F.pad(x, widths, "constant" if self.padding_mode == "zeros" else self.padding_mode)
            y = _CONV[dims](x, weight, None, self.stride, 0, self.dilation, self.groups)
        return y[0]

    @without_autocast
    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """The transpose applied to ``y``, of ``output_shape``."""
        dims = len(self.kernel_size)
        padding = tuple(before for before, _ in self.padding)
        y = y[None]
        if self.transposed:
            x = _CONV[dims](y, weight, None, self.stride, padding, self.dilation, self.groups)
            # An output_padding of a stride or more makes the convolution longer than the input was.
            for dim, n in enumerate(self.input_shape[1:], 2):
                x = x.narrow(dim, 0, n)
            return x[0]
        if not self._conv_pads:
            padding = (0,) * dims
        # The rows of x after the last one that the strided convolution reads.
        unread = tuple(
            (n + (2 * p if self._conv_pads else before + after) - d * (k - 1) - 1) % s
            for n, p, (before, after), d, k, s in zip(
                self.input_shape[1:],
                padding,
                self.padding,
                self.dilation,
                self.kernel_size,
                self.stride,
                strict=True,
            )
        )
        x = _CONV_TRANSPOSE[dims](y, weight, None, self.stride, padding, unread, self.groups, self.dilation)
        return (x if self._conv_pads else self._pad_adjoint(x))[0]

    def _pad_adjoint(self, x: Tensor) -> Tensor:
        for dim, (n, pad) in enumerate(zip(self.input_shape[1:], self.padding, strict=True), 2):
            if self.padding_mode == "zeros":
                x = x.narrow(dim, pad[0], n)
                continue
            source = torch.arange(n, dtype=torch.float64, device=x.device)
            index = F.pad(source[None], pad, self.padding_mode)[0].long()
            shape = [*x.shape[:dim], n, *x.shape[dim + 1 :]]
            x = x.new_zeros(shape).index_add(dim, index, x)
        return x


def power_iteration(
    operator: ConvOperator, weight: Tensor, u: Tensor, v: Tensor, n_iterations: int, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``u = A v / |A v|``, then ``v = A^T u / |A^T u|``, ``n_iterations`` times, without a gradient.

    A vector whose new norm is at most ``eps`` or not finite stays as it is: a zero or non-finite weight does
    not spoil unit vectors that later weights go on from.
    """

    def unit(new: Tensor, old: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(new)
        return torch.where((norm > eps) & (norm < math.inf), new / norm, old)

    with torch.no_grad():
        for _ in range(n_iterations):
            u = unit(operator(weight, v), u)
            v = unit(operator.adjoint(weight, u), v)
    return u, v
