"""The in-memory data set, and the order in which a training run visits it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BatchOrder", "Dataset"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and, where they exist, their labels.

    Attributes:
        name: the key in `lipgan.data`, or any other name for a data set of the user's own.
        samples: ``[n, ...]``, floating point; images are ``[n, channels, size, size]`` in [-1, 1].
        labels: ``[n]``, int64, or None.

    Raises:
        ValueError: no samples, samples that are not floating point or not finite, or labels of another
            length.
    """

    name: str
    samples: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.samples.ndim < 2 or len(self.samples) == 0:
            raise ValueError(f"samples must be [n, ...] with n >= 1, got shape {tuple(self.samples.shape)}")
        if not self.samples.is_floating_point():
            raise ValueError(f"samples must be floating point, got {self.samples.dtype}")
        if not bool(self.samples.isfinite().all()):
            raise ValueError(f"samples of {self.name!r} hold NaN or infinite values")
        if self.labels is not None and self.labels.shape != (len(self.samples),):
            raise ValueError(f"labels must be [{len(self.samples)}], got shape {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.samples.shape[1:])


class BatchOrder:
    """An endless stream of indices into ``n`` samples: a fresh permutation per epoch, batches run across its
    end.

    Every sample is seen once per epoch whatever the batch size. The order depends on the seed alone, and the
    state (permutation, position, generator) makes a resumed stream continue where the saved one stopped.
    """

    def __init__(self, n: int, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._permutation = torch.randperm(n, generator=self._random)
        self._position = 0

    def next(self, batch_size: int) -> Tensor:
        """The next ``[batch_size]`` indices, int64, on the CPU."""
        parts = []
        while batch_size > 0:
            if self._position == len(self._permutation):
                self._permutation = torch.randperm(len(self._permutation), generator=self._random)
                self._position = 0
            part = self._permutation[self._position : self._position + batch_size]
            self._position += len(part)
            batch_size -= len(part)
            parts.append(part)
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and integers only."""
        return {
            "random": self._random.get_state(),
            "permutation": self._permutation,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            ValueError: the state belongs to a data set of another length.
        """
        if len(state["permutation"]) != len(self._permutation):
            raise ValueError(
                f"the saved order is of {len(state['permutation'])} samples, the data set has {len(self._permutation)}"
            )
        self._random.set_state(state["random"])
        self._permutation = state["permutation"]
        self._position = state["position"]
