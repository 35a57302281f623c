"""What can be refused of a command line without PyTorch: names that nothing has, and files that are not there."""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lipgan._choices import DATA_SETS, RECIPES, STUDIES
from lipgan._files import is_path
from lipgan._registry import lookup

__all__ = ["CHECKPOINT", "Source", "check", "check_study", "find_source"]

#: The file of a run that `lipgan sample` and `lipgan eval` read, in its folder.
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Source:
    """A name that leads to something: ``kind`` is "images", "statistics", "features" or "data set"."""

    name: str
    kind: str


def find_source(name: str) -> Source:
    """Say what ``name`` is: a folder, an .npz or .npy file, or else a data set of :mod:`lipgan.data`.

    Raises:
        ValueError: none of these.
    """
    if not name:
        raise ValueError("the name of a folder, a file or a data set must not be empty, got ''")
    path = Path(name)
    kinds = {".npz": "statistics", ".npy": "features"}
    if path.is_dir():
        return Source(name, "images")
    if path.suffix in kinds and path.is_file():
        return Source(name, kinds[path.suffix])
    if name in DATA_SETS:
        return Source(name, "data set")
    wanted = (
        f"a folder of images, an .npz file of statistics, an .npy file of features or a data set "
        f"({', '.join(DATA_SETS)})"
    )
    raise ValueError(f"{name} {'is not' if path.exists() else 'does not exist; it must be'} {wanted}")


def _check_train(args: argparse.Namespace) -> None:
    if args.config is not None:
        args.config.stat()
    if args.recipe is not None:
        lookup(dict.fromkeys(RECIPES), args.recipe, "recipe")
    # Another package's data set has a colon in its name.
    if args.data is not None and ":" not in args.data and not is_path(args.data):
        lookup(dict.fromkeys(DATA_SETS), args.data, "data set")


def _check_checkpoint(args: argparse.Namespace) -> None:
    path: Path = args.checkpoint
    (path / CHECKPOINT if path.is_dir() else path).stat()


def _check_fid(args: argparse.Namespace) -> None:
    for name in (args.a, args.b):
        find_source(name)


def check_study(args: argparse.Namespace) -> None:
    """ValueError for the arguments of `lipgan study` if they name no study, or one beside --list."""
    if args.list:
        if args.name is not None:
            raise ValueError(f"--list takes no name, got {args.name!r}")
    elif args.name is None:
        raise ValueError("study needs a name, or all; lipgan study --list shows the names")
    elif args.name != "all":
        lookup(STUDIES, args.name, "study")


_CHECKS: Mapping[str, Callable[[argparse.Namespace], None]] = MappingProxyType(
    {
        "train": _check_train,
        "sample": _check_checkpoint,
        "eval": _check_checkpoint,
        "fid": _check_fid,
        "study": check_study,
    }
)


def check(args: argparse.Namespace) -> None:
    """Refuse what the command would refuse, in its words, before PyTorch is imported for it.

    Not among several processes (``RANK`` is set): there the command lets the first one tell.

    Raises:
        ValueError: a name that nothing has.
        OSError: a file that is not there.
    """
    if args.command in _CHECKS and "RANK" not in os.environ:
        _CHECKS[args.command](args)
