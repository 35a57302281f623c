"""What pytorch-fid's ``fid_score`` offers to other programs, and its command, ``-m lipgan.compat.pytorch_fid``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from lipgan.compat._arrays import floating
from lipgan.metrics import FeatureStats, features, frechet_distance
from lipgan.metrics.frechet import distance_of_statistics

__all__ = ["calculate_fid_given_paths", "calculate_frechet_distance", "save_fid_stats"]

_DIMS = (64, 192, 768, 2048)


def calculate_frechet_distance(
    mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike, eps: float = 1e-6
) -> np.float64:
    """The squared Frechet distance of two Gaussians, as ``pytorch_fid.fid_score.calculate_frechet_distance``.

    Args:
        mu1, mu2: means, ``[d]``, or a number where ``d`` is 1.
        sigma1, sigma2: covariances, ``[d, d]``, or a number.
        eps: not used. pytorch-fid adds it to singular covariances, which need nothing added here: there the results
            differ, and this one is the distance of what was given.

    Raises:
        TypeError, ValueError: as :func:`lipgan.frechet_distance`.
    """
    result: np.float64 = frechet_distance(
        floating(np.atleast_1d(mu1)),
        floating(np.atleast_2d(sigma1)),
        floating(np.atleast_1d(mu2)),
        floating(np.atleast_2d(sigma2)),
    )
    return result


def calculate_fid_given_paths(
    paths: Sequence[str], batch_size: int, device: torch.device | str, dims: int, num_workers: int = 1
) -> np.float64:
    """The FID of two sets of images, as ``pytorch_fid.fid_score.calculate_fid_given_paths``.

    Args:
        paths: two of what ``lipgan fid`` takes: folders of images, .npz files of statistics...
        batch_size: images at once.
        device: of the network.
        dims: 64, 192, 768 or 2048, the layer of Inception.
        num_workers: threads that read images.

    Raises:
        RuntimeError: a path does not exist, as of pytorch-fid.
        ValueError: other ``dims``, not two paths, a file that cannot be used, statistics of other lengths.
        FileNotFoundError: Inception's weights are not there: nothing is downloaded.
    """
    if len(paths) != 2:
        raise ValueError(f"paths must be two, got {len(paths)}")
    first, second = _statistics(paths, batch_size, device, dims, num_workers)
    if first.dim != second.dim:
        raise ValueError(f"{paths[1]} must have {first.dim} features a sample like {paths[0]}, got {second.dim}")
    return np.float64(distance_of_statistics(first, second)[0].item())


def save_fid_stats(
    paths: Sequence[str], batch_size: int, device: torch.device | str, dims: int, num_workers: int = 1
) -> None:
    """Write the statistics of the images in ``paths[0]`` to the .npz file ``paths[1]``, which must not exist.

    Arguments and errors are those of :func:`calculate_fid_given_paths`.
    """
    if len(paths) != 2:
        raise ValueError(f"paths must be two, got {len(paths)}")
    if Path(paths[1]).exists():
        raise RuntimeError(f"Existing output file: {paths[1]}")
    (stats,) = _statistics(paths[:1], batch_size, device, dims, num_workers)
    stats.save(paths[1])


def _statistics(
    paths: Sequence[str], batch_size: int, device: torch.device | str, dims: int, num_workers: int
) -> list[FeatureStats]:
    # What reads files is not needed by those who bring statistics.
    from lipgan.commands.names import find_source
    from lipgan.commands.sources import Reader

    if dims not in _DIMS:
        raise ValueError(f"dims must be one of {', '.join(map(str, _DIMS))}, got {dims!r}")
    for path in paths:
        if not Path(path).exists():
            raise RuntimeError(f"Invalid path: {path}")
    sources = [find_source(str(path)) for path in paths]
    extractor: Any = features.get("inception", dim=dims) if any(source.has_images for source in sources) else None
    reader = Reader(extractor, torch.device(device), batch_size=batch_size, workers=num_workers, mixed=True)
    return [reader.read(source).stats for source in sources]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints ``FID:  x``, or writes statistics. Returns the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m lipgan.compat.pytorch_fid", description="The FID of two sets of images, as pytorch-fid has it."
    )
    parser.add_argument("path", nargs=2, help="a folder of images, or an .npz file of statistics")
    parser.add_argument("--batch-size", type=int, default=50, help="images at once (default: 50)")
    parser.add_argument("--num-workers", type=int, help="threads that read images (default: one a core, up to 4)")
    parser.add_argument("--device", help="such as cuda, cuda:0 or cpu (default: a GPU if there is one)")
    parser.add_argument("--dims", type=int, default=2048, choices=_DIMS, help="features of Inception (default: 2048)")
    parser.add_argument(
        "--save-stats", action="store_true", help="write the statistics of the first path to the second, an .npz file"
    )
    args = parser.parse_args(arguments)
    from lipgan.commands.console import find_device
    from lipgan.data.images import default_workers

    try:
        device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        workers = default_workers() if args.num_workers is None else args.num_workers
        if args.save_stats:
            save_fid_stats(args.path, args.batch_size, device, args.dims, workers)
        else:
            print("FID: ", calculate_fid_given_paths(args.path, args.batch_size, device, args.dims, workers))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
