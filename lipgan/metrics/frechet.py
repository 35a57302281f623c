r"""The Frechet distance between two Gaussians, from their statistics or from features.

``d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)``. The last term is the nuclear norm of ``L1^T L2`` with
``S = L L^T``, so no square root of a product is formed. Routes, bounds and gradients: docs/numerics/matrix_sqrt.md.

Source: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to a
Local Nash Equilibrium" (2017), eq. 6; Dowson and Landau, "The Frechet Distance between Multivariate Normal
Distributions" (1982).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipgan._checks import check_choice, check_finite, tolerance
from lipgan.linalg import nuclear_norm
from lipgan.linalg.covariance_factor import Factor, Rounding
from lipgan.linalg.small_covariances import SMALL, small_trace
from lipgan.linalg.trace_sqrt_product import trace_sqrt_product_info
from lipgan.metrics._inputs import Array, as_covariance, as_factor, as_mean, as_real_tensor
from lipgan.metrics.feature_stats import FeatureStats
from lipgan.metrics.metric import Metric

__all__ = ["FrechetDistance", "FrechetInfo", "frechet_distance", "frechet_distance_from_features"]

EPS = torch.finfo(torch.float64).eps

# Statistics within this power of two, up or down, are taken as they are: no product of two leaves float64.
_ORDINARY = 200


@dataclass(frozen=True)
class FrechetInfo:
    """How a distance was computed, and how far off it may be."""

    route: str  # of the trace: "cholesky", "eigh", "svd" or "polar"
    iterations: int  # of the polar route, else 0
    error_bound: float  # absolute, on the distance
    rank: tuple[int, int]  # of the two covariances; full for one that no factor was needed of
    clipped: float  # trace of what was set to 0: negative and unresolved eigenvalues, by magnitude
    undetermined: float = 0.0  # part of the bound: what eigenvalues may add that are lost in a covariance's rounding


@dataclass(frozen=True)
class _Side:
    """The statistics of one side, float64."""

    mean: Tensor  # [d]
    cov: Tensor  # [d, d]
    factor: Tensor | None  # [d, r]
    name: str  # of the covariance
    dtype: torch.dtype = torch.float64  # that the numbers of the covariance had
    checked: bool = False  # whether the covariance is known to be finite and exactly symmetric

    def rounding(self, scale: float) -> Rounding:
        """What negative eigenvalues of the covariance, multiplied by ``scale``, may come from."""
        # E[x x^T] - mean mean^T has the rounding of its first term. In half types too little of the difference is left.
        half = self.dtype in (torch.float16, torch.bfloat16)
        return Rounding(self.dtype, 0.0 if half else float((self.mean.detach() * math.sqrt(scale)).square().amax()))

    def term(self, scale: float) -> Tensor | Factor:
        """What the trace is taken of, with the covariance multiplied by ``scale``."""
        # A factor has no way back to a covariance whose gradient is asked for.
        if self.factor is not None and not self.cov.requires_grad:
            return Factor.of(self.factor if scale == 1 else self.factor * math.sqrt(scale))
        return self.cov if scale == 1 else self.cov * scale


def _side(number: int, mean: Array, cov: Array, factor: Array | None) -> _Side:
    mu = as_mean(f"mu{number}", mean)
    name = f"sigma{number}"
    sigma, dtype = as_covariance(name, cov, len(mu))
    matrix = None if factor is None else as_factor(f"factor{number}", factor, sigma, dtype)
    return _Side(mu, sigma, matrix, name, dtype, checked=True)


def _in_order(first: _Side, second: _Side) -> tuple[_Side, _Side]:
    """The two sides in an order that does not depend on which was given first, so that swapping them changes no bit."""
    for a, b in ((first.cov.diagonal(), second.cov.diagonal()), (first.cov, second.cov)):
        difference = (a - b).detach().flatten()
        if bool(difference.any()):
            largest = difference[difference.abs().argmax()]
            return (first, second) if largest > 0 else (second, first)
    return first, second


def _distance(first: _Side, second: _Side, method: str, bounded: bool) -> tuple[Tensor, FrechetInfo]:
    first, second = _in_order(first, second)
    difference = first.mean - second.mean
    scale = _scale(_exponent(first.cov.diagonal(), second.cov.diagonal()), _exponent(difference))
    trace, info = trace_sqrt_product_info(
        first.term(scale),
        second.term(scale),
        method=method,
        names=(first.name, second.name),
        roundings=(first.rounding(scale), second.rounding(scale)),
        bounded=bounded,
        checked=first.checked and second.checked,
    )
    terms = _terms(difference, first.cov.diagonal(), second.cov.diagonal(), scale)
    # Sums of d terms, each rounded.
    error = 2 * info.error_bound + 4 * math.sqrt(len(difference)) * EPS * abs(float(terms.detach()))
    return _join(terms, trace, scale), FrechetInfo(
        info.route, info.iterations, error / scale, info.rank, info.clipped / scale, 2 * info.undetermined / scale
    )


# ---- few features ----

# Of the sum of the squares of a covariance, such that no product leaves float64, without a scale.
_SMALLEST, _LARGEST = 2.0**-_ORDINARY, 2.0**_ORDINARY
_DOUBLE, _FLOAT = np.dtype(np.float64), np.dtype(np.float32)


def _small_distance(
    arguments: tuple[Array, Array, Array, Array], bounded: bool
) -> tuple[float, FrechetInfo | None] | None:
    """The distance of few features, and its info if ``bounded``; None where something is not ordinary.

    Ordinary are finite numbers that need no scale, without gradient and on the CPU, and covariances of full rank. The
    general way has the errors of what is not.
    """
    kind = type(arguments[0])
    if kind is Tensor and not torch.compiler.is_compiling():
        try:
            arrays = [value.numpy() for value in arguments]  # type: ignore[union-attr]
        except (AttributeError, RuntimeError, TypeError):  # an array beside tensors, a gradient, a GPU, a half type
            return None
    elif kind is np.ndarray:
        arrays = list(arguments)
    else:
        return None
    for k, value in enumerate(arrays):
        # Not a subclass: masked arrays are refused.
        if type(value) is not np.ndarray or type(arguments[k]) is not kind:
            return None
        if value.dtype != _DOUBLE:
            if value.dtype != _FLOAT:
                return None
            arrays[k] = value.astype(_DOUBLE)
    mean1, s1, mean2, s2 = arrays
    shape = mean1.shape
    if len(shape) != 1 or not 0 < shape[0] <= SMALL or mean2.shape != shape:
        return None
    d = shape[0]
    if s1.shape != (d, d) or s2.shape != (d, d):
        return None
    # NaN and infinity show in these sums of squares, and so does what would need a scale.
    with np.errstate(over="ignore", invalid="ignore"):
        difference = mean1 - mean2
        squared, size1, size2 = float(difference.dot(difference)), np.vdot(s1, s1), np.vdot(s2, s2)
    if not (squared < _LARGEST and _SMALLEST < size1 < _LARGEST and _SMALLEST < size2 < _LARGEST):
        return None
    first, second = _symmetric(s1, size1), _symmetric(s2, size2)
    if first is None or second is None:
        return None
    if _first_is_smaller(first, second):
        first, second = second, first
    found = small_trace(first, second, bounded=bounded)
    if found is None:
        return None
    trace, bound = found
    terms = squared + sum(first.diagonal().tolist()) + sum(second.diagonal().tolist())
    distance = max(0.0, terms - 2 * trace)
    if not bounded:
        return distance, None
    error = 2 * bound + 4 * math.sqrt(d) * EPS * terms
    return distance, FrechetInfo("cholesky", 0, error, (d, d), 0.0)


def _as_scalar(value: float) -> Tensor:
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")


def _symmetric(s: np.ndarray[Any, Any], size: float) -> np.ndarray[Any, Any] | None:
    """``s`` made exactly symmetric; None where it may not be so up to rounding. ``size`` is the sum of its squares."""
    if s.tobytes() == s.T.tobytes():
        return s
    difference = (s - s.T).ravel()
    # No entry is larger than the Frobenius norm, and none of s is as small as that over d if it is the largest.
    if not difference.dot(difference) <= (tolerance(torch.float64) / len(s)) ** 2 * size:
        return None
    symmetric: np.ndarray[Any, Any] = 0.5 * (s + s.T)
    return symmetric


def _first_is_smaller(s1: np.ndarray[Any, Any], s2: np.ndarray[Any, Any]) -> bool:
    """Whether `_in_order` would swap them."""
    for difference in (s1.diagonal() - s2.diagonal(), (s1 - s2).ravel()):
        largest = difference[abs(difference).argmax()]
        if largest != 0:
            return bool(largest < 0)
    return False


def _exponent(*values: Tensor) -> float:
    """About the binary logarithm of the largest magnitude."""
    largest = max(float(value.detach().abs().amax()) for value in values)
    return math.log2(largest) if largest > 0 else -math.inf


def _scale(of_squares: float, of_features: float) -> float:
    """What statistics are multiplied by, and features by its root, so that no product leaves the range of float64.

    It is 1 at all ordinary sizes, and a power of 4, which costs no accuracy. The arguments are binary logarithms.
    """
    exponent = max(of_squares, 2 * of_features)
    if abs(exponent) <= _ORDINARY or exponent == -math.inf:
        return 1.0
    return math.ldexp(1.0, -2 * int(max(-500, min(500, exponent // 2))))


def _terms(difference: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """``scale (|mu1 - mu2|^2 + tr S1 + tr S2)``, of the diagonals of the covariances."""
    if scale != 1:
        difference, first, second = difference * math.sqrt(scale), first * scale, second * scale
    return difference.square().sum() + first.sum() + second.sum()


def _join(terms: Tensor, trace: Tensor, scale: float) -> Tensor:
    # Where both sides agree the terms cancel, and what is left is rounding of either sign.
    return (terms - 2 * trace).clamp(min=0) / scale


def frechet_distance(
    mu1: Array,
    sigma1: Array,
    mu2: Array,
    sigma2: Array,
    *,
    method: str = "auto",
    return_info: bool = False,
    factor1: Array | None = None,
    factor2: Array | None = None,
) -> Any:
    r"""The squared Frechet distance of two Gaussians, the "FID" of two sets of features.

    ``|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)``, in float64 whatever the dtype. It is never negative, complex
    or NaN; negative eigenvalues that are rounding in the dtype of a covariance count as 0, and singular covariances
    need no ``eps``; swapping the sides changes no bit. A bound on the error is given on request.

    Args:
        mu1, mu2: means, ``[d]``; NumPy arrays or tensors, like the covariances.
        sigma1, sigma2: covariances, ``[d, d]``, symmetric positive semi-definite up to rounding in their dtype, of
            themselves or of the squares of the means: ``E[x x^T] - m m^T`` of float32 will do.
        method: route to the trace, as in :func:`lipgan.linalg.trace_sqrt_product`: "auto", "cholesky", "eigh", "svd" or
            "polar".
        return_info: return a :class:`FrechetInfo` too: the route, its iterations, a bound on the error, the ranks, and
            the trace of what was clipped.
        factor1, factor2: ``L [d, r]`` with ``S = L L^T``, such as :attr:`FeatureStats.factor`: what can be computed of
            one side alone, a tenth of the distance at d = 2048. Not used where the covariance requires a gradient.

    Returns:
        numpy.float64 for arrays, a 0-dim float64 tensor for tensors, differentiable once in means and covariances; with
        ``return_info``, a pair of that and the info.

    Raises:
        TypeError: an argument is neither an array nor a tensor, or not of a real floating-point dtype; arrays and
            tensors are mixed.
        ValueError: shapes that do not fit, a NaN or an infinity, a covariance that is not symmetric beyond rounding or
            clearly indefinite, a factor of something else, no method of that name.

    Example::

        >>> one = torch.eye(2)
        >>> frechet_distance(torch.zeros(2), one, torch.ones(2), 4 * one)
        tensor(4., dtype=torch.float64)
    """
    if method == "auto" and factor1 is None and factor2 is None:
        small = _small_distance((mu1, sigma1, mu2, sigma2), return_info)
        if small is not None:
            tensor = isinstance(mu1, Tensor)
            value: Any = _as_scalar(small[0]) if tensor else np.float64(small[0])
            return (value, small[1]) if return_info else value
    arguments = {"mu1": mu1, "sigma1": sigma1, "mu2": mu2, "sigma2": sigma2, "factor1": factor1, "factor2": factor2}
    given = {name: value for name, value in arguments.items() if value is not None}
    tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    for name, value in given.items():
        if tensors and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor like {tensors[0]}, got {type(value).__name__}")
    devices = {value.device for value in given.values() if isinstance(value, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"all arguments must be on one device, got {', '.join(sorted(map(str, devices)))}")
    first, second = _side(1, mu1, sigma1, factor1), _side(2, mu2, sigma2, factor2)
    if len(first.mean) != len(second.mean):
        raise ValueError(f"mu2 must have the length of mu1, {len(first.mean)}, got {len(second.mean)}")
    distance, info = _distance(first, second, method, return_info)
    result = distance if tensors else np.float64(distance.item())
    return (result, info) if return_info else result


def distance_of_statistics(first: FeatureStats, second: FeatureStats) -> tuple[Tensor, FrechetInfo]:
    """:func:`frechet_distance` of statistics that may have been read from files, with its info.

    The rounding of a covariance is that of the dtype in the file.
    """
    sides = [
        _Side(stats.mean, stats.cov, None, name, stats.dtype) for stats, name in ((first, "sigma1"), (second, "sigma2"))
    ]
    return _distance(sides[0], sides[1], "auto", True)


# ---- features ----

_FEATURE_METHODS = ("auto", "cross-gram", "covariance")


def frechet_distance_from_features(real: Array, fake: Array, *, method: str = "auto", ddof: int = 1) -> Tensor:
    r"""The squared Frechet distance of the Gaussians fitted to two sets of features, differentiable in the features.

    With few samples the trace is the nuclear norm of the ``n1 x n2`` matrix ``X1 X2^T`` of the centred features: no
    ``d x d`` matrix is made, and the derivative in ``X1`` is ``P X2`` with P the polar factor.

    Args:
        real: ``[n1, d]``, ``n1 >= 2``; float64, float32 or a half type, computed in float64.
        fake: ``[n2, d]``, ``n2 >= 2``.
        method: "cross-gram" is the route above, "covariance" that of :func:`frechet_distance`, "auto" the first where
            ``n1 n2 <= d^2``.
        ddof: the covariances are scatter matrices over ``n - ddof``, 0 or 1.

    Returns:
        0-dim, float64; differentiable once (by the cross-Gram, twice where samples do not outnumber features). Where a
        singular value of ``X1 X2^T`` is 0 although neither side is, the derivative is the subgradient of least norm.

    Raises:
        TypeError: an argument is neither an array nor a tensor, or not of a real floating-point dtype.
        ValueError: another shape, fewer than 2 samples, a NaN or an infinity, two devices, or an unknown method.

    Example::

        >>> features = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> frechet_distance_from_features(features, features + 1)
        tensor(2., dtype=torch.float64)
    """
    sides = {"real": as_real_tensor("real", real), "fake": as_real_tensor("fake", fake)}
    for name, x in sides.items():
        if x.ndim != 2 or not x.shape[1]:
            raise ValueError(f"{name} must have shape (n, d), got {tuple(x.shape)}")
        if len(x) < 2:
            raise ValueError(f"{name} must have at least 2 samples, got {len(x)}")
    first, second = sides.values()
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"fake must have {first.shape[1]} features like real, got {second.shape[1]}")
    if first.device != second.device:
        raise ValueError(f"fake must be on the device of real, {first.device}, got {second.device}")
    for name, x in sides.items():
        check_finite(name, x.detach())
    check_choice("method", method, _FEATURE_METHODS)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if method == "auto":
        method = "cross-gram" if len(first) * len(second) <= first.shape[1] ** 2 else "covariance"
    # The distance does not depend on a common offset, but the accuracy of means and products does.
    offset = first.detach().mean(0, dtype=torch.float64)
    first, second = first - offset, second - offset
    scale = _scale(-math.inf, _exponent(first, second))
    if scale != 1:
        first, second = first * math.sqrt(scale), second * math.sqrt(scale)
    mean1, mean2 = first.mean(0), second.mean(0)
    first = (first - mean1) / math.sqrt(len(first) - ddof)
    second = (second - mean2) / math.sqrt(len(second) - ddof)
    terms = (mean1 - mean2).square().sum() + first.square().sum() + second.square().sum()
    if method == "cross-gram":
        trace = nuclear_norm(first @ second.T)
        if min(len(first), len(second)) - 1 > first.shape[1]:
            trace = _Once.apply(trace)  # type: ignore[no-untyped-call]
    else:
        trace, _ = trace_sqrt_product_info(first.T @ first, second.T @ second, bounded=False)
    return _join(terms, trace, scale)


class _Once(torch.autograd.Function):
    """Refuses a second derivative: of singular values that are 0 because samples outnumber features, it is another."""

    @staticmethod
    def forward(ctx: Any, trace: Tensor) -> Tensor:
        return trace.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "frechet_distance_from_features is differentiable once, and create_graph=True asks for twice"
            )
        return grad


_SIDES = ("real", "generated")


class FrechetDistance(Metric):
    """The Frechet distance of features that come in batches, with ``update``, ``compute`` and ``reset``.

    Args:
        features: takes a batch of images to features ``[n, d]``, without gradient and as it is: put a network into eval
            mode first. None: ``update`` is given features.
        reset_real_features: whether :meth:`reset` forgets the real features too. If not, what is computed of them alone
            is computed once.
        ddof: as in :class:`FeatureStats`.

    Raises:
        TypeError, ValueError: ``features`` cannot be called; ``ddof`` is neither 0 nor 1.

    Example::

        >>> metric = FrechetDistance(torch.nn.Flatten())
        >>> metric.update(torch.rand(10, 1, 2, 2), real=True)
        >>> metric.update(torch.rand(10, 1, 2, 2), real=False)
        >>> distance = metric.compute()
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor] | None = None,
        reset_real_features: bool = True,
        *,
        ddof: int = 1,
    ) -> None:
        if features is not None and not callable(features):
            raise TypeError(f"features must be callable or None, got {type(features).__name__}")
        if ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
        super().__init__()
        self.features = features
        self.reset_real_features = reset_real_features
        self._ddof = ddof
        self._stats: dict[str, FeatureStats] = {}

    def update(self, x: Array, real: bool) -> None:
        """Add a batch to the real or to the generated side.

        Args:
            x: what ``features`` takes; or features ``[n, d]``.
            real: which side.

        Raises:
            TypeError: ``real`` is not a bool.
            TypeError, ValueError: the features are not such as :meth:`FeatureStats.update` takes, of the same length on
                both sides.
            RuntimeError: after :meth:`sync`.
        """
        if not isinstance(real, bool):
            raise TypeError(f"real must be a bool, got {real!r}")
        with torch.no_grad():
            rows = as_real_tensor("features", x if self.features is None else self.features(x))  # type: ignore[arg-type]
        if rows.ndim != 2 or not rows.shape[1]:
            raise ValueError(f"features must have shape (n, d), got {tuple(rows.shape)}")
        side, other_side = _SIDES if real else _SIDES[::-1]
        self._check_update(side)
        stats = self._stats.get(side)
        if stats is None:
            other = self._stats.get(other_side)
            dim = rows.shape[1] if other is None else other.dim
            stats = FeatureStats(dim, ddof=self._ddof, device=rows.device)
        stats.update(rows)
        self._stats[side] = stats

    def compute(self) -> Tensor:
        """The distance of all samples so far: 0-dim, float64. ValueError unless both sides have at least 2."""
        sides = []
        for name in _SIDES:
            stats = self._stats.get(name)
            count = 0 if stats is None else stats.count
            if stats is None or count is None or count < 2:
                raise ValueError(f"the {name} side needs at least 2 samples, got {count}")
            sides.append(stats)
        real, fake = sides
        # The distance knows the difference of the means only, of which a large offset of both would leave few digits.
        difference = real.mean_relative_to(fake)
        zero = torch.zeros_like(difference)
        small = _small_distance((difference, real.cov, zero, fake.cov), False)
        if small is not None:
            return _as_scalar(small[0])
        first = _Side(difference, real.cov, real.factor, "the real covariance")
        second = _Side(zero, fake.cov.to(zero), None, "the generated covariance")
        return _distance(first, second, "auto", False)[0]

    def reset(self) -> None:
        """Forget the generated side, and the real one if ``reset_real_features``."""
        for side in _SIDES:
            if side != "real" or self.reset_real_features:
                self._stats.pop(side, None)
                self._synced.discard(side)

    def _pack(self) -> dict[str, Tensor | None]:
        held = {side: self._stats.get(side) for side in _SIDES}
        return {side: stats._to_matrix() if stats is not None and stats.count else None for side, stats in held.items()}

    def _unpack(self, part: str, matrices: list[Tensor]) -> None:
        parts = [FeatureStats._from_matrix(matrix, self._ddof) for matrix in matrices]
        if parts:
            self._stats[part] = parts[0]
        for stats in parts[1:]:
            self._stats[part].merge(stats)
