"""Data sets that fit in memory, by name.

`load` returns a `Dataset`: samples as one tensor, so that a batch is one gather, on whatever device they lie.

dataset.py   the `Dataset`, and the order of the batches
digits.py, patches.py, sentences.py, chords.py, toy.py   the built-in ones
files.py     folders of images, .npz and .npy files
external.py  data sets of torchvision and of Hugging Face, where those are installed
images.py    decoding of image files
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from lipgan._files import is_path
from lipgan._registry import lookup
from lipgan.data import external, files
from lipgan.data.chords import chords
from lipgan.data.dataset import BatchOrder, Dataset
from lipgan.data.digits import digits
from lipgan.data.patches import patches
from lipgan.data.sentences import sentences
from lipgan.data.toy import grid, ring, segments, swiss_roll, two_gaussians

__all__ = ["DEFAULT_SIZE", "LOADERS", "BatchOrder", "Dataset", "is_built_in", "load", "names", "segments"]

#: Pixels of a side of images where none are asked for.
DEFAULT_SIZE = 16

Loader = Callable[[int | None], Dataset]


def _images(make: Callable[[int], Dataset], default: int = DEFAULT_SIZE) -> Loader:
    return lambda size: make(default if size is None else size)


def _vectors(make: Callable[[], Dataset]) -> Loader:
    def loader(size: int | None) -> Dataset:
        dataset = make()
        if size is not None:
            raise ValueError(f"size is for images, and {dataset.name} holds vectors {list(dataset.shape)}; got {size}")
        return dataset

    return loader


#: What makes a data set, by the name that `load` takes.
LOADERS: Mapping[str, Loader] = MappingProxyType(
    {
        "chords": _vectors(chords),
        "digits": _images(digits),
        "grid": _vectors(grid),
        "patches": _images(patches),
        "ring": _vectors(ring),
        "segments": _vectors(lambda: dataclasses.replace(segments(), name="segments")),
        "sentences": _images(sentences, 24),
        "swiss-roll": _vectors(swiss_roll),
        "two-gaussians": _vectors(two_gaussians),
    }
)


def names() -> list[str]:
    """The built-in names, sorted."""
    return sorted(LOADERS)


def is_built_in(name: str) -> bool:
    """Whether the data set of that name is made by this package, and not read from files."""
    return name in LOADERS or name.startswith("segments:")


def load(name: str | os.PathLike[str], size: int | None = None, *, download: bool = False) -> Dataset:
    """Load a data set.

    Args:
        name: the first of these that fits:

            - a built-in name, one of `names`;
            - "segments:THETA", see `lipgan.data.toy.segments`;
            - "torchvision:NAME" or "huggingface:NAME", see `lipgan.data.external`;
            - a path: a folder of images, a .zip, .tar or .parquet file of them (several with braces), or an .npz or
              .npy file, see `lipgan.data.files`.
        size: pixels a side of square images. None: 16 for digits and patches, 24 for sentences, and the images' own
            size for all others. Vectors have none.
        download: let torchvision and Hugging Face fetch what is not on this machine; ``LIPGAN_DOWNLOAD=1`` in the
            environment says the same. Nothing is fetched otherwise.

    Returns:
        The data set; its ``name`` loads it again.

    Raises:
        ValueError: an unknown name (the message names the nearest ones), a size that the data set cannot have, no size
            where one is needed, or content that cannot be used.
        OSError: a folder or a file cannot be read.
    """
    text = os.fspath(name)
    if text in LOADERS:
        return LOADERS[text](size)
    if text.startswith("segments:"):
        # By the name that was typed, such as segments:.5, which a run that is resumed compares.
        return dataclasses.replace(_vectors(lambda: segments(_theta(text)))(size), name=text)
    if text.startswith(external.PREFIXES):
        return external.load(text, size, download=download or os.environ.get("LIPGAN_DOWNLOAD") == "1")
    if isinstance(name, Path) or is_path(text):
        return files.load(text, size)
    return lookup(LOADERS, text, "data set")(size)


def _theta(name: str) -> float:
    try:
        return float(name.removeprefix("segments:"))
    except ValueError:
        raise ValueError(f"segments:THETA needs a number, got {name!r}") from None
