"""Mean and covariance of features that come in batches."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipgan._arrays import STATISTICS_KEYS, Archive, archive, check_memory
from lipgan._checks import check_count, check_finite
from lipgan.linalg.covariance_factor import Rounding, factorize
from lipgan.metrics._inputs import Array, as_covariance, as_factor, as_mean, as_real_tensor

__all__ = ["FeatureStats"]

# Entries of the centred rows that one product reads: 20 MiB of float64, so that they stay in a last-level cache.
_CHUNK_ENTRIES = 1280 * 2048

# Rows of a block of the scatter matrix. Blocks above the diagonal are not computed: left of the large ones the products
# run at full speed, and the small ones leave little of a square on the diagonal to compute twice.
_BLOCK, _SMALL_BLOCK = 768, 192


def _add_gram(scatter: Tensor, rows: Tensor) -> None:
    """``scatter += rows^T rows`` on the small blocks up to the diagonal. ``scatter [d, d]``, ``rows [k, d]``."""
    dim = rows.shape[1]
    for left in range(0, dim, _BLOCK):
        right = min(left + _BLOCK, dim)
        if left:
            scatter[left:right, :left].addmm_(rows[:, left:right].T, rows[:, :left])
        for begin in range(left, right, _SMALL_BLOCK):
            end = min(begin + _SMALL_BLOCK, right)
            scatter[begin:end, left:end].addmm_(rows[:, begin:end].T, rows[:, left:end])


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a + b`` and its rounding error, exactly (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


class FeatureStats:
    """Streaming mean and covariance of feature vectors, in float64.

    Batches are centred at their own mean and joined by the formula of Chan, Golub and LeVeque, so a common offset of
    the features costs no accuracy, however large; the order and the size of the batches change the result by
    roundings only. It holds ``dim**2`` numbers and, during an update, 20 MiB more.

    Args:
        dim: length of a feature vector.
        ddof: the covariance is the scatter matrix over ``count - ddof``: 1 as numpy.cov and most FID code, or 0.
        device: where the sums are held; features from elsewhere are moved there.

    Raises:
        TypeError, ValueError: ``dim`` is not an int of at least 1, or ``ddof`` is neither 0 nor 1.

    Example::

        >>> stats = FeatureStats(3).update(torch.eye(3))
        >>> stats.count, stats.mean
        (3, tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64))

    Source: Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance" (1983), eq. 2.1. The rounding errors
    are derived in docs/numerics/matrix_sqrt.md.
    """

    def __init__(self, dim: int, *, ddof: int = 1, device: torch.device | str = "cpu") -> None:
        check_count("dim", dim)
        if ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
        self._ddof = int(ddof)
        self._count: int | None = 0
        # The mean is the sum of the two. The second keeps what the difference of two means loses to a large offset.
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._mean_low = torch.zeros_like(self._mean)
        # Sum of (x - mean) (x - mean)^T over all samples; only the blocks up to the diagonal are kept.
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._factor: Tensor | None = None
        self._dtype = torch.float64

    def __repr__(self) -> str:
        count = "unknown" if self._count is None else self._count
        return f"FeatureStats(dim={self.dim}, count={count}, ddof={self._ddof})"

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self._mean.shape[0]

    @property
    def ddof(self) -> int:
        """The covariance is the scatter matrix over ``count - ddof``."""
        return self._ddof

    @property
    def count(self) -> int | None:
        """Number of samples; None if it was read from a file that does not say."""
        return self._count

    @property
    def mean(self) -> Tensor:
        """``[dim]``, float64. ValueError without samples."""
        if self._count == 0:
            raise ValueError("the mean needs at least 1 sample, got 0")
        return self._mean.clone()

    @property
    def cov(self) -> Tensor:
        """``[dim, dim]``, float64, exactly symmetric. ValueError with fewer than 2 samples."""
        if self._count is not None and self._count < 2:
            raise ValueError(f"the covariance needs at least 2 samples, got {self._count}")
        cov = self._scatter / (1 if self._count is None else self._count - self._ddof)
        for begin in range(0, self.dim, _SMALL_BLOCK):
            end = begin + _SMALL_BLOCK
            cov[:begin, begin:end] = cov[begin:end, :begin].T
            # A product of a block with itself need not come out exactly symmetric.
            square = cov[begin:end, begin:end]
            square.copy_(square.tril() + square.tril(-1).T)
        return cov

    @property
    def dtype(self) -> torch.dtype:
        """float64, or the dtype of the file that the covariance was read from, which it was rounded to."""
        return self._dtype

    @property
    def factor(self) -> Tensor:
        """``L [dim, r]`` with ``cov = L L^T`` up to rounding, ``r`` the rank; computed once, kept until samples come.

        :func:`lipgan.frechet_distance` takes it as ``factor1`` or ``factor2``, and need not factorize this side then.
        That saves a tenth of a distance of 2048 features: the products and the eigenvalues need both sides.
        """
        if self._factor is None:
            rounding = Rounding(self._dtype, float(self._mean.square().amax()))
            self._factor = factorize(self.cov, name="the covariance", rounding=rounding).matrix
        return self._factor.clone()

    def update(self, features: Array) -> FeatureStats:
        """Add samples, and return self.

        Args:
            features: ``[n, dim]``, float64, float32 or a half type; ``n`` may be 0.

        Raises:
            TypeError: ``features`` is not an array or tensor of real floating-point numbers.
            ValueError: another shape, a NaN or an infinity, or statistics without a count. Nothing was added then.
        """
        rows = as_real_tensor("features", features).detach()
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"features must have shape (n, {self.dim}), got {tuple(rows.shape)}")
        count = self._known_count()
        if not len(rows):
            return self
        rows = rows.to(self._mean.device)
        parts = rows.tensor_split(-(-rows.numel() // _CHUNK_ENTRIES))
        means = [part.mean(0, dtype=torch.float64) for part in parts]
        if not all(mean.isfinite().all() for mean in means):
            check_finite("features", rows)
            raise ValueError("features must be small enough to be summed in float64")
        buffer = torch.empty(len(parts[0]) + 1, self.dim, dtype=torch.float64, device=self._mean.device)
        for part, mean in zip(parts, means, strict=True):
            size = len(part)
            centred = torch.sub(part, mean, out=buffer[:size])
            mean_low = centred.mean(0)
            centred -= mean_low  # of a large offset it is no small part of the deviations
            difference = self._join(count, mean, mean_low, size)
            # The distance of the means enters as one more row of the product, instead of another pass over the matrix.
            buffer[size] = difference * (count / (count + size) * size) ** 0.5
            _add_gram(self._scatter, buffer[: size + 1])
            count += size
        self._count, self._factor = count, None
        return self

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Add the samples of ``other``, which stays as it is, and return self.

        Raises:
            TypeError: ``other`` is not a FeatureStats.
            ValueError: another ``dim``, or a side without a count.
        """
        if not isinstance(other, FeatureStats):
            raise TypeError(f"other must be a FeatureStats, got {type(other).__name__}")
        if other.dim != self.dim:
            raise ValueError(f"other must have dim {self.dim}, got {other.dim}")
        count, size = self._known_count(), other._known_count()
        if size:
            device = self._mean.device
            scatter = other._scatter.to(device, copy=other is self)
            difference = self._join(count, other._mean.to(device), other._mean_low.to(device), size)
            self._scatter += scatter
            _add_gram(self._scatter, difference[None] * (count / (count + size) * size) ** 0.5)
            self._count, self._factor = count + size, None
            self._dtype = max(self._dtype, other._dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return self

    def _known_count(self) -> int:
        if self._count is None:
            raise ValueError(
                "these statistics were read from a file without a count, so they cannot be added to others"
            )
        return self._count

    def _join(self, count: int, mean: Tensor, mean_low: Tensor, size: int) -> Tensor:
        """Move the mean of ``count`` samples to include ``size`` more; return the distance of the two means."""
        if count == 0:
            self._mean, self._mean_low = mean.clone(), mean_low.clone()
            return torch.zeros_like(mean)
        difference = (mean - self._mean) + (mean_low - self._mean_low)
        step = self._mean_low + difference * (size / (count + size))
        self._mean, self._mean_low = _two_sum(self._mean, step)
        return difference

    def mean_relative_to(self, other: FeatureStats) -> Tensor:
        """``[dim]``, the mean less that of ``other``, without the rounding of either to float64."""
        return (self._mean - other._mean.to(self._mean)) + (self._mean_low - other._mean_low.to(self._mean))

    def _to_matrix(self) -> Tensor:
        """All of the state, ``[dim + 3, dim]``, for :meth:`_from_matrix` in another process."""
        count = torch.full_like(self._mean, self._known_count())
        return torch.cat([self._scatter, torch.stack([self._mean, self._mean_low, count])])

    @classmethod
    def _from_matrix(cls, matrix: Tensor, ddof: int) -> FeatureStats:
        stats = cls(matrix.shape[1], ddof=ddof, device=matrix.device)
        stats._scatter = matrix[:-3].clone()
        stats._mean, stats._mean_low = matrix[-3].clone(), matrix[-2].clone()
        stats._count = int(matrix[-1, 0])
        return stats

    def save(self, path: str | os.PathLike[str], *, factor: bool = False) -> None:
        """Write ``mu`` and ``sigma``, as other FID programs do, and ``count`` and ``ddof``, as one .npz file.

        The file appears whole or not at all, under exactly this name.

        Args:
            path: of the file.
            factor: write :attr:`factor` too, for the reference side of many distances. It doubles the file.

        Raises:
            ValueError: fewer than 2 samples.
            OSError: it cannot be written.
        """
        from lipgan._files import write_atomically

        arrays: dict[str, Any] = {"mu": self.mean.cpu().numpy(), "sigma": self.cov.cpu().numpy(), "ddof": self._ddof}
        if self._count is not None:
            arrays["count"] = self._count
        if factor:
            arrays["factor"] = self.factor.cpu().numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> FeatureStats:
        """Read a file of :meth:`save`, or of another program: an .npz with ``mu`` and ``sigma``.

        Without those, ``mean`` and ``cov``, or ``mu_clean`` and ``sigma_clean``, are taken.

        Without the key ``count`` the result has no count, and can be compared but not updated or merged. Nothing in
        the file is unpickled.

        Raises:
            ValueError: not such a file, or one of features that are too long for this machine: shapes are looked at
                before anything is read; the message names it and says what is wrong.
            OSError: it cannot be read.
        """
        with archive(path, "is no file of feature statistics") as stored:
            keys = _check_headers(stored)
            return _from_arrays({name: stored.read(key) for name, key in keys.items()}, keys, device)


_KEYS = ("count", "ddof", "factor")

# The covariance and its root take some d^2 numbers each: 2 GiB at this length. A system that promises more memory than
# it has would end the program only once it is used.
MAX_DIM = 2**14

# Matrices of d^2 numbers in float64 while a file is read: as it is stored, symmetric, and as a scatter matrix.
_MATRICES = 3


def _check_headers(stored: Archive) -> dict[str, str]:
    """The arrays to read: what the file calls "mu", "sigma", "count", "ddof" and "factor", as far as it has them.

    ValueError unless they have fitting dtypes and shapes and the memory for them is there: nothing is read.
    """
    pair = next((pair for pair in STATISTICS_KEYS if set(pair) <= set(stored.names)), STATISTICS_KEYS[0])
    for key in pair:
        if key not in stored.names:
            raise ValueError(f"it has no array {key!r}, only {', '.join(sorted(stored.names)) or 'none'}")
    keys = dict(zip(STATISTICS_KEYS[0], pair, strict=True)) | {key: key for key in _KEYS if key in stored.names}
    headers = {name: stored.header(key) for name, key in keys.items()}
    for name, header in headers.items():
        key = keys[name]
        if key in ("count", "ddof"):
            if header.shape != () or header.dtype.kind not in "iu":
                raise ValueError(f"{key} must be one integer, got an array of {header.dtype} of shape {header.shape}")
        elif header.dtype.type not in (np.float16, np.float32, np.float64):
            raise ValueError(f"{key} must have a real floating-point dtype, got {header.dtype}")
    shape = headers["mu"].shape
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"{keys['mu']} must have shape (d,), got {shape}")
    (dim,) = shape
    if headers["sigma"].shape != (dim, dim):
        raise ValueError(f"{keys['sigma']} must have shape ({dim}, {dim}), got {headers['sigma'].shape}")
    factor = headers["factor"].shape if "factor" in headers else (dim, 0)
    if len(factor) != 2 or factor[0] != dim or factor[1] > dim:
        raise ValueError(f"factor must have shape ({dim}, r) with r up to {dim}, got {factor}")
    if dim > MAX_DIM:
        raise ValueError(f"its features have length {dim}, more than {MAX_DIM}")
    check_memory(f"features of length {dim}", 8 * (_MATRICES + ("factor" in headers)) * dim**2)
    return keys


def _from_arrays(
    arrays: dict[str, np.ndarray[Any, Any]], keys: dict[str, str], device: torch.device | str
) -> FeatureStats:
    mean = as_mean(keys["mu"], arrays["mu"])
    cov, dtype = as_covariance(keys["sigma"], arrays["sigma"], len(mean))
    count, ddof = (int(arrays[key]) if key in arrays else None for key in ("count", "ddof"))
    if count is not None and count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    stats = FeatureStats(len(mean), ddof=1 if ddof is None else ddof, device=device)
    stats._mean = mean.to(stats._mean)
    stats._scatter = cov.to(stats._mean) * (1 if count is None else count - stats.ddof)
    stats._count, stats._dtype = count, dtype
    if "factor" in arrays:
        stats._factor = as_factor("factor", arrays["factor"], cov, dtype).to(stats._mean)
    return stats
