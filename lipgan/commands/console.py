"""What the commands share: the device, folders of images, progress, and lines on stderr."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from lipgan.data.images import find_images, left_out_in_words

__all__ = ["find_device", "list_images", "progress_bar", "say"]


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the best one for None; ValueError if it cannot be used here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # A number that comes back: the device "meta" makes tensors, but computes nothing.
        torch.zeros((), device=device).item()
    # Backends that are not there raise what comes to them: an ImportError that of privateuseone.
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def list_images(folder: str) -> list[Path]:
    """The image files in a folder; says how many other files are left out.

    Raises:
        ValueError, OSError: as `lipgan.data.images.find_images`.
    """
    left_out: Counter[str] = Counter()
    paths = find_images(folder, left_out)
    if left_out:
        say(f"skipped: {left_out_in_words(folder, left_out)}")
    return paths


def progress_bar(batches: Iterator[torch.Tensor], number: int) -> Iterator[torch.Tensor]:
    """The ``number`` batches, with a bar on stderr where somebody watches."""
    # Imported here because only images need it. None: only where somebody watches.
    from tqdm import tqdm

    yield from tqdm(batches, total=number, unit="batch", disable=None, leave=False)


def say(message: str) -> None:
    """Print ``message`` on stderr, in one line."""
    print(f"lipgan: {' '.join(message.split())}", file=sys.stderr)
