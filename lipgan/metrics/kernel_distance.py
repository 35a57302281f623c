r"""The kernel distance, or "KID": the squared maximum mean discrepancy of features, without bias.

``mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)``, on average over random subsets.
Its expectation is the squared distance of the distributions whatever the number of samples, so it can be negative.

All subsets share one pass over the blocks of the kernel matrices where that is less work than a pass for each: with
the 0/1 matrix ``A [n, subsets]`` of who is in which subset, the sums are the diagonal of ``A^T K A``. No ``n x n``
matrix is made.

Of float32 and half-type features on a CPU, the polynomial kernel takes the products of centred features in float32 and
all else in float64: docs/numerics/kernel_distance.md has the bound.

:func:`cmmd` is the estimate with the pairs ``i = j``, by the Gaussian kernel and with constants of its own.

Source: Binkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs" (2018), sec. 4; Gretton, Borgwardt, Rasch,
Schoelkopf, Smola, "A Kernel Two-Sample Test" (2012), eq. 3, and eq. 5 with the pairs ``i = j``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import as_number, check_choice, check_count, check_generator, check_positive
from lipgan._dtypes import without_autocast
from lipgan.metrics._inputs import Array, as_pair, left_to
from lipgan.metrics.metric import TwoSides

__all__ = ["CMMD", "KernelDistance", "cmmd", "kernel_distance"]

# Rows and columns of a block of a kernel matrix: 16 MiB of float64. Products of fewer columns are slower.
_ROWS, _COLUMNS = 1024, 2048

# A kernel matrix of one set is taken in strips from the diagonal to the right, of which the square on the diagonal is
# computed twice. With this many strips that is little; with fewer rows than these, products are slower, and with more
# nothing is gained. On a GPU a strip is some ten launches, which take as long as the products of a thousand rows.
_STRIPS, _LEAST_ROWS, _MOST_ROWS = 8, 128, 384
_LEAST_ROWS_OF_GPU, _MOST_ROWS_OF_GPU = 1024, 2048

# Samples of a subset from which on products may be taken in float32: their rounding is lost in the mean over pairs.
_MANY = 256

# Features up to which products are taken in float32: all of their sums stay far from its largest number.
_LARGEST = 2.0**40

# Rows that are widened at a time where features are centred: they stay in a second-level cache.
_WIDENED = 32

# Squared lengths, in widths of the Gaussian, up to which their rounding moves its exponent by less than 1e-9.
_FAR = 2.0**20

# Columns of the product with the features that a subset costs in the product with the memberships, which is in float64
# and narrow: measured for blocks as above.
_SUBSET_COLUMNS = {torch.float64: 2.3, torch.float32: 4.6}

_KERNELS = ("polynomial", "rbf")


@dataclass(frozen=True)
class _Rows:
    """Samples; where ``offsets`` are there, ``x.y = rows(x).rows(y) + offsets(x) + offsets(y)`` up to rounding."""

    rows: Tensor  # [n, d]
    offsets: Tensor | None = None  # [n], float64
    far: bool = False  # some of either side are so long that rounding of products shows in a Gaussian's exponent

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Tensor) -> _Rows:
        return replace(self, rows=self.rows[index], offsets=None if self.offsets is None else self.offsets[index])


_Kernel = Callable[[_Rows, _Rows], Tensor]


def _centred(x: Tensor, y: Tensor) -> tuple[_Rows, _Rows]:
    """Both sides minus a common centre c, in float32: ``x.y = (x - c).(y - c) + c.(x - c / 2) + c.(y - c / 2)``."""
    # Any centre serves, so its rounding costs nothing.
    centre = (x.float().sum(0) + y.float().sum(0)) / (len(x) + len(y))
    wide = centre.double()
    sides = []
    for side in (x, y):
        parts = side.split(_WIDENED)  # type: ignore[no-untyped-call]
        offsets = torch.cat([rows.double() @ wide for rows in parts]) - 0.5 * wide.square().sum()
        sides.append(_Rows(side.float() - centre, offsets))
    return sides[0], sides[1]


def _takes_float32(x: Tensor, y: Tensor, kernel: str, samples: int) -> bool:
    """Whether products of these features may be taken in float32: in that itself, of small numbers, for many pairs."""
    narrow = all(side.dtype != torch.float64 and side.device.type == "cpu" for side in (x, y))
    if not narrow or samples < _MANY or kernel != "polynomial" or torch.get_float32_matmul_precision() != "highest":
        return False
    return all(float(side.abs().max()) <= _LARGEST for side in (x, y))


def _kernel(name: str, dim: int, degree: int, gamma: float | None, coef: float, sigma: float) -> _Kernel:
    """Of ``x [m, d]`` and ``y [n, d]`` the matrix ``[m, n]``, float64."""
    check_choice("kernel", name, _KERNELS)
    check_count("degree", degree)
    for argument, value in (("gamma", gamma), ("coef", coef)):
        if value is not None:
            as_number(argument, value)
    check_positive("sigma", sigma)
    factor = 1 / dim if gamma is None else gamma

    @without_autocast
    def polynomial(x: _Rows, y: _Rows) -> Tensor:
        product = (x.rows @ y.rows.T).double()
        if x.offsets is None or y.offsets is None:
            return product.mul_(factor).add_(coef).pow_(degree)
        return product.mul_(factor).add_(y.offsets * factor + coef).add_((x.offsets * factor)[:, None]).pow_(degree)

    def rbf(x: _Rows, y: _Rows) -> Tensor:
        if x.far:
            # The square of a small distance far from the centre would be the rounding of the others.
            direct = "donot_use_mm_for_euclid_dist"
            squares = torch.cdist(x.rows, y.rows, compute_mode=direct).square_()
        else:
            lengths = x.rows.square().sum(1)[:, None] + y.rows.square().sum(1)
            # Rounding makes the square of a small distance negative.
            squares = torch.addmm(lengths, x.rows, y.rows.T, alpha=-2).clamp_(min=0)
        return squares.mul_(-0.5 / sigma**2).exp_()

    return polynomial if name == "polynomial" else rbf


def _sums(kernel: _Kernel, x: _Rows, in_x: Tensor, y: _Rows, in_y: Tensor) -> Tensor:
    """Of every subset the sum of ``k(x_i, y_j)`` over its samples. ``in_x [n, subsets]`` and ``in_y`` are 0 or 1."""
    sums = torch.zeros(in_x.shape[1], dtype=torch.float64, device=in_x.device)
    for j in range(0, len(y), _COLUMNS):
        columns, members = y[j : j + _COLUMNS], in_y[j : j + _COLUMNS]
        for i in range(0, len(x), _ROWS):
            block = kernel(x[i : i + _ROWS], columns)
            sums += (block @ members).mul_(in_x[i : i + _ROWS]).sum(0)
    return sums


def _sums_within(kernel: _Kernel, x: _Rows, in_x: Tensor) -> Tensor:
    """Of every subset the sum of ``k(x_i, x_j)`` over its pairs of two samples, in both orders."""
    sums = torch.zeros(in_x.shape[1], dtype=torch.float64, device=in_x.device)
    on_cpu = x.rows.device.type == "cpu"
    least, most = (_LEAST_ROWS, _MOST_ROWS) if on_cpu else (_LEAST_ROWS_OF_GPU, _MOST_ROWS_OF_GPU)
    step = min(max(len(x) // _STRIPS, least), most)
    for i in range(0, len(x), step):
        for j in range(i, len(x), _COLUMNS):
            block = kernel(x[i : i + step], x[j : j + _COLUMNS])
            if j == i:
                # The square on the diagonal has its pairs in both orders, all else in one.
                square = block[:, : len(block)].mul_(0.5)
                square.diagonal().zero_()
            sums += (block @ in_x[j : j + _COLUMNS]).mul_(in_x[i : i + step]).sum(0)
    return 2 * sums


def _estimates(kernel: _Kernel, x: _Rows, in_x: Tensor, y: _Rows, in_y: Tensor) -> Tensor:
    """Of every subset the squared discrepancy, ``[subsets]``."""
    m, n = in_x.sum(0), in_y.sum(0)
    within = _sums_within(kernel, x, in_x) / (m * (m - 1)) + _sums_within(kernel, y, in_y) / (n * (n - 1))
    return within - 2 * _sums(kernel, x, in_x, y, in_y) / (m * n)


def _subsets(n: int, subsets: int, size: int, generator: torch.Generator | None) -> Tensor:
    """``[subsets, size]``, every row different numbers below ``n``."""
    device = "cpu" if generator is None else generator.device
    draws = [torch.randperm(n, generator=generator, device=device)[:size] for _ in range(subsets)]
    return torch.stack(draws)


def _membership(chosen: Tensor, n: int, device: torch.device) -> Tensor:
    """``[n, subsets]``, 1 where a sample is in a subset."""
    return torch.zeros(n, len(chosen), dtype=torch.float64).scatter_(0, chosen.cpu().T, 1.0).to(device)


def kernel_distance(
    real: Array,
    fake: Array,
    subsets: int = 100,
    subset_size: int | None = 1000,
    *,
    kernel: str = "polynomial",
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    sigma: float = 10.0,
    generator: torch.Generator | None = None,
    protocol: str | None = None,
) -> tuple[float, float]:
    """The squared maximum mean discrepancy of two sets of features, the "KID", without bias.

    Args:
        real: ``[n1, d]``, float64, float32 or a half type; NumPy array or tensor, like ``fake``. Computed in float64,
            except that the polynomial kernel takes products of features in float32 where both sides are narrow, on a
            CPU, for subsets of 256 samples and more. See docs/numerics/kernel_distance.md for what that adds.
        fake: ``[n2, d]``.
        subsets: number of random subsets that are averaged.
        subset_size: samples of each side in a subset, all different; None for all samples, once, whatever ``subsets``.
        kernel: "polynomial" for ``(gamma x.y + coef)^degree``, "rbf" for ``exp(-|x - y|^2 / (2 sigma^2))``.
        degree, gamma, coef: of the polynomial; ``gamma`` None for ``1 / d``.
        sigma: width of the Gaussian.
        generator: draws the subsets.
        protocol: a name of :mod:`lipgan.metrics.protocols`: the distance as that package computes it.

    Returns:
        Mean and standard deviation (over ``subsets``, as numpy.std) of the estimates.

    Raises:
        TypeError: an argument is not an array or tensor of real floating-point numbers; a count is not an int.
        ValueError: another shape, fewer than ``subset_size`` or 2 samples, a NaN or an infinity, values whose kernel
            leaves the range of float64, or an unknown kernel; an unknown protocol, one without this distance, or one
            beside an argument that it decides.

    Example::

        >>> x = torch.tensor([[0.0], [2.0]])
        >>> kernel_distance(x, x + 1, subset_size=None, degree=1)
        (-1.0, 0.0)
    """
    x, y = as_pair("real", real, "fake", fake)
    if protocol is not None:
        chosen = {"subsets": subsets, "subset_size": subset_size, "kernel": kernel, "degree": degree}
        package = left_to(protocol, "kid", kernel_distance, **chosen, gamma=gamma, coef=coef, sigma=sigma)
        assert package.subsets is not None
        subsets, degree, subset_size = package.subsets, package.degree, package.size_of_subsets(min(len(x), len(y)))
    apply = _kernel(kernel, x.shape[1], degree, gamma, coef, sigma)
    check_generator(generator)
    check_count("subsets", subsets)
    if subset_size is not None:
        check_count("subset_size", subset_size)
        if subset_size < 2:
            raise ValueError(f"subset_size must be at least 2, got {subset_size}")
    for name, rows in (("real", x), ("fake", y)):
        if len(rows) < 2:
            raise ValueError(f"{name} must have at least 2 samples, got {len(rows)}")
    for name, rows in (("real", x), ("fake", y)):
        if subset_size is not None and len(rows) < subset_size:
            advice = f"pass subset_size={min(len(x), len(y))} or less"
            if protocol is not None:
                advice = f"protocol {protocol!r} sets it: leave out protocol and {advice}"
            raise ValueError(
                f"{name} must have at least {subset_size} samples for subset_size={subset_size}, got {len(rows)}; "
                + advice
            )
    samples = min(len(x), len(y)) if subset_size is None else subset_size
    first, second = _prepared(x, y, kernel, sigma, samples)
    if subset_size is None:
        ones_x, ones_y = (torch.ones(len(side), 1, dtype=torch.float64, device=x.device) for side in (x, y))
        estimates = _estimates(apply, first, ones_x, second, ones_y)
    else:
        in_x, in_y = (_subsets(len(rows), subsets, subset_size, generator) for rows in (x, y))
        estimates = _estimates_of_subsets(apply, first, in_x, second, in_y)
    return _mean_and_deviation(estimates)


def cmmd(real: Array, fake: Array, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """The distance "CMMD" of two sets of features: ``scale`` times the squared maximum mean discrepancy, with its bias.

    ``scale (mean_{i, j} k(x_i, x_j) + mean_{i, j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j))`` over all pairs, ``i = j``
    among them, of ``k(x, y) = exp(-|x - y|^2 / (2 sigma^2))``. It is not negative, and 0 for equal sets. Of m and n
    samples of one distribution it expects ``scale (1 / m + 1 / n) (1 - E k(x, x'))``.

    Args:
        real: ``[n1, d]``, float64, float32 or a half type; NumPy array or tensor, like ``fake``. Computed in float64.
            Published numbers are of the features "clip", the embeddings of CLIP ViT-L/14 at 336 pixels of length 1;
            lengths are taken as they are.
        fake: ``[n2, d]``.
        sigma: width of the Gaussian.
        scale: what the squared discrepancy is multiplied by.

    Raises:
        TypeError: an argument is not an array or tensor of real floating-point numbers.
        ValueError: another shape, no samples, a NaN or an infinity; a ``sigma`` or ``scale`` that is not positive.

    Source: Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation" (2024,
        arXiv:2401.09603), and the constants of the code published with it, which computes in float32.

    Example::

        >>> x = torch.eye(2)
        >>> round(cmmd(x, -x), 4)
        19.8013
    """
    x, y = as_pair("real", real, "fake", fake)
    check_positive("scale", scale)
    apply = _kernel("rbf", x.shape[1], 1, None, 0.0, sigma)
    first, second = _prepared(x, y, "rbf", sigma, min(len(x), len(y)))
    ones_x, ones_y = (torch.ones(len(side), 1, dtype=torch.float64, device=x.device) for side in (x, y))
    m, n = len(x), len(y)
    # The kernel of a sample with itself is 1.
    within = (_sums_within(apply, first, ones_x) + m) / m**2 + (_sums_within(apply, second, ones_y) + n) / n**2
    estimate = within - 2 * _sums(apply, first, ones_x, second, ones_y) / (m * n)
    # It is a squared length, which rounding may make negative.
    return scale * max(0.0, float(estimate))


def distance_of_subsets(
    real: Tensor,
    fake: Tensor,
    in_real: Tensor,
    in_fake: Tensor,
    *,
    kernel: str = "polynomial",
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    sigma: float = 10.0,
) -> tuple[float, float]:
    """:func:`kernel_distance` with subsets that are given: ``in_real [subsets, size]``, rows of ``real``."""
    x, y = as_pair("real", real, "fake", fake)
    apply = _kernel(kernel, x.shape[1], degree, gamma, coef, sigma)
    first, second = _prepared(x, y, kernel, sigma, in_real.shape[1])
    return _mean_and_deviation(_estimates_of_subsets(apply, first, in_real, second, in_fake))


def _prepared(x: Tensor, y: Tensor, kernel: str, sigma: float, samples: int) -> tuple[_Rows, _Rows]:
    """Both sides as the kernel takes them, ``samples`` of each in a subset."""
    if _takes_float32(x, y, kernel, samples):
        return _centred(x, y)
    x, y = x.double(), y.double()
    if kernel != "rbf":
        return _Rows(x), _Rows(y)
    # Distances do not depend on a common offset, but their accuracy does.
    offset = x.mean(0)
    sides = [x - offset, y - offset]
    longest = torch.stack([rows.square().sum(1).max() for rows in sides]).sum()
    far = float(longest) > _FAR * sigma**2
    return _Rows(sides[0], far=far), _Rows(sides[1], far=far)


def _estimates_of_subsets(kernel: _Kernel, x: _Rows, in_x: Tensor, y: _Rows, in_y: Tensor) -> Tensor:
    """Of every subset the squared discrepancy, ``[subsets]``. ``in_x [subsets, size]`` holds rows of ``x``."""
    subsets, size = in_x.shape
    dim, device = x.rows.shape[1], x.rows.device
    # Entries of the kernel matrices, halved by symmetry. One pass over all adds its product with the memberships.
    together = 0.5 * (len(x) + len(y)) ** 2 * (dim + _SUBSET_COLUMNS[x.rows.dtype] * subsets)
    # One by one, rows are gathered and products are small, which costs a quarter more.
    apart = 1.25 * subsets * 0.5 * (2 * size) ** 2 * dim
    if together < apart:
        return _estimates(kernel, x, _membership(in_x, len(x), device), y, _membership(in_y, len(y), device))
    ones = torch.ones(size, 1, dtype=torch.float64, device=device)
    pairs = zip(in_x.to(device), in_y.to(device), strict=True)
    return torch.cat([_estimates(kernel, x[i], ones, y[j], ones) for i, j in pairs])


def _mean_and_deviation(estimates: Tensor) -> tuple[float, float]:
    # Both at once: a GPU makes the host wait for each number. What is not finite among the estimates shows in their
    # mean, which may overflow where they do not.
    mean, deviation = torch.stack([estimates.mean(), estimates.std(correction=0)]).tolist()
    if not math.isfinite(mean) and not bool(estimates.isfinite().all()):
        raise ValueError("real and fake must be small enough for their kernel to be summed in float64")
    return mean, deviation


class KernelDistance(TwoSides):
    """The kernel distance of features that come in batches, with ``update``, ``compute`` and ``reset``.

    It keeps the features of both sides.

    Args:
        features: takes a batch of images to features ``[n, d]``, without gradient and as it is: put a network into eval
            mode first. None: ``update`` is given features.
        reset_real_features: whether :meth:`reset` forgets the real features too.
        options: what else :func:`kernel_distance` takes: ``subsets``, ``subset_size``, ``generator``, ``protocol``...

    Raises:
        TypeError: ``features`` cannot be called, or an option that there is not.
        ValueError: ``protocol`` is unknown, has no kernel distance, or stands beside an argument that it decides.

    Example::

        >>> metric = KernelDistance(subsets=10, subset_size=5)
        >>> metric.update(torch.rand(10, 4), real=True)
        >>> metric.update(torch.rand(10, 4), real=False)
        >>> mean, std = metric.compute()
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor] | None = None,
        reset_real_features: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(features, reset_real_features)
        # Now, and not when the features are all there.
        inspect.signature(kernel_distance).bind(None, None, **options)
        if options.get("protocol") is not None:
            left_to(
                options["protocol"],
                "kid",
                kernel_distance,
                **{name: value for name, value in options.items() if name not in ("protocol", "generator")},
            )
        self.options = options

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the subsets, 0-dim, float64; errors as :func:`kernel_distance`."""
        mean, std = kernel_distance(self._rows("real"), self._rows("generated"), **self.options)
        return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)


class CMMD(TwoSides):
    """:func:`cmmd` of features that come in batches, with ``update``, ``compute`` and ``reset``; keeps both sides.

    Args:
        features, reset_real_features: as of :class:`KernelDistance`.
        sigma, scale: as of :func:`cmmd`.

    Example::

        >>> metric = CMMD()
        >>> metric.update(torch.eye(4), real=True)
        >>> metric.update(torch.eye(4), real=False)
        >>> float(metric.compute())
        0.0
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor] | None = None,
        reset_real_features: bool = True,
        *,
        sigma: float = 10.0,
        scale: float = 1000.0,
    ) -> None:
        super().__init__(features, reset_real_features)
        self.sigma, self.scale = sigma, scale

    def compute(self) -> Tensor:
        """The distance, 0-dim, float64; errors as :func:`cmmd`."""
        value = cmmd(self._rows("real"), self._rows("generated"), sigma=self.sigma, scale=self.scale)
        return torch.tensor(value, dtype=torch.float64)
