"""What clean-fid's ``fid`` offers: the FID of folders, archives and generators, with images scaled in its ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lipgan._checks import check_choice, check_count
from lipgan.commands.console import progress_bar
from lipgan.commands.names import find_source
from lipgan.commands.sources import Reader
from lipgan.metrics import FeatureStats, features
from lipgan.metrics.features.inception import resize_bicubic
from lipgan.metrics.frechet import distance_of_statistics

__all__ = ["compute_fid"]

_Array = np.ndarray[Any, np.dtype[Any]]

# The ways of clean-fid by its names, and by those of lipgan's Inception.
_MODES = {"clean": "clean", "legacy_pytorch": "pytorch", "legacy_tensorflow": "tensorflow"}
_SIDE = 299


class _Scaled:
    """Images, scaled as clean-fid does, to features: what :class:`lipgan.commands.sources.Reader` calls."""

    name = "clean-fid"
    dim = None

    def __init__(
        self,
        mode: str,
        network: Callable[[Tensor], Tensor] | None,
        transform: Callable[[_Array], _Array] | None,
        resize: Callable[[_Array], _Array] | None,
        device: torch.device,
    ) -> None:
        self.mode, self.transform, self.resize, self.device = mode, transform, resize, device
        if network is None:
            inception: Any = features.get("inception", preprocessing=_MODES[mode])
            inception.to(device)

            def network(x: Tensor) -> Tensor:
                found: Tensor = inception(x / 255)  # scaling to its size changes nothing any more
                return found

        self.network = network

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[n, d]`` of ``images [n, 3, h, w]`` with levels from 0 to 255, of any dtype."""
        if self.transform is None and self.resize is None:
            x = self._batch(images.float())
        else:
            x = torch.cat([self._one(image) for image in images.cpu()])
        rows = self.network(x.to(self.device))
        if not isinstance(rows, Tensor) or rows.ndim != 2:
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"custom_feat_extractor must return features (n, d), got {shape}")
        return rows.detach()

    def _one(self, image: Tensor) -> Tensor:
        array = image.permute(1, 2, 0).numpy()
        if self.transform is not None:
            array = self.transform(array)
        if self.resize is not None:
            return _as_batch(self.resize(array))
        return self._batch(_as_batch(array))

    def _batch(self, x: Tensor) -> Tensor:
        if self.mode == "clean":
            return resize_bicubic(x)
        if self.mode == "legacy_pytorch":
            return F.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False).clamp(0, 255)
        return x  # the network does it


def _as_batch(array: _Array) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32)).permute(2, 0, 1)[None]


def compute_fid(
    fdir1: str | None = None,
    fdir2: str | None = None,
    gen: Callable[[Tensor], Tensor] | None = None,
    mode: str = "clean",
    model_name: str = "inception_v3",
    num_workers: int = 12,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    dataset_name: str = "FFHQ",
    dataset_res: int | str = 1024,
    dataset_split: str = "train",
    num_gen: int = 50_000,
    z_dim: int = 512,
    custom_feat_extractor: Callable[[Tensor], Tensor] | None = None,
    verbose: bool = True,
    custom_image_tranform: Callable[[_Array], _Array] | None = None,
    custom_fn_resize: Callable[[_Array], _Array] | None = None,
    use_dataparallel: bool = True,
) -> float:
    """The FID of two sets of images, or of a generator and a set, as ``cleanfid.fid.compute_fid``.

    Inception's weights are those of :class:`lipgan.metrics.features.InceptionFeatures`, and nothing is downloaded. The
    statistics of data sets that clean-fid downloads are not there.

    Args:
        fdir1, fdir2: folders or zip archives of images; what else ``lipgan fid`` takes will do, such as an .npz file of
            statistics that were computed in the same way.
        gen: takes noise ``[batch_size, z_dim]`` to images ``[batch_size, 3, h, w]`` with levels from 0 to 255. The
            noise is drawn by the global generator of the CPU.
        mode: how images are scaled: "clean", "legacy_pytorch" or "legacy_tensorflow".
        model_name: "inception_v3"; not looked at beside ``custom_feat_extractor``.
        num_workers: threads that read images.
        batch_size: images at once.
        device: None for a GPU if there is one.
        dataset_name, dataset_res, dataset_split, use_dataparallel: not used.
        num_gen: images of the generator.
        z_dim: length of its noise.
        custom_feat_extractor: takes ``[n, 3, 299, 299]``, float32 with levels from 0 to 255, to ``[n, d]``.
        verbose: show progress.
        custom_image_tranform: of each image as an array ``[h, w, 3]``, before it is scaled. The name is clean-fid's.
        custom_fn_resize: scales an array ``[h, w, 3]``, in place of ``mode``.

    Raises:
        ValueError: neither two sets nor a generator and a set; an unknown mode or model; a set that cannot be used.
        FileNotFoundError: Inception's weights are not there.
        OSError: a set cannot be read.
    """
    check_choice("mode", mode, tuple(_MODES))
    if custom_feat_extractor is None and model_name != "inception_v3":
        raise ValueError(f"model_name must be inception_v3, or custom_feat_extractor be given, got {model_name!r}")
    if fdir1 is None and gen is None:
        raise ValueError("fdir1 or gen must be given, got None for both")
    if fdir2 is None:
        raise ValueError(
            "fdir2 must name a folder, an archive or a file of statistics, got None: the statistics that clean-fid "
            f"downloads, such as {dataset_name}'s, are not part of lipgan"
        )
    for name, count in (("batch_size", batch_size), ("num_gen", num_gen), ("z_dim", z_dim)):
        check_count(name, count)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # All names are looked up before hours of work.
    sources = [find_source(name) for name in (fdir1, fdir2) if name is not None]
    extractor = _Scaled(mode, custom_feat_extractor, custom_image_tranform, custom_fn_resize, where)
    reader = Reader(extractor, where, batch_size=batch_size, workers=num_workers, mixed=True)
    if verbose:
        reader.progress = progress_bar
    sides = []
    for source in sources:
        side = reader.read(source)
        for message in side.skipped:
            warnings.warn(message, stacklevel=2)
        sides.append(side.stats)
    if fdir1 is None:
        assert gen is not None
        sides.insert(0, _of_generator(gen, extractor, num_gen, batch_size, z_dim, reader.progress))
    first, second = sides
    if first.dim != second.dim:
        raise ValueError(f"fdir2 must have {first.dim} features a sample like the other side, got {second.dim}")
    return float(distance_of_statistics(first, second)[0])


def _of_generator(
    gen: Callable[[Tensor], Tensor],
    extractor: _Scaled,
    num_gen: int,
    batch_size: int,
    z_dim: int,
    progress: Callable[[Iterator[Tensor], int], Iterator[Tensor]],
) -> FeatureStats:
    batches = -(-num_gen // batch_size)
    noise = (torch.randn(batch_size, z_dim) for _ in range(batches))
    stats: FeatureStats | None = None
    left = num_gen
    for z in progress(noise, batches):
        with torch.no_grad():
            rows = extractor(gen(z.to(extractor.device)))[:left]
        if stats is None:
            stats = FeatureStats(rows.shape[1], device=extractor.device)
        stats.update(rows)
        left -= len(rows)
    assert stats is not None
    return stats
