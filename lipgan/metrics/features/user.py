"""Features of a function in a file of the user's. It alone runs code: that of the file that is named."""

from __future__ import annotations

import errno
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lipgan._registry import lookup
from lipgan.metrics.features.base import ImageFeatures, as_rgb, as_unit_images
from lipgan.metrics.features.external import explaining, width_of

__all__ = ["UserFeatures", "module"]


class UserFeatures(ImageFeatures):
    """What a function of the user's makes of images ``[n, 3, h, w]``, uint8."""

    dim = None

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function
        self._freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[n, d]``, float32; ValueError if the function makes something else."""
        levels = (255 * as_rgb(as_unit_images(images))).round().to(torch.uint8).contiguous()
        features = self.function(levels)
        width_of(self.name, features, len(levels))
        return features.float()


def module(which: str) -> UserFeatures:
    """Features of a function in a file. **The file is run.**

    Args:
        which: ``path/to/file.py:factory``. ``factory()`` returns a module or another callable that takes images
            ``[n, 3, h, w]``, uint8, on the device of the images, to features ``[n, d]`` of floating point. A module is
            put into eval mode and moved to the device; of whatever else the images need, it takes care itself.

    Raises:
        ValueError: not of this form, or the file or the factory fails; no function comes from it.
        FileNotFoundError: no such file.
    """
    name = f"module:{which}"
    file, _, factory = which.rpartition(":")
    path = Path(file)
    if not file or not factory.isidentifier():
        raise ValueError(f"{name} must be module:path/to/file.py:factory")
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file of features", file)
    specification = importlib.util.spec_from_file_location(f"lipgan_user_{path.stem}", path)
    if specification is None or specification.loader is None:
        raise ValueError(f"{name} must name a file of Python code, .py")
    loaded: ModuleType = importlib.util.module_from_spec(specification)
    # Where dataclasses and pickle look the code up.
    sys.modules[specification.name] = loaded
    with explaining(name, "fails"):
        specification.loader.exec_module(loaded)
    make = lookup(
        {key: value for key, value in vars(loaded).items() if callable(value)}, factory, f"function of {file}"
    )
    with explaining(name, "fails"):
        function = make()
    if not callable(function):
        raise ValueError(f"{name} must return a module or a function, got {type(function).__name__}")
    return UserFeatures(name, function)
