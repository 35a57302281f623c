"""Data sets of torchvision and of Hugging Face, by name, where those packages are installed.

The files are read by the code of those packages. Nothing is fetched unless the caller allows it.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lipgan._choices import DATA_PREFIXES
from lipgan._packages import first_line, imported
from lipgan._registry import lookup
from lipgan.data.dataset import Dataset
from lipgan.data.files import check_size, stack_images
from lipgan.data.images import scaled, to_rgb

__all__ = ["PREFIXES", "huggingface", "load", "torchvision", "torchvision_folder"]

PREFIXES = DATA_PREFIXES


def load(name: str, size: int | None = None, *, download: bool = False) -> Dataset:
    """The data set ``name``, which begins with one of `PREFIXES`: :func:`torchvision` or :func:`huggingface`."""
    check_size(size)
    kind, _, which = name.partition(":")
    if not which:
        raise ValueError(f"{name} lacks the name of a data set, as in torchvision:MNIST or huggingface:ylecun/mnist")
    return (torchvision if kind == "torchvision" else huggingface)(which, size, download=download)


def torchvision_folder() -> Path:
    """Where torchvision keeps its files: ``LIPGAN_DATA`` of the environment, or datasets/ in the cache of torch.hub."""
    return Path(os.environ.get("LIPGAN_DATA") or Path(torch.hub.get_dir()) / "datasets")


def torchvision(which: str, size: int | None = None, *, download: bool = False) -> Dataset:
    """The training part of a data set of ``torchvision.datasets``.

    Args:
        which: the name of the class, such as MNIST or CIFAR10. It is made without options but root and download.
        size: bring images to ``size x size`` pixels: the largest square in the middle, scaled by Pillow's bicubic
            filter with antialiasing. None: all images are squares of one size.
        download: let torchvision fetch the files into :func:`torchvision_folder`.

    Returns:
        samples ``[n, 1 or 3, size, size]``, float32 in [-1, 1], with one channel where every image is grey; labels
        ``[n]`` where the targets are integers, or None.

    Raises:
        ValueError: torchvision is not installed, or has no such data set; its files are not here; it needs more
            options; it holds no images; images of several sizes or not square, without ``size``.
    """
    name = f"torchvision:{which}"
    module = imported("torchvision.datasets", "torchvision", name)
    table = {
        key: entry
        for key, entry in vars(module).items()
        if isinstance(entry, type) and issubclass(entry, module.VisionDataset) and entry is not module.VisionDataset
    }
    constructor: Any = lookup(table, which, "data set of torchvision")
    options = {"root": str(torchvision_folder()), "download": download}
    accepted = inspect.signature(constructor).parameters
    with _explaining(name, f" from {torchvision_folder()}", download):
        rows = constructor(**{key: value for key, value in options.items() if key in accepted})
    return _collected(name, rows, 0, 1, size)


def huggingface(which: str, size: int | None = None, *, download: bool = False) -> Dataset:
    """The split "train" of a data set of the package datasets.

    Images are in its first column of type Image; labels are in the column "label", or else in the first of type
    ClassLabel. Code that comes with a data set is not run.

    Args:
        which: such as ylecun/mnist, or a folder that the package reads or has written by ``save_to_disk``.
        size, download: as of :func:`torchvision`; downloads go to the package's own cache.

    Returns:
        As :func:`torchvision`.

    Raises:
        ValueError: as :func:`torchvision`.
    """
    name = f"huggingface:{which}"
    module = imported("datasets", "datasets", name)
    options: dict[str, Any] = {"split": "train"}
    # Gone from newer versions, which run no such code at all.
    if "trust_remote_code" in inspect.signature(module.load_dataset).parameters:
        options["trust_remote_code"] = False
    saved = [Path(which, file).is_file() for file in ("state.json", "dataset_dict.json")]
    with _explaining(name, "", download or any(saved)), _offline(module, not download):
        if any(saved):
            rows = module.load_from_disk(which)
            if saved[1]:
                rows = lookup(rows, "train", f"part of {which}")
        else:
            rows = module.load_dataset(which, **options)
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    if not images:
        raise ValueError(f"{name} has no column of images, only {', '.join(kinds) or 'none'}")
    label = "label" if "label" in labels else labels[0] if labels else None
    return _collected(name, rows, images[0], label, size)


@contextmanager
def _explaining(name: str, where: str, download: bool) -> Iterator[None]:
    """Turn whatever the packages raise into one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        hint = "" if download else "; nothing is downloaded unless LIPGAN_DOWNLOAD=1"
        raise ValueError(f"{name} cannot be loaded{where}: {first_line(error)}{hint}") from error


@contextmanager
def _offline(module: ModuleType, wanted: bool) -> Iterator[None]:
    """The package datasets reads its environment once, at import, and asks the network first."""
    config = module.config
    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _collected(name: str, rows: Any, image: int | str, label: int | str | None, size: int | None) -> Dataset:
    """``rows``, of which each has an image and perhaps a label under these keys."""
    n = len(rows)
    labels: list[Any] = []

    def images() -> Iterator[tuple[str, Tensor]]:
        # By index: iteration would end where the package raises an IndexError of its own.
        for i in range(n):
            with _explaining(f"sample {i} of {name}", "", download=True):
                row = rows[i]
                pixels = row[image]
                labels.append(None if label is None else row[label])
            if not isinstance(pixels, Image.Image):
                raise ValueError(f"sample {i} of {name} is {type(pixels).__name__}, not an image")
            yield f"image {i} of {name}", _levels(pixels, size)

    samples = stack_images(images(), n, name)
    whole = all(isinstance(label, (int, np.integer)) and not isinstance(label, bool) for label in labels)
    return Dataset(name, samples, torch.tensor(labels, dtype=torch.int64) if whole else None)


def _levels(image: Image.Image, size: int | None) -> Tensor:
    """``[1 or 3, h, w]``, uint8: one channel for a grey image."""
    grey = image.mode in ("1", "L") or image.mode.startswith("I")
    pixels = to_rgb(image).convert("L") if grey else to_rgb(image)
    if size is not None:
        pixels = scaled(pixels, size, crop=True)
    levels = torch.from_numpy(np.array(pixels))
    return levels[None] if grey else levels.permute(2, 0, 1)
