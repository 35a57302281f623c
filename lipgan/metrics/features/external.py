"""Networks of other packages as extractors of features, and what the modules for each of these packages share.

Each network is given images as its own package prepares them: size, crop, filter, range and norm come from what the
package says of the weights, not from this file. Nothing is fetched unless the caller allows it. Weights are read
without running code from them, and no code that comes with a model is run.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lipgan._packages import first_line
from lipgan.metrics.features.base import ImageFeatures
from lipgan.metrics.features.preprocessing import INTERPOLATIONS, Preprocessing

__all__ = [
    "ExternalFeatures",
    "Weights",
    "absent_weights",
    "called",
    "check_filter",
    "check_origin",
    "drawn",
    "explaining",
    "width_of",
]

Weights = str | os.PathLike[str] | None


class ExternalFeatures(ImageFeatures):
    """A network of another package, with the preprocessing that belongs to its weights.

    Args:
        name: what to call the features.
        network: takes ``[n, 3, h, w]``, float32, to features ``[n, d]``. It is frozen here.
        preprocessing: of images.

    Attributes:
        network, preprocessing: as given.

    Raises:
        ValueError: the network fails on a black image, or makes something else of it than features ``[1, d]``.
    """

    def __init__(self, name: str, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.name, self.network, self.preprocessing = name, network, preprocessing
        self._freeze()
        resize = preprocessing.resize
        size = preprocessing.size or ((resize, resize) if isinstance(resize, int) else (64, 64))
        # The default device may be another than the CPU's.
        device = next((parameter.device for parameter in network.parameters()), None)
        with explaining(name, "cannot be used"), torch.no_grad():
            row = self.network(torch.zeros(1, 3, *size, device=device))
        self.dim = width_of(name, row, 1)
        self.any_size = preprocessing.size is not None

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[n, dim]``, float32. Errors as those of :func:`lipgan.metrics.features.base.as_unit_images`."""
        x = self.preprocessing(images)
        if not len(x):
            return x.new_empty(0, self.dim or 0)
        # A module that holds the extractor may have been brought to another dtype.
        dtype = next((parameter.dtype for parameter in self.network.parameters()), x.dtype)
        features: Tensor = self.network(x.to(dtype))
        return features.float()


def width_of(name: str, features: object, n: int) -> int:
    """The ``d`` of ``features [n, d]``; ValueError for anything else."""
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != n or not features.is_floating_point():
        got = f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{name} must take {n} images to features [{n}, d] of floating point, got {got}")
    return features.shape[1]


@contextmanager
def explaining(name: str, what: str) -> Iterator[None]:
    """Whatever packages raise becomes one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error):
            raise
        raise ValueError(f"{name} {what}: {first_line(error)}") from error


def absent_weights(name: str, where: str, path: str, rest: str) -> FileNotFoundError:
    """The error of features without the file ``path`` of their weights, which is found at ``where``."""
    hint = f"no such file; the features {name} need the weights {where}: {rest}allow the download by download=True"
    return FileNotFoundError(errno.ENOENT, hint, path)


@contextmanager
def drawn(wanted: bool) -> Iterator[None]:
    """Random weights of a network that is made within are those of seed 0, and the global generator stays."""
    with torch.random.fork_rng(devices=[], enabled=wanted):
        if wanted:
            torch.manual_seed(0)
        yield


def called(name: str, pretrained: bool, weights: Weights) -> str:
    """The name of features of such weights."""
    if not pretrained:
        return f"{name}, random weights"
    return name if weights is None else f"{name}, weights {Path(weights).name}"


def check_origin(pretrained: bool, download: bool, weights: Weights, sha256: str | None) -> None:
    """ValueError unless weights are drawn, or come from one place."""
    if not pretrained and (download or weights is not None or sha256 is not None):
        raise ValueError("pretrained=False draws the weights: leave out weights, sha256 and download")
    if weights is not None and download:
        raise ValueError("download must be False where weights names a file, got True")


def check_filter(name: str) -> str:
    """``name`` itself, if images can be scaled by the filter of that name."""
    if name not in INTERPOLATIONS:
        raise ValueError(f"it scales images by the filter {name}, of which there are {', '.join(INTERPOLATIONS)} here")
    return name
