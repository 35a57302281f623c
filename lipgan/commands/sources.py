"""What is meant by the names typed for `lipgan fid` and `lipgan eval`: images, features, statistics, extractors."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipgan import data
from lipgan._arrays import archive, mapped
from lipgan.commands.names import Source, is_extractor
from lipgan.data.image_arrays import array_batches, check_images, rows_at_once
from lipgan.data.image_sources import open_images
from lipgan.data.images import ImageError, Images, Openable, image_batches, left_out_in_words
from lipgan.metrics import features
from lipgan.metrics.feature_stats import MAX_DIM, FeatureStats
from lipgan.metrics.features import FeatureExtractor
from lipgan.training import distributed

__all__ = ["FailedElsewhereError", "Reader", "Side", "as_image_files", "find_extractor"]

_FEATURE_ROWS = 8192


_NO_IMAGES = "holds no images that can be used"
_SEVERAL_SIZES = "holds images of several sizes: --size N brings all to N x N pixels"


def find_extractor(
    name: str | None,
    download: bool,
    preprocessing: str = "pytorch",
    *,
    weights: str | None = None,
    sha256: str | None = None,
) -> FeatureExtractor:
    """The extractor of that name, or Inception with the weights in the file of that name; None: Inception.

    ``preprocessing`` is Inception's; the others are the flags --download, --weights and --sha256.
    """
    given: dict[str, Any] = {"download": download, "weights": weights, "sha256": sha256}
    given = {flag: value for flag, value in given.items() if value}
    if name is not None and name != "inception":
        prefix, colon, _ = name.partition(":")
        make: Callable[..., Any] | None = features.PREFIXES.get(prefix) if colon else features.EXTRACTORS.get(name)
        if is_extractor(name):
            accepted = () if make is None else inspect.signature(make).parameters
            for flag, value in given.items():
                if flag not in accepted:
                    got = f"--features {name}" if value is True else f"{value} beside --features {name}"
                    raise ValueError(f"--{flag} is for features whose weights are not part of lipgan, got {got}")
            try:
                return features.get(name, **given)
            except FileNotFoundError as error:
                raise FileNotFoundError(error.errno, f"{error.strerror}{_flags(accepted)}", error.filename) from error
            except ValueError as error:
                if "download=True" not in str(error):
                    raise
                raise ValueError(f"{error}{_flags(accepted)}") from error
        if given:
            raise ValueError(f"--{next(iter(given))} is for features by name, got the file --features {name}")
        origin: dict[str, Any] = {"weights": name}
    else:
        origin = {"download": download} | ({} if weights is None else {"weights": weights})
    if sha256 is not None:
        raise ValueError(f"--sha256 is not for inception, whose checksum is known, got {sha256}")
    try:
        return features.get("inception", **origin, preprocessing=preprocessing)
    except FileNotFoundError as error:
        others = ", ".join(other for other in features.names() if other != "inception")
        hint = f"{error.strerror}; on the command line: --features FILE, --download, or other features: {others}"
        raise FileNotFoundError(error.errno, hint, error.filename) from error


def _flags(accepted: Collection[str]) -> str:
    """What the arguments of features are called where they are typed."""
    flags = [flag for name, flag in (("weights", "--weights FILE"), ("download", "--download")) if name in accepted]
    return f"; on the command line: {', '.join(flags)}" if flags else ""


@dataclass(frozen=True)
class Side:
    """What was read from a source."""

    source: Source
    stats: FeatureStats
    pixels: tuple[int, int] | None = None  # width and height of the images, where there were some, all of one size
    features: str | None = None  # what the images were taken to
    skipped: list[str] = field(default_factory=list)  # a message per broken file, one for other kinds


@dataclass(frozen=True)
class _Part:
    """What one of several processes has read of a source."""

    stats: FeatureStats | None  # None without samples
    sizes: set[tuple[int, int]] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Every:
    """The images of one of several processes: every second one of two."""

    images: Images
    rank: int
    processes: int

    def __len__(self) -> int:
        return len(range(self.rank, len(self.images), self.processes))

    def __iter__(self) -> Iterator[Path | Openable]:
        return itertools.islice(iter(self.images), self.rank, None, self.processes)


class FailedElsewhereError(RuntimeError):
    """Another process of the group has raised an error, and tells of it."""


@dataclass
class Reader:
    """Reads sources, all in one way.

    Attributes:
        extractor: takes images to features; None where no source has images.
        device: where features and statistics are computed.
        size: bring images to ``size x size`` pixels. None: as they are; of a data set, its default.
        batch_size: images of one call of the extractor.
        workers: threads that read image files while the extractor runs; 0: none.
        skip_broken: leave out the image files that cannot be used, instead of raising.
        mixed: whether the extractor takes images of several sizes, batch by batch; with ``any_size`` it always does.
        progress: called with the batches of a source and their number, and iterated in their place.
        shared: whether all processes of the `torch.distributed` group call :meth:`read` with the same sources. Each
            reads its part of the samples then, and gets the statistics of all.
    """

    extractor: FeatureExtractor | None
    device: torch.device
    size: int | None = None
    batch_size: int = 50
    workers: int = 0
    skip_broken: bool = False
    mixed: bool = False
    progress: Callable[[Iterator[Tensor], int], Iterator[Tensor]] = lambda batches, number: batches
    shared: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.extractor, nn.Module):
            self.extractor.to(self.device)

    def read(self, source: Source) -> Side:
        """The statistics of ``source``.

        Raises:
            ValueError: fewer than 2 samples; a file that is broken or not what its name says; features that are too
                long. The message names the source.
            OSError: a file cannot be read.
            FailedElsewhereError: another process of the group has raised what is wrong.
        """
        if not self.shared:
            return self._joined(source, [self._part(source)])
        part, error = None, None
        try:
            part = self._part(source)
        except Exception as raised:  # of any kind: the others wait for this process
            error = raised
        failed = distributed.gathered(error is not None)
        if error is not None and True not in failed[: distributed.rank()]:
            raise error
        if any(failed):
            raise FailedElsewhereError(f"another process could not read {source.name}")
        assert part is not None
        return self._joined(source, [part] if source.kind == "statistics" else distributed.gathered(part))

    def _joined(self, source: Source, parts: list[_Part]) -> Side:
        if source.kind == "statistics":
            assert parts[0].stats is not None
            return Side(source, parts[0].stats)
        stats = None
        for held in (other.stats for other in parts if other.stats is not None):
            if stats is not None and stats.dim != held.dim:
                raise ValueError(f"{source.name} {_SEVERAL_SIZES}")
            stats = held if stats is None else stats.merge(held)
        sizes = set().union(*(other.sizes for other in parts))
        if len(sizes) > 1 and not self._takes_several_sizes():
            raise ValueError(f"{source.name} {_SEVERAL_SIZES}")
        return Side(
            source,
            _enough(source, stats),
            sizes.pop() if len(sizes) == 1 else None,
            None if source.kind == "features" or self.extractor is None else self.extractor.name,
            [message for other in parts for message in other.skipped],
        )

    @property
    def _place(self) -> tuple[int, int]:
        """The rank of this process, and the number of those that share the samples."""
        return (distributed.rank(), distributed.world_size()) if self.shared else (0, 1)

    @property
    def _mine(self) -> slice:
        """The samples of this process: every second one of two processes."""
        rank, processes = self._place
        return slice(rank, None, processes)

    def _rows_of(self, blocks: Iterator[Any]) -> Iterator[Any]:
        """The rows of this process of each block."""
        rank, processes = self._place
        before = 0
        for block in blocks:
            mine = block[(rank - before) % processes :: processes]
            before += len(block)
            if len(mine):
                yield mine

    def _takes_several_sizes(self) -> bool:
        # An extractor of any size brings all images to its own.
        return self.mixed or getattr(self.extractor, "any_size", False)

    def _part(self, source: Source) -> _Part:
        """What this process reads of ``source``."""
        if source.kind == "statistics":
            return _Part(FeatureStats.load(source.name, device=self.device))
        if source.kind == "features":
            return _Part(self._of_features(source))
        if self.extractor is None:
            raise ValueError(f"{source.name} holds images, which need a feature extractor, got None")
        with ExitStack() as stack:
            return self._of_images(source, self.extractor, stack)

    def _of_images(self, source: Source, extractor: FeatureExtractor, stack: ExitStack) -> _Part:
        skipped: list[str] = []
        batches: Iterator[Tensor]
        if source.kind not in ("image array", "data set"):
            left_out: Counter[str] = Counter()
            paths: Images = stack.enter_context(open_images(source.name, left_out))
            if left_out and self._place[0] == 0:
                skipped.append(left_out_in_words(source.name, left_out))
            if self._place[1] > 1:
                paths = _Every(paths, *self._place)
            total = len(paths)

            def skip(error: ImageError) -> None:
                skipped.append(str(error))

            batches = image_batches(
                paths,
                self.batch_size,
                self.size,
                skip=skip if self.skip_broken else None,
                workers=self.workers,
                mixed=self._takes_several_sizes(),
            )
        elif source.kind == "image array":
            with _rows(source, _NO_IMAGES) as (total, _):
                total = len(range(total)[self._mine])
            batches = array_batches(self._rows_of(_blocks(source)), self.batch_size, self.size)
        else:
            dataset = data.load(source.name, self.size)
            if not dataset.is_image:
                raise ValueError(
                    f"{source.name} holds vectors {list(dataset.shape)}, of which the features {extractor.name} "
                    "are not computed: save them as [n, d] in an .npy file"
                )
            samples = dataset.samples[self._mine]
            total = len(samples)
            batches = iter(torch.split(as_image_files(samples), self.batch_size) if total else ())
        stats, sizes = None, set()
        for images in self.progress(batches, -(-total // self.batch_size)):
            sizes.add((images.shape[3], images.shape[2]))
            with torch.no_grad():
                rows = extractor(images.to(self.device))
            stats = self._add(source, stats, rows)
        return _Part(stats, sizes, skipped)

    def _of_features(self, source: Source) -> FeatureStats | None:
        stats = None
        with _rows(source, "is no file of features") as (_, blocks):
            for block in self._rows_of(blocks):
                stats = self._add(source, stats, block)
        return stats

    def _add(self, source: Source, stats: FeatureStats | None, rows: Any) -> FeatureStats:
        if stats is None:
            if rows.shape[1] > MAX_DIM:
                raise ValueError(
                    f"the features of {source.name} have length {rows.shape[1]}, more than {MAX_DIM}: choose other "
                    "features or a smaller size"
                )
            stats = FeatureStats(rows.shape[1], device=self.device)
        return stats.update(rows)


@contextmanager
def _rows(source: Source, what: str) -> Iterator[tuple[int, Iterator[Any]]]:
    """The number of rows of an array in a file, and the rows, some at a time."""
    if source.key is None:
        with mapped(source.name, what) as rows:
            step = _step(source, rows.shape, rows.dtype)
            yield len(rows), (rows[begin : begin + step] for begin in range(0, len(rows), step))
    else:
        with archive(source.name, what) as stored:
            header = stored.header(source.key)
            step = _step(source, header.shape, header.dtype)
            yield header.shape[0], stored.blocks(source.key, step)


def _blocks(source: Source) -> Iterator[Any]:
    # A generator, so that what goes wrong with the images later is not taken for a fault of the file.
    with _rows(source, _NO_IMAGES) as (_, blocks):
        yield from blocks


def _step(source: Source, shape: tuple[int, ...], dtype: Any) -> int:
    """Rows to read at a time; ValueError for an array that cannot be used."""
    if source.kind == "image array":
        check_images(shape, dtype)
        return rows_at_once(shape)
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"it must hold features of shape (n, d), got shape {shape}")
    return _FEATURE_ROWS


def as_image_files(samples: Tensor) -> Tensor:
    """``samples [n, 1 or 3, h, w]`` in [-1, 1] as they would be read from image files: uint8, RGB."""
    levels = ((samples + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.expand(-1, 3, -1, -1)


def _enough(source: Source, stats: FeatureStats | None) -> FeatureStats:
    count = 0 if stats is None else stats.count
    if stats is None or count is None or count < 2:
        raise ValueError(f"{source.name} must have at least 2 samples that can be used, got {count}")
    return stats
