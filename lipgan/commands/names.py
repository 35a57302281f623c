"""What can be refused of a command line without PyTorch: names that nothing has, and files that are not there."""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lipgan._choices import DATA_PREFIXES, DATA_SETS, FEATURE_PREFIXES, FEATURES, PROTOCOLS, RECIPES, STUDIES
from lipgan._files import check_destination, expand_braces, is_path
from lipgan._registry import lookup

__all__ = [
    "CHECKPOINT",
    "Source",
    "check",
    "check_outputs",
    "check_study",
    "checkpoint_file",
    "files_of",
    "find_source",
    "is_extractor",
]

#: The file of a run that `lipgan sample` and `lipgan eval` read, in its folder.
CHECKPOINT = "checkpoint.pt"


# What programs call the features of an .npz file beside the names of samples.
_FEATURE_KEYS = ("features", "pool_3")

_IMAGES = ("images", "image archive", "image shards", "image table", "image array", "data set")


_SHARDS = {".tar": "image shards", ".parquet": "image table"}


@dataclass(frozen=True)
class Source:
    """A name that leads to something.

    Attributes:
        name: as it was given.
        kind: "images" for a folder, "image archive", "image shards", "image table", "image array", "statistics",
            "features" or "data set".
        key: of the array in an .npz file of images or features.
    """

    name: str
    kind: str
    key: str | None = None

    @property
    def has_images(self) -> bool:
        """Whether it needs an extractor of features."""
        return self.kind in _IMAGES


def find_source(name: str) -> Source:
    """Say what ``name`` is: a folder, a file of samples or statistics, or else a data set of :mod:`lipgan.data`.

    An .npz file that has statistics is a file of statistics, whatever it has besides: the reference batches of
    guided-diffusion hold images and the statistics of their features.

    Raises:
        ValueError: none of these.
    """
    if not name:
        raise ValueError("the name of a folder, a file or a data set must not be empty, got ''")
    path = Path(name)
    kinds = {".npz": _of_npz, ".npy": _of_npy, ".zip": _of_zip}
    if path.is_dir():
        return Source(name, "images")
    if path.suffix in kinds and path.is_file():
        return kinds[path.suffix](name)
    if path.suffix in _SHARDS:
        missing = [file for file in expand_braces(name) if not Path(file).is_file()]
        if not missing:
            return Source(name, _SHARDS[path.suffix])
        name = missing[0]
    if name in DATA_SETS or name.startswith(DATA_PREFIXES):
        return Source(name, "data set")
    wanted = (
        "a folder of images, a .zip, .tar or .parquet file of them, an .npz file of statistics or images, an .npy file "
        f"of features or images, or a data set ({', '.join(DATA_SETS)}, torchvision:NAME, huggingface:NAME)"
    )
    raise ValueError(f"{name} {'is not' if path.exists() else 'does not exist; it must be'} {wanted}")


def _of_zip(name: str) -> Source:
    return Source(name, "image archive")


def _of_npz(name: str) -> Source:
    from lipgan import _arrays  # NumPy, which only files need

    with _arrays.archive(name, "is no file of statistics, images or features") as stored:
        held = set(stored.names)
        keys = [key for key in (*_arrays.SAMPLE_KEYS, *_FEATURE_KEYS) if key in held]
        if len(keys) != 1 or any(held.issuperset(pair) for pair in _arrays.STATISTICS_KEYS):
            return Source(name, "statistics")
        header = stored.header(keys[0])
        return Source(name, _kind(len(header.shape), header.dtype.name), keys[0])


def _of_npy(name: str) -> Source:
    from lipgan import _arrays  # NumPy, which only files need

    with _arrays.mapped(name, "is no file of features") as rows:
        return Source(name, _kind(rows.ndim, rows.dtype.name))


def _kind(dimensions: int, dtype: str) -> str:
    return "image array" if dimensions in (3, 4) or dtype == "uint8" else "features"


def is_extractor(name: str) -> bool:
    """Whether ``name`` is that of features, known or not; otherwise it is a file of weights, there or not."""
    prefix, colon, _ = name.partition(":")
    if name in FEATURES or (colon and prefix in FEATURE_PREFIXES):
        return True
    # A name with a folder or a suffix is a file's.
    path = Path(name)
    return not (path.is_file() or path.suffix or path.name != name)


def _check_features(args: argparse.Namespace) -> None:
    lookup(dict.fromkeys(PROTOCOLS), args.protocol, "protocol")
    if args.features is not None and is_extractor(args.features):
        prefix, colon, _ = args.features.partition(":")
        if not (colon and prefix in FEATURE_PREFIXES):
            lookup(dict.fromkeys(FEATURES), args.features, "feature extractor")


def check_outputs(inputs: Iterable[str | Path | None], **outputs: Path | None) -> None:
    """Refuse files that a command cannot write, or that it would write over what it reads or writes besides.

    Args:
        inputs: names of what it reads, of which those count that are files.
        outputs: the files by flags, None for one that was not given.

    Raises:
        ValueError: the message names the flag and the file.
    """
    taken = {
        os.path.realpath(path): "a file that is read" for path in inputs if path is not None and os.path.isfile(path)
    }
    for flag, output in outputs.items():
        if output is None:
            continue
        check_destination(output)
        # A pipe or a terminal may be given twice.
        if output.exists() and not output.is_file():
            continue
        place = os.path.realpath(output)
        flag = f"--{flag.replace('_', '-')}"
        if place in taken:
            raise ValueError(f"{flag} {output} would be written over {taken[place]}: name another file")
        taken[place] = f"what {flag} writes"


def _check_train(args: argparse.Namespace) -> None:
    if args.config is not None:
        args.config.stat()
    if args.recipe is not None:
        lookup(dict.fromkeys(RECIPES), args.recipe, "recipe")
    # Another package's data set has a colon in its name.
    if args.data is not None and ":" not in args.data and not is_path(args.data):
        lookup(dict.fromkeys(DATA_SETS), args.data, "data set")


def _check_sample(args: argparse.Namespace) -> None:
    check_outputs([checkpoint_file(args)], output=args.output)
    _check_checkpoint(args)


def checkpoint_file(args: argparse.Namespace) -> Path:
    """The checkpoint that was named by itself or by the folder of its run."""
    path: Path = args.checkpoint
    return path / CHECKPOINT if path.is_dir() else path


def files_of(args: argparse.Namespace) -> list[str | None]:
    """What `lipgan fid` is told to read, all shards of a name with braces by themselves."""
    return [*expand_braces(args.a), *expand_braces(args.b), args.features, args.weights]


def _check_checkpoint(args: argparse.Namespace) -> None:
    checkpoint_file(args).stat()


def _check_eval(args: argparse.Namespace) -> None:
    check_outputs([checkpoint_file(args), args.weights], json=args.json, plot=args.plot)
    _check_features(args)
    _check_checkpoint(args)


def _check_fid(args: argparse.Namespace) -> None:
    for name in (args.a, args.b):
        find_source(name)
    check_outputs(files_of(args), save_stats=args.save_stats, json=args.json)
    _check_features(args)


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
        "sample": _check_sample,
        "eval": _check_eval,
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
