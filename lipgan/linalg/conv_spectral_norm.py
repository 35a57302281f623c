"""The operator norm of a convolution, and a certified upper bound on it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import check_count, check_generator
from lipgan._dtypes import accumulation_dtype
from lipgan.linalg.conv_operator import ConvOperator, power_iteration
from lipgan.linalg.spectral_norm_bound import gram_bound, power_of_two, round_up

__all__ = ["conv_spectral_norm", "conv_spectral_norm_bound"]

# Entries of the frequency blocks that conv_spectral_norm_bound iterates on at a time: 64 MiB of complex128.
_CHUNK_ENTRIES = 2**22


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
    check_generator(generator)
    weight = weight.to(accumulation_dtype(weight.dtype))
    # Squares of entries beyond 1e19 or below 1e-19 leave the range of float32.
    scale = power_of_two(weight.detach().abs().amax())
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
    dtype = accumulation_dtype(weight.dtype)
    wide = weight.double()
    scale = power_of_two(wide.detach().abs().amax())
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
    bound = torch.stack([gram_bound(part, n_iterations).amax() for part in parts]).amax()
    total = torch.linalg.vector_norm(wide.detach().abs().flatten(2).sum(-1))
    bound = bound * (math.sqrt(repeats / aliases) * (1 + 4 * eps)) + dft_error * math.sqrt(repeats) * total
    return round_up(bound * scale, total == 0, dtype)
