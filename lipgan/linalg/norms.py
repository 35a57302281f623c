"""Norms of matrices and of convolutions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lipgan._checks import check_choice, check_count

__all__ = ["conv_spectral_norm", "conv_spectral_norm_bound", "spectral_norm_bound"]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_PADDING_MODES = ("zeros", "circular", "reflect", "replicate")

# Entries of the frequency blocks that conv_spectral_norm_bound iterates on at a time: 64 MiB of complex128.
_CHUNK_ENTRIES = 2**22


def _check_matrix(name: str, a: object) -> None:
    if not isinstance(a, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(a).__name__}")
    if not a.is_floating_point():
        raise TypeError(f"{name} must have a real floating-point dtype, got {a.dtype}")


def _power_of_two(x: Tensor) -> Tensor:
    """The power of two in (x/2, x]; 1 where x is 0 or NaN. Dividing by it is exact."""
    mantissa, _ = torch.frexp(x)
    return torch.where(x > 0, x / (2 * mantissa), 1.0)


def _gram_bound(x: Tensor, n_iterations: int) -> Tensor:
    """Upper bound on the largest singular value of each ``x [..., p, n]``, ``p <= n``, float64 or complex128.

    The names are those of docs/numerics/spectral_norm_bound.md: ``scale`` is ``s_i``, ``error`` is ``e_i``.
    """
    # A complex product is four real ones, so its error is that of twice as many terms times sqrt(2).
    eps = torch.finfo(torch.float64).eps * (4 if x.is_complex() else 1)
    largest = x.detach().abs().amax((-2, -1))
    first_scale = _power_of_two(largest)
    x = x / first_scale[..., None, None]
    norm = torch.linalg.vector_norm(x.detach(), dim=(-2, -1))
    scales: list[Tensor] = []
    errors: list[Tensor] = []
    for _ in range(n_iterations):
        error = (x.shape[-1] + 4) * eps * norm.detach().square()
        x = x @ x.mH
        norm = torch.linalg.vector_norm(x, dim=(-2, -1))
        scale = _power_of_two(norm.detach())
        x, norm = x / scale[..., None, None], norm / scale
        scales.append(scale)
        errors.append(error / scale)
    # The square roots below have no finite derivative at 0, so a zero matrix goes through them as 1.
    is_zero = largest == 0
    bound = norm.masked_fill(is_zero, 1.0) * (1 + (x.shape[-2] * x.shape[-1] + 4) * eps)
    for scale, error in zip(reversed(scales), reversed(errors), strict=True):
        bound = torch.sqrt(scale * (bound + error))
    bound = (bound * (1 + 4 * eps)).masked_fill(is_zero, 0.0) * first_scale
    return torch.where(largest.isfinite(), bound, largest)


def _round_up(bound: Tensor, is_zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a float64 bound to ``dtype`` without going below it; 0 stays 0 where ``is_zero``."""
    info = torch.finfo(dtype)
    if dtype != torch.float64:
        bound = (bound * (1 + info.eps)).to(dtype)
    # Where the result is subnormal a rounding is absolute, at most half of the smallest positive number.
    return torch.where(is_zero, bound, bound + info.smallest_normal * info.eps)


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def spectral_norm_bound(a: Tensor, *, n_iterations: int = 10) -> Tensor:
    r"""Certified upper bound on the largest singular value, by Gram iteration.

    With ``t = n_iterations`` and ``q = 2**(t + 1)`` the result is the Schatten norm
    ``(sum_i sigma_i**q)**(1/q)``, inflated by a bound on every rounding error made, so that

        ``sigma <= spectral_norm_bound(a) <= rank**(1/q) * sigma * (1 + rounding)``

    holds for the floating-point numbers returned: rank 1000 and 10 iterations give a factor of 1.0034.
    It costs ``t`` products of matrices of the smaller side, in float64; no singular vectors, no iteration to
    converge. The derivative is ``U diag((sigma_i / bound)**(q - 1)) V^T``, which tends to ``u v^T``.

    Args:
        a: ``(..., m, n)``, real. Computed in float64 whatever the dtype.
        n_iterations: number of Gram products, at least 1.

    Returns:
        ``(...)``; float64 for float64 and float32 for float32, float16 and bfloat16. 0 for a zero or empty
        matrix, NaN where ``a`` has a NaN, inf where it has an infinity and no NaN.

    Raises:
        TypeError: ``a`` is not a real floating-point tensor, or ``n_iterations`` is not an int.
        ValueError: ``a`` has fewer than two dimensions, or ``n_iterations < 1``.

    Source: Delattre, Barthelemy, Araujo, Allauzen, "Efficient Bound of Lipschitz Constant for Convolutional
    Layers by Gram Iteration" (ICML 2023), Algorithm 1; the rounding-error terms are derived in
    docs/numerics/spectral_norm_bound.md.

    Example::

        >>> spectral_norm_bound(torch.diag(torch.tensor([3.0, 4.0])))
        tensor(4.0000)
    """
    _check_matrix("a", a)
    if a.ndim < 2:
        raise ValueError(f"a must have at least two dimensions, got shape {tuple(a.shape)}")
    check_count("n_iterations", n_iterations)
    dtype = _result_dtype(a.dtype)
    wide = a.double()
    if wide.shape[-2] > wide.shape[-1]:
        wide = wide.mT
    if wide.shape[-2] == 0:
        return wide.sum((-2, -1)).to(dtype)
    is_zero = (wide.detach() == 0).all(-1).all(-1)
    return _round_up(_gram_bound(wide, n_iterations), is_zero, dtype)


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
        _check_matrix("weight", weight)
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

    def __call__(self, weight: Tensor, x: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        padding = tuple(before for before, _ in self.padding)
        # A convolution in a half type would spoil the vectors of the power iteration.
        with torch.autocast(weight.device.type, enabled=False):
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

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """The transpose applied to ``y``, of ``output_shape``."""
        dims = len(self.kernel_size)
        padding = tuple(before for before, _ in self.padding)
        with torch.autocast(weight.device.type, enabled=False):
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


def conv_spectral_norm(
    weight: Tensor,
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    n_iterations: int = 100,
    generator: torch.Generator | None = None,
    padding_mode: str = "zeros",
) -> Tensor:
    """Operator norm of a convolution on inputs of a given size, by power iteration.

    This is the largest singular value of the matrix that takes a flattened input to the flattened output,
    which the largest singular value of the kernel reshaped to ``(C_out, C_in * k * k)`` is not. The value
    never exceeds the true norm but for rounding; with ``d`` input elements, the mean of its relative error
    over random starts is at most ``0.44 log(d) / (n_iterations - 1)``, and it falls geometrically where the
    first singular value stands apart. It is ``<u, A v>`` with ``u`` and ``v`` constant, so its gradient is
    that of the norm once converged.

    Args:
        weight: ``(C_out, C_in / groups, *kernel)``, or ``(C_in, C_out / groups, *kernel)`` when
            ``transposed``; one to three spatial dimensions. float64, float32, or half types, which are
            widened to float32.
        input_size: spatial size of the input, an int or one int per spatial dimension.
        stride, padding, dilation, groups, output_padding, padding_mode: as in torch.nn.Conv2d and
            ConvTranspose2d, ``padding`` "valid" and "same" and all four padding modes included.
        transposed: whether ``weight`` is that of a transposed convolution.
        n_iterations: number of products with the operator and its transpose, at least 1.
        generator: source of the random start.

    Returns:
        A 0-dim tensor, float32 or float64. NaN or inf if the weight is not finite.

    Raises:
        TypeError: ``weight`` is not a real floating-point tensor, or an integer argument is not an int.
        ValueError: an argument is out of its range or has the wrong length.

    Source: Miyato et al. 2018, Algorithm 1, with convolutions in place of matrices; the bound on the error is
    Kuczynski and Wozniakowski 1992, Theorem 3.1. See docs/numerics/conv_spectral_norm.md.

    Example::

        >>> conv_spectral_norm(torch.ones(1, 1, 3, 3), (8, 8), padding=1)
        tensor(8.2909)
    """
    operator = ConvOperator.create(
        weight,
        input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        transposed=transposed,
        output_padding=output_padding,
        padding_mode=padding_mode,
    )
    check_count("n_iterations", n_iterations)
    weight = weight.to(_result_dtype(weight.dtype))
    # Squares of entries beyond 1e19 or below 1e-19 leave the range of float32.
    scale = _power_of_two(weight.detach().abs().amax())
    weight = weight / scale
    options: dict[str, Any] = {"generator": generator, "dtype": weight.dtype, "device": weight.device}
    u = torch.randn(operator.output_shape, **options)
    v = torch.randn(operator.input_shape, **options)
    u, v = u / torch.linalg.vector_norm(u), v / torch.linalg.vector_norm(v)
    u, v = power_iteration(operator, weight, u, v, n_iterations)
    return (u * operator(weight, v)).sum() * scale


def _frequencies(size: int, stride: int, dilation: int, kernel_size: int, half: bool, like: Tensor) -> Tensor:
    """``exp(2 pi i j d k / size)`` as ``[kernel, stride, size / stride]``, for ``j = a size / stride + b``.

    ``half`` leaves out the ``b`` whose blocks are the complex conjugates of others.
    """
    blocks = size // stride
    kept = blocks // 2 + 1 if half else blocks
    j = blocks * torch.arange(stride, device=like.device)[:, None] + torch.arange(kept, device=like.device)
    tap = dilation * torch.arange(kernel_size, device=like.device)
    # Reduced as integers, so that the angle has the error of one multiplication and one division.
    turns = (tap[:, None, None] * j) % size
    angle = turns.double() * (2 * math.pi) / size
    return torch.complex(angle.cos(), angle.sin())


def conv_spectral_norm_bound(
    weight: Tensor,
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    n_iterations: int = 10,
    padding_mode: str = "zeros",
) -> Tensor:
    """Certified upper bound on the operator norm of a convolution, by Gram iteration on its frequency blocks.

    A convolution with circular padding is block diagonal in the Fourier basis; one with zero padding ``p`` on
    size ``n`` is a part of a circular one on size ``n + p``; a strided one is a part of the samples of these.
    The largest block norm bounds the operator norm, and :func:`spectral_norm_bound` bounds the blocks, with
    rounding errors included. It is exact up to the factor of that function for circular padding that keeps
    the size, and approaches the operator norm from above for zero padding as the input grows.

    The blocks take 16 bytes times ``C_in * C_out / groups`` times half the number of positions of the feature
    map.

    Args:
        weight, input_size, stride, padding, dilation, groups, transposed, output_padding: as in
            :func:`conv_spectral_norm`. Computed in float64 whatever the dtype.
        n_iterations: number of Gram products, at least 1.
        padding_mode: "zeros" or "circular".

    Returns:
        A 0-dim tensor, differentiable; float64 for float64 and float32 for float32 and half types.

    Raises:
        TypeError, ValueError: as :func:`conv_spectral_norm`; also for the padding modes "reflect" and
            "replicate", which are no part of a circular convolution.

    Source: Delattre et al. 2023, Section 4 (circular); Delattre, Barthelemy, Allauzen, "Spectral Norm of
    Convolutional Layers with Circular and Zero Paddings" (2024), whose spatial iteration for zero padding is
    replaced by an embedding derived in docs/numerics/spectral_norm_bound.md.

    Example::

        >>> conv_spectral_norm_bound(torch.ones(1, 1, 3, 3), (8, 8), padding=1)
        tensor(9.0000)
    """
    operator = ConvOperator.create(
        weight,
        input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        transposed=transposed,
        output_padding=output_padding,
        padding_mode=padding_mode,
    )
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(f"padding_mode must be 'zeros' or 'circular' for a bound, got {padding_mode!r}")
    check_count("n_iterations", n_iterations)
    dtype = _result_dtype(weight.dtype)
    wide = weight.double()
    scale = _power_of_two(wide.detach().abs().amax())
    wide = wide / scale
    eps = torch.finfo(torch.float64).eps
    dims = len(operator.kernel_size)

    # A transposed convolution has the norm of its adjoint, the convolution from its output to its input.
    large, small = operator.input_shape[1:], operator.output_shape[1:]
    if transposed:
        large, small = small, large
    rows = wide.shape[0] // groups
    # [groups, rows, columns, *kernel]
    blocks = wide.reshape(groups, rows, *wide.shape[1:]).to(torch.complex128)
    repeats = 1  # how often the outputs can hold one and the same output of the circular convolution
    aliases = 1
    dft_error = 8 * eps
    for dim in range(dims):
        n, d, k, s = large[dim], operator.dilation[dim], operator.kernel_size[dim], operator.stride[dim]
        if padding_mode == "circular":
            period, step = n, math.gcd(n, s)
            repeats *= -(-small[dim] // (period // step))
        else:
            # Zeros beyond the reach of the kernel only add outputs that are 0.
            period = n + min(max(operator.padding[dim]), d * (k - 1))
            period, step = -(-period // s) * s, s
        aliases *= step
        waves = _frequencies(period, step, d, k, dim == dims - 1, wide)
        blocks = torch.tensordot(blocks, waves, dims=([3], [0]))
        dft_error += (4 * k + 16) * eps
    # [groups, rows, columns, s1, f1, ..] -> [f1, .., groups, rows, s1, .., columns]
    order = [*range(4, 4 + 2 * dims, 2), 0, 1, *range(3, 3 + 2 * dims, 2), 2]
    blocks = blocks.permute(order).flatten(dims + 2).flatten(0, dims)
    if blocks.shape[-2] > blocks.shape[-1]:
        blocks = blocks.mH
    chunk = max(1, _CHUNK_ENTRIES // (blocks.shape[-2] * blocks.shape[-1]))
    parts = torch.split(blocks, chunk)
    bound = torch.stack([_gram_bound(part, n_iterations).amax() for part in parts]).amax()
    total = torch.linalg.vector_norm(wide.detach().abs().flatten(2).sum(-1))
    bound = bound * (math.sqrt(repeats / aliases) * (1 + 4 * eps)) + dft_error * math.sqrt(repeats) * total
    return _round_up(bound * scale, total == 0, dtype)
