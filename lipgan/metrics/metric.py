"""What the metrics of batches share: their state in matrices, and its sum over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lipgan._dtypes import FLOATING
from lipgan.metrics._inputs import Array, as_features

__all__ = ["Collection", "Metric", "TwoSides"]


class Metric(ABC):
    """A metric of samples that come in batches: ``update``, ``compute``, ``reset`` as in torchmetrics, and ``sync``.

    A subclass keeps its state in parts, such as the real and the generated side, and says in :meth:`_pack` and
    :meth:`_unpack` how a part goes into a matrix and how it comes from those of all processes.
    """

    def __init__(self) -> None:
        self._synced: set[str] = set()

    @abstractmethod
    def compute(self) -> Any:
        """The metric of all samples so far."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the samples."""

    @abstractmethod
    def _pack(self) -> dict[str, Tensor | None]:
        """Every part by name, in one order on all processes: ``[n, d]``, or None without samples."""

    @abstractmethod
    def _unpack(self, part: str, matrices: list[Tensor]) -> None:
        """Replace a part by the sum of these matrices, one of each process that has samples."""

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Replace the samples of this process by those of all, so that every process computes the same.

        All processes of the group call it, after their last update. Until :meth:`reset`, updates are refused, because
        another sync would count samples again; for the same reason, what was joined before is left as it is.

        Args:
            group: the processes; None for all of them. The backend takes tensors of the devices of the samples.

        Raises:
            RuntimeError: torch.distributed is not initialized.
            ValueError: the processes have features of different lengths.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("sync joins processes, and torch.distributed is not initialized")
        for part, matrix in self._pack().items():
            if part not in self._synced:
                self._unpack(part, _gather(part, matrix, group))
                self._synced.add(part)

    def _check_update(self, part: str) -> None:
        if part in self._synced:
            raise RuntimeError(f"the {part} samples are those of all processes since sync: reset before an update")


def _gather(part: str, matrix: Tensor | None, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The matrices of all processes in the order of their ranks, without those of no rows."""
    if matrix is not None:
        device = matrix.device
    else:
        # A process without samples follows the others onto the device of the backend.
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    size = dist.get_world_size(group)
    shape = [0, 0, 0] if matrix is None else [*matrix.shape, FLOATING.index(matrix.dtype)]
    shapes = torch.empty(size, 3, dtype=torch.int64, device=device)
    dist.all_gather(list(shapes.unbind()), torch.tensor(shape, device=device), group=group)
    held = [(rows, columns, FLOATING[dtype]) for rows, columns, dtype in shapes.tolist() if rows]
    # Judged by what all processes know, so that all raise and none waits for another.
    lengths = sorted({columns for _, columns, _ in held})
    if len(lengths) > 1:
        raise ValueError(f"the {part} features must have one length in all processes, got {lengths}")
    if not held:
        return []
    dtype = held[0][2]
    for _, _, other in held[1:]:
        dtype = torch.promote_types(dtype, other)
    padded = torch.zeros(max(rows for rows, _, _ in held), lengths[0], dtype=dtype, device=device)
    if matrix is not None:
        padded[: len(matrix)] = matrix
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=group)
    return [rows[:count] for rows, count in zip(gathered, shapes[:, 0].tolist(), strict=True) if count]


class Collection(Metric):
    """A metric that needs all its samples at once, and so keeps them.

    Args:
        parts: names of the parts.
    """

    def __init__(self, *parts: str) -> None:
        super().__init__()
        self._batches: dict[str, list[Tensor]] = {part: [] for part in parts}

    def _append(self, part: str, name: str, rows: Tensor) -> None:
        """Add ``rows [n, d]``, an argument of that name; ValueError unless of the length of those before."""
        self._check_update(part)
        for batches in self._batches.values():
            if batches and batches[0].shape[1] != rows.shape[1]:
                raise ValueError(f"{name} must have shape (n, {batches[0].shape[1]}), got {tuple(rows.shape)}")
        # A copy: what the caller writes into its batch later is no sample.
        self._batches[part].append(rows.clone())

    def _rows(self, part: str) -> Tensor:
        """All samples of a part ``[n, d]``; ValueError without any."""
        batches = self._batches[part]
        if not sum(map(len, batches)):
            raise ValueError(f"the {part} side needs at least 1 sample, got 0")
        if len(batches) > 1:
            batches[:] = [torch.cat(batches)]
        return batches[0]

    def _forget(self, part: str) -> None:
        self._batches[part] = []
        self._synced.discard(part)

    def reset(self) -> None:
        """Forget all samples."""
        for part in self._batches:
            self._forget(part)

    def _pack(self) -> dict[str, Tensor | None]:
        return {part: self._rows(part) if sum(map(len, rows)) else None for part, rows in self._batches.items()}

    def _unpack(self, part: str, matrices: list[Tensor]) -> None:
        self._batches[part] = matrices


class TwoSides(Collection):
    """A metric that compares the features of real and of generated samples, and keeps both.

    Args:
        features: takes a batch of images to features ``[n, d]``, without gradient and as it is: put a network into eval
            mode first. None: ``update`` is given features.
        reset_real_features: whether :meth:`reset` forgets the real features too.

    Raises:
        TypeError: ``features`` cannot be called.
    """

    def __init__(self, features: Callable[[Tensor], Tensor] | None, reset_real_features: bool) -> None:
        if features is not None and not callable(features):
            raise TypeError(f"features must be callable or None, got {type(features).__name__}")
        super().__init__("real", "generated")
        self.features = features
        self.reset_real_features = reset_real_features

    def update(self, x: Array, real: bool) -> None:
        """Add a batch to the real or to the generated side.

        Args:
            x: what ``features`` takes; or features ``[n, d]``.
            real: which side.

        Raises:
            TypeError: ``real`` is not a bool.
            TypeError, ValueError: the features are not finite numbers ``[n, d]`` of the same length on both sides.
            RuntimeError: after :meth:`sync`.
        """
        if not isinstance(real, bool):
            raise TypeError(f"real must be a bool, got {real!r}")
        with torch.no_grad():
            rows: Any = x if self.features is None else self.features(x)  # type: ignore[arg-type]
        self._append("real" if real else "generated", "features", as_features("features", rows, minimum=0))

    def reset(self) -> None:
        """Forget the generated side, and the real one if ``reset_real_features``."""
        self._forget("generated")
        if self.reset_real_features:
            self._forget("real")
