"""``lipgan fid``: the Frechet distance of two sets of images, from files to a number."""

import argparse
import json
import math
from typing import Any

import torch

import lipgan
from lipgan._files import write_atomically
from lipgan.commands.console import find_device, progress_bar, say
from lipgan.commands.names import Source, check_outputs, files_of, find_source
from lipgan.commands.sources import FailedElsewhereError, Reader, Side, find_extractor
from lipgan.data.images import default_workers
from lipgan.metrics import protocols
from lipgan.metrics.features import FeatureExtractor
from lipgan.metrics.frechet import distance_of_statistics
from lipgan.training import distributed

__all__ = ["main"]


def main(args: argparse.Namespace) -> int:
    """Run the command: ``FID:  x`` on stdout, and how it was computed on stderr; the exit status.

    Among several processes, as torchrun starts them, each takes its part of the images, and the first one tells.

    Raises:
        ValueError, OSError: bad input; nothing was written then, except for statistics that were complete.
    """
    with distributed.group(find_device(args.device)) as device:
        first = distributed.rank() == 0
        try:
            # All that can be refused at once is refused before hours of work.
            found = _prepared(args, device)
        except (ValueError, OSError):
            # The same in every process.
            if first:
                raise
            return 2
        reader, sources = found
        sides: list[Side] = []
        for source in sources:
            try:
                side = reader.read(source)
            except FailedElsewhereError:
                return 2
            sides.append(side)
            if first:
                for message in side.skipped:
                    say(f"skipped: {message}")
                if len(sides) == 1 and args.save_stats is not None:
                    side.stats.save(args.save_stats)
        if first:
            _tell(args, *sides)
    return 0


def _prepared(args: argparse.Namespace, device: torch.device) -> tuple[Reader, tuple[Source, Source]]:
    package = protocols.get(args.protocol)
    sources = find_source(args.a), find_source(args.b)
    check_outputs(files_of(args), save_stats=args.save_stats, json=args.json)
    if args.download and distributed.world_size() > 1:
        raise ValueError("--download is for one process: run lipgan fid once without torchrun, then with it")
    from_images = any(source.has_images for source in sources)
    reader = Reader(
        _extractor(args, package.preprocessing) if from_images else None,
        device,
        size=args.size,
        batch_size=args.batch_size,
        workers=default_workers() if args.workers is None else args.workers,
        skip_broken=args.skip_broken,
        progress=progress_bar if distributed.rank() == 0 else lambda batches, number: batches,
        shared=True,
    )
    return reader, sources


def _tell(args: argparse.Namespace, first: Side, second: Side) -> None:
    """Print the distance, and write it."""
    package = protocols.get(args.protocol)
    if first.stats.dim != second.stats.dim:
        raise ValueError(
            f"{second.source.name} has {second.stats.dim} features a sample, {first.source.name} {first.stats.dim}: "
            "bring both to the same features and size"
        )
    try:
        distance, info = distance_of_statistics(first.stats, second.stats)
    except ValueError as error:
        problem = str(error)
        for number, side in (("1", first), ("2", second)):
            for argument, meaning in (("mu", "mean"), ("sigma", "covariance")):
                problem = problem.replace(argument + number, f"the {meaning} of {side.source.name}")
        raise ValueError(problem) from error
    fid = float(distance)
    if not math.isfinite(fid):
        raise ValueError(
            f"features of {first.source.name} and {second.source.name} must be small enough for float64, got FID {fid}"
        )
    protocol = {"a": _protocol(first), "b": _protocol(second)}
    for name, side_protocol in protocol.items():
        say(f"{name.upper()}: {_in_words(side_protocol, package.name)}")
    if first.pixels and second.pixels and first.pixels != second.pixels:
        say("the images of A and B differ in size; --size N brings both to N x N pixels")
    if args.json is not None:
        result = {"fid": fid, "error_bound": info.error_bound, "dim": first.stats.dim, "size": args.size, **protocol}
        result["protocol"] = package.name
        result["lipgan"] = lipgan.__version__
        write_atomically(args.json, (json.dumps(result, indent=2) + "\n").encode())
    # As pytorch-fid prints it, for the scripts that read it.
    print("FID: ", fid)


def _extractor(args: argparse.Namespace, preprocessing: str) -> FeatureExtractor:
    return find_extractor(args.features, args.download, preprocessing, weights=args.weights, sha256=args.sha256)


def _protocol(side: Side) -> dict[str, Any]:
    """What the number has to be printed with, since definitions differ between programs."""
    return {
        "source": side.source.name,
        "kind": side.source.kind,
        "samples": side.stats.count,
        "pixels": None if side.pixels is None else list(side.pixels),
        "features": side.features,
        # A file without a count says nothing of it either.
        "ddof": side.stats.ddof if side.stats.count is not None else None,
        "skipped": side.skipped,
    }


def _in_words(side: dict[str, Any], package: str) -> str:
    samples = "an unknown number of" if side["samples"] is None else side["samples"]
    words = f"{samples} samples, {side['kind']} {side['source']}"
    if side["features"] is not None:
        size = "of several sizes" if side["pixels"] is None else "{} x {} pixels".format(*side["pixels"])
        words += f", {size} in RGB, features {side['features']}, protocol {package}"
    return words if side["ddof"] is None else f"{words}, covariance over n - {side['ddof']}"
