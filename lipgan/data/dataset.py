"""The in-memory data set, and the order in which a training run visits it."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["MAX_CLASSES", "BatchOrder", "Dataset"]

# A conditional network has weights for each class: a stray label such as 2^40 must not ask for all memory.
MAX_CLASSES = 2**16

_HASHED_ROWS = 1024  # at a time, since those of an accelerator are copied


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and, where they exist, their labels and the centres that they were drawn around.

    Attributes:
        name: what `lipgan.data.load` takes, or any other name for a data set of the user's own.
        samples: ``[n, ...]``, floating point; images are ``[n, 1 or 3, size, size]`` in [-1, 1], vectors
            ``[n, d]``.
        labels: ``[n]``, int64 from 0 on, or None.
        modes: of a mixture of round Gaussians, their centres ``[k, d]``, floating point; None otherwise.
        mode_std: the standard deviation of each of them, as `lipgan.metrics.mode_coverage` takes it; None
            without ``modes``.
        captions: a sentence for each class, which says what its samples show; None otherwise.

    Raises:
        ValueError: no samples, samples that are not floating point or not finite; labels of another length,
            not int64, negative, or of more than `MAX_CLASSES` classes; modes that do not fit the samples, or
            modes without a positive ``mode_std``; captions that are not one for each class.
    """

    name: str
    samples: Tensor
    labels: Tensor | None = None
    modes: Tensor | None = None
    mode_std: float | None = None
    captions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.samples.ndim < 2 or len(self.samples) == 0:
            raise ValueError(f"samples must be [n, ...] with n >= 1, got shape {tuple(self.samples.shape)}")
        if not self.samples.is_floating_point():
            raise ValueError(f"samples must be floating point, got {self.samples.dtype}")
        # The extremes are finite when all is, and need no memory of the size of the samples.
        if not bool(torch.stack(self.samples.aminmax()).isfinite().all()):
            raise ValueError(f"samples of {self.name!r} hold NaN or infinite values")
        if self.labels is not None:
            self._check_labels(self.labels)
        if self.modes is not None or self.mode_std is not None:
            self._check_modes(self.modes, self.mode_std)
        if self.captions is not None and len(self.captions) != self.classes:
            wanted = f"captions must be one for each of the {self.classes} classes of {self.name!r}"
            raise ValueError(f"{wanted}, got {len(self.captions)}")

    def _check_labels(self, labels: Tensor) -> None:
        if labels.shape != (len(self.samples),):
            raise ValueError(f"labels must be [{len(self.samples)}], got shape {tuple(labels.shape)}")
        if labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64, got {labels.dtype}")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= MAX_CLASSES:
            raise ValueError(
                f"labels must be 0, 1, ... for at most {MAX_CLASSES} classes, those of {self.name!r} run from {lowest} "
                f"to {highest}"
            )

    def _check_modes(self, modes: Tensor | None, std: float | None) -> None:
        if modes is None or std is None:
            raise ValueError("modes and mode_std belong together, got one without the other")
        if modes.ndim != 2 or len(modes) == 0 or modes.shape[1:] != self.samples.shape[1:]:
            raise ValueError(f"modes must be [k, d] for samples of shape {self.shape}, got {tuple(modes.shape)}")
        if not modes.is_floating_point() or not bool(modes.isfinite().all()):
            raise ValueError("modes must be finite floating-point numbers")
        if not 0 < std < math.inf:
            raise ValueError(f"mode_std must be positive and finite, got {std}")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.samples.shape[1:])

    @property
    def is_image(self) -> bool:
        """Whether a sample is an image, ``[1 or 3, h, w]``."""
        return len(self.shape) == 3 and self.shape[0] in (1, 3)

    # Kept, since looking through the labels on an accelerator makes the caller wait for it.
    @cached_property
    def classes(self) -> int:
        """The number of classes, which is the highest label plus one; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the samples and the labels, with their dtypes and shapes, and of captions, in hexadecimal digits.

        A checkpoint holds it: a run that is resumed on other values would be another run.
        """
        sha = hashlib.sha256()
        for tensor in (self.samples, self.labels):
            if tensor is None:
                continue
            sha.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
            for part in torch.split(tensor, _HASHED_ROWS):
                # As bytes, since NumPy has no bfloat16.
                sha.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if self.captions is not None:
            sha.update(repr(self.captions).encode())
        return sha.hexdigest()


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
        """The next ``[batch_size]`` indices, int64, on the CPU; they may share the memory of the permutation."""
        parts = []
        while batch_size > 0:
            if self._position == len(self._permutation):
                self._permutation = torch.randperm(len(self._permutation), generator=self._random)
                self._position = 0
            part = self._permutation[self._position : self._position + batch_size]
            self._position += len(part)
            batch_size -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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
