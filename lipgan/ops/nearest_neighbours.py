"""The op ``nearest_neighbours`` at the boundary of PyTorch's dispatcher.

``lipgan::nearest_neighbours`` finds the nearest points, ``lipgan::ball_counts`` counts points in balls. Both are
functional and not differentiable.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from lipgan._checks import check_count, check_finite, check_floating
from lipgan.ops import _backend
from lipgan.reference import nearest_neighbours as reference

Pair = tuple[Tensor, Tensor]

# Beyond it, squares of differences would overflow in float64.
_LARGEST = 1e120

_library = torch.library.Library("lipgan", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "nearest_neighbours(Tensor x, Tensor? y, int k, str? backend) -> (Tensor squared, Tensor indices)"
)
_library.define(  # type: ignore[no-untyped-call]
    "ball_counts(Tensor x, Tensor y, Tensor x_squared_radii, Tensor y_squared_radii, bool closed, str? backend) "
    "-> (Tensor x_counts, Tensor y_counts)"
)


def _served(points: Tensor) -> Tensor:
    """A half type as float32, which holds it exactly."""
    return points if points.dtype in (torch.float32, torch.float64) else points.float()


# ---- native: C++ on CPU tensors. It makes floating-point tensors only, and whole numbers are exact in them. ----


def _native_nearest(x: Tensor, y: Tensor | None, k: int) -> Pair:
    module = _backend.serving_native()
    squared, indices = module.nearest_neighbours_fwd(
        _served(x), None if y is None else _served(y), k, torch.get_num_threads()
    )
    return squared, indices.long()


def _native_counts(x: Tensor, y: Tensor, x_squared_radii: Tensor, y_squared_radii: Tensor, closed: bool) -> Pair:
    module = _backend.serving_native()
    x_counts, y_counts = module.ball_counts(
        _served(x), _served(y), x_squared_radii, y_squared_radii, closed, torch.get_num_threads()
    )
    return x_counts.long(), y_counts.long()


# ---- triton: GPU tensors, or CPU tensors in Triton's interpreter ----


def _triton_nearest(x: Tensor, y: Tensor | None, k: int) -> Pair:
    from lipgan.kernels import nearest_neighbours as kernels

    result: Pair = kernels.nearest_neighbours(_served(x), None if y is None else _served(y), k)
    return result


def _triton_counts(x: Tensor, y: Tensor, x_squared_radii: Tensor, y_squared_radii: Tensor, closed: bool) -> Pair:
    from lipgan.kernels import nearest_neighbours as kernels

    result: Pair = kernels.ball_counts(_served(x), _served(y), x_squared_radii, y_squared_radii, closed)
    return result


_NEAREST: dict[str, Callable[..., Pair]] = {
    "reference": reference.nearest_neighbours,
    "native": _native_nearest,
    "triton": _triton_nearest,
}
_COUNTS: dict[str, Callable[..., Pair]] = {
    "reference": reference.ball_counts,
    "native": _native_counts,
    "triton": _triton_counts,
}


def _nearest(x: Tensor, y: Tensor | None, k: int, backend: str | None) -> Pair:
    return _NEAREST[_backend.resolve("nearest_neighbours", backend, x.device.type)](x, y, k)


def _counts(
    x: Tensor, y: Tensor, x_squared_radii: Tensor, y_squared_radii: Tensor, closed: bool, backend: str | None
) -> Pair:
    return _COUNTS[_backend.resolve("ball_counts", backend, x.device.type)](
        x, y, x_squared_radii, y_squared_radii, closed
    )


for _key in ("CPU", "CUDA"):
    _library.impl("nearest_neighbours", _nearest, _key)  # type: ignore[no-untyped-call]
    _library.impl("ball_counts", _counts, _key)  # type: ignore[no-untyped-call]


@torch.library.register_fake("lipgan::nearest_neighbours", lib=_library)  # type: ignore[untyped-decorator]
def _nearest_fake(x: Tensor, y: Tensor | None, k: int, backend: str | None) -> Pair:
    return x.new_empty(x.shape[0], k, dtype=torch.float64), x.new_empty(x.shape[0], k, dtype=torch.int64)


@torch.library.register_fake("lipgan::ball_counts", lib=_library)  # type: ignore[untyped-decorator]
def _counts_fake(
    x: Tensor, y: Tensor, x_squared_radii: Tensor, y_squared_radii: Tensor, closed: bool, backend: str | None
) -> Pair:
    return x.new_empty(2, x.shape[0], dtype=torch.int64), x.new_empty(2, y.shape[0], dtype=torch.int64)


# ---- the public functions ----


def _check_points(name: str, points: object) -> Tensor:
    """``points``, if they are finite rows ``[n, d]`` that the op takes."""
    check_floating(name, points)
    assert isinstance(points, Tensor)
    if points.ndim != 2 or not points.shape[1]:
        raise ValueError(f"{name} must have shape (n, d), got {tuple(points.shape)}")
    points = points.detach()
    check_finite(name, points)
    if points.dtype == torch.float64 and points.numel():
        largest = float(torch.linalg.vector_norm(points, torch.inf))
        if largest > _LARGEST:
            raise ValueError(f"{name} must be at most {_LARGEST:g} in size, got {largest:g}")
    return points


def _check_pair(x: Tensor, y: Tensor) -> None:
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"y must have {x.shape[1]} features like x, got {y.shape[1]}")
    if y.dtype != x.dtype:
        raise TypeError(f"y must have the dtype of x, {x.dtype}, got {y.dtype}")
    if y.device != x.device:
        raise ValueError(f"y must be on the device of x, {x.device}, got {y.device}")


def nearest_neighbours(x: Tensor, y: Tensor | None = None, k: int = 1, *, backend: str | None = None) -> Pair:
    """The ``k`` nearest points of ``y`` to each point of ``x``, by Euclidean distance, in O(m + n) memory.

    Args:
        x: ``[m, d]``; float32, float64, float16 or bfloat16.
        y: ``[n, d]``, of the dtype and device of ``x``. None: the other points of ``x``; no point is its own neighbour,
            but a duplicate of it is.
        k: at least 1, and at most the number of points to choose from.
        backend: "reference", "native", "triton" or "cuda"; None for the best available.

    Returns:
        ``(squared, indices)``, both ``[m, k]``: squared distances in float64, ascending, and the places of the
        neighbours in ``y``, int64; among equal distances the lower index first. Not differentiable.

    Raises:
        TypeError: a dtype that is not among these, or two dtypes.
        ValueError: other shapes, NaN or infinity, numbers beyond 1e120, two devices, ``k`` out of range, an unknown
            backend.
        UnavailableError: the backend asked for cannot serve here.

    Example::

        >>> lipgan.ops.nearest_neighbours(torch.tensor([[0.0], [1.0], [3.0]]))[0].flatten()
        tensor([1., 1., 4.], dtype=torch.float64)
    """
    x = _check_points("x", x)
    available = len(x) - 1
    if y is not None:
        y = _check_points("y", y)
        _check_pair(x, y)
        available = len(y)
    check_count("k", k, minimum=-sys.maxsize)  # the range has a sentence of its own
    if not 1 <= k <= available:
        raise ValueError(f"k must be from 1 to the number of points to choose from, {max(available, 0)}, got {k}")
    _backend.check(backend)
    result: Pair = torch.ops.lipgan.nearest_neighbours.default(x, y, k, backend)
    return result


def ball_counts(
    x: Tensor,
    y: Tensor,
    x_squared_radii: Tensor,
    y_squared_radii: Tensor,
    *,
    closed: bool = False,
    backend: str | None = None,
) -> Pair:
    """How many points of one set lie in the balls around those of the other, in O(m + n) memory.

    Args:
        x: ``[m, d]``; float32, float64, float16 or bfloat16.
        y: ``[n, d]``, of the dtype and device of ``x``.
        x_squared_radii: ``[m]``, float64: the squares of the radii of balls around each ``x``.
        y_squared_radii: ``[n]``, float64.
        closed: whether a ball holds its border: ``<=`` instead of ``<``.
        backend: "reference", "native", "triton" or "cuda"; None for the best available.

    Returns:
        ``(x_counts [2, m], y_counts [2, n])``, int64: first the number of points of the other set in the ball of each
        point, then the number of balls of the other set that the point is in.

    Raises:
        TypeError, ValueError, UnavailableError: as :func:`nearest_neighbours`.
    """
    x, y = _check_points("x", x), _check_points("y", y)
    _check_pair(x, y)
    radii = []
    for name, given, points in (("x_squared_radii", x_squared_radii, x), ("y_squared_radii", y_squared_radii, y)):
        if not isinstance(given, Tensor) or given.dtype != torch.float64:
            raise TypeError(f"{name} must be a float64 tensor, got {getattr(given, 'dtype', type(given).__name__)}")
        if given.shape != points.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(points)},), got {tuple(given.shape)}")
        if given.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {given.device}")
        radii.append(given.detach())
    _backend.check(backend)
    result: Pair = torch.ops.lipgan.ball_counts.default(x, y, *radii, closed, backend)
    return result
