"""What torch-fidelity's ``calculate_metrics`` computes: Inception Score, FID, KID, precision and recall."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lipgan._checks import check_choice, check_count
from lipgan.commands.console import progress_bar
from lipgan.data.images import default_workers, find_images, image_batches
from lipgan.metrics import f1_score, features, frechet_distance_from_features, inception_score, prdc
from lipgan.metrics.kernel_distance import distance_of_subsets

__all__ = ["calculate_metrics"]

_INCEPTION = "inception-v3-compat"
_LAYERS = {"isc": "logits_unbiased", "fid": "2048", "kid": "2048", "prc": "2048"}
_DIMS = {str(dim): dim for dim in (64, 192, 768, 2048)}

# Of no effect on the numbers: where torch-fidelity keeps files, how much memory it takes, of what it warns.
_IGNORED = (
    *("cache", "cache_root", "input1_cache_name", "input2_cache_name", "datasets_root", "datasets_download"),
    *("save_cpu_ram", "prc_batch_size", "samples_ext_lossy", "feature_extractor_compile"),
)
# Of what is not here; at these values they ask for nothing.
_REFUSED: dict[str, Any] = {"ppl": False, "samples_resize_and_crop": 0, "feature_extractor_internal_dtype": None}

#: Takes images ``[n, 3, h, w]``, uint8, to features ``[n, d]``, to a tuple of those in the order of the layers that the
#: metrics use, or to a dictionary by their names.
Extractor = Callable[[Tensor], Any]


def calculate_metrics(
    *,
    input1: str | Path | Dataset[Any] | None = None,
    input2: str | Path | Dataset[Any] | None = None,
    cuda: bool = True,
    batch_size: int = 64,
    isc: bool = False,
    fid: bool = False,
    kid: bool = False,
    prc: bool = False,
    feature_extractor: str | Extractor | None = None,
    feature_layer_isc: str | None = None,
    feature_layer_fid: str | None = None,
    feature_layer_kid: str | None = None,
    feature_layer_prc: str | None = None,
    feature_extractor_weights_path: str | None = None,
    isc_splits: int = 10,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    kid_kernel: str = "poly",
    kid_kernel_poly_degree: int = 3,
    kid_kernel_poly_gamma: float | None = None,
    kid_kernel_poly_coef0: float = 1.0,
    kid_kernel_rbf_sigma: float = 10.0,
    prc_neighborhood: int = 3,
    samples_shuffle: bool = True,
    samples_find_deep: bool = False,
    samples_find_ext: str = "png,jpg,jpeg",
    rng_seed: int = 2020,
    verbose: bool = True,
    **others: Any,
) -> dict[str, float]:
    """Metrics of generated images, as ``torch_fidelity.calculate_metrics``; with a seed, of the same random subsets.

    Args:
        input1: the generated images: a folder, or a data set whose items are images ``[3, h, w]``, uint8.
        input2: the real ones, likewise; not needed for the Inception Score alone.
        cuda: compute features on a GPU if there is one.
        batch_size: images at once.
        isc, fid, kid, prc: which metrics.
        feature_extractor: None or "inception-v3-compat" for lipgan's Inception; a function of images, see
            :data:`Extractor`; or the name of a class that ``torch_fidelity.register_feature_extractor`` was given.
        feature_layer_isc, feature_layer_fid, feature_layer_kid, feature_layer_prc: names of its features; None for its
            default.
        feature_extractor_weights_path: file of Inception's weights; None for that in the cache of torch.hub.
        isc_splits, kid_subsets, kid_subset_size, prc_neighborhood: settings of the metrics.
        kid_kernel: "poly" or "rbf".
        kid_kernel_poly_degree, kid_kernel_poly_gamma, kid_kernel_poly_coef0, kid_kernel_rbf_sigma: of the kernels.
        samples_shuffle: whether images are shuffled before the splits of the Inception Score.
        samples_find_deep: look for files in folders below, too.
        samples_find_ext: suffixes of the files, with commas between.
        rng_seed: of the order and the subsets.
        verbose: show progress.
        others: what torch-fidelity takes for its caches and data sets has no effect; ``ppl`` and
            ``samples_resize_and_crop`` are refused, and so are generative models as input.

    Returns:
        By torch-fidelity's names: ``inception_score_mean``, ``inception_score_std``, ``frechet_inception_distance``,
        ``kernel_inception_distance_mean``, ``kernel_inception_distance_std``, ``precision``, ``recall``, ``f_score``.

    Raises:
        TypeError: an argument that torch-fidelity does not have either; an input of another kind.
        ValueError: no metric, a missing input, too few images, or what is not here: perceptual path length, registered
            data sets, and VGG, torch-fidelity's default for precision and recall: name a ``feature_extractor``.
        FileNotFoundError: Inception's weights are not there; no such folder.
    """
    _check_others(others)
    wanted = [name for name, on in (("isc", isc), ("fid", fid), ("kid", kid), ("prc", prc)) if on]
    if not wanted:
        raise ValueError("isc, fid, kid or prc must be True, got False for all")
    two_sided = wanted != ["isc"]
    for name, value in (("input1", input1), ("input2", input2)):
        if value is None and (name == "input1" or two_sided):
            raise ValueError(f"{name} must be a folder or a data set, got None")
    if prc and feature_extractor is None:
        raise ValueError(
            "feature_extractor must be given for prc, got None: its default in torch-fidelity is VGG, which is not "
            f"part of lipgan; {_INCEPTION!r} is"
        )
    check_choice("kid_kernel", kid_kernel, ("poly", "rbf"))
    for name, number in (
        ("batch_size", batch_size),
        ("kid_subsets", kid_subsets),
        ("kid_subset_size", kid_subset_size),
    ):
        check_count(name, number)
    given = {"isc": feature_layer_isc, "fid": feature_layer_fid, "kid": feature_layer_kid, "prc": feature_layer_prc}
    extractor = _extractor(feature_extractor, {name: given[name] for name in wanted}, feature_extractor_weights_path)
    device = torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")
    suffixes = tuple(f".{suffix.strip().lower()}" for suffix in samples_find_ext.split(",") if suffix.strip())
    sides = []
    for value in (input1, input2) if two_sided else (input1,):
        batches, number = _batches(value, batch_size, suffixes, samples_find_deep)
        shown = progress_bar(batches, number) if verbose else batches
        sides.append(extractor.of(shown, device))
    first = sides[0]
    found: dict[str, float] = {}
    if isc:
        logits = first["isc"].double()
        if samples_shuffle:
            logits = logits[torch.from_numpy(_random(rng_seed).permutation(len(logits)))]
        mean, deviation = inception_score(logits.softmax(1), isc_splits)
        found |= {"inception_score_mean": mean, "inception_score_std": deviation}
    if fid:
        found["frechet_inception_distance"] = float(frechet_distance_from_features(sides[1]["fid"], first["fid"]))
    if kid:
        pair = [side["kid"] for side in sides]
        least = max(2, kid_subset_size)
        for name, rows in zip(("input1", "input2"), pair, strict=True):
            if len(rows) < least:
                raise ValueError(
                    f"{name} must have at least {least} images for kid_subset_size={kid_subset_size}, got {len(rows)}"
                )
        random = _random(rng_seed)
        draws = [
            [random.choice(len(rows), kid_subset_size, replace=False) for rows in pair] for _ in range(kid_subsets)
        ]
        in_first, in_second = (torch.from_numpy(np.stack(chosen)) for chosen in zip(*draws, strict=True))
        mean, deviation = distance_of_subsets(
            pair[0],
            pair[1],
            in_first,
            in_second,
            kernel="polynomial" if kid_kernel == "poly" else "rbf",
            degree=kid_kernel_poly_degree,
            gamma=kid_kernel_poly_gamma,
            coef=kid_kernel_poly_coef0,
            sigma=kid_kernel_rbf_sigma,
        )
        found |= {"kernel_inception_distance_mean": mean, "kernel_inception_distance_std": deviation}
    if prc:
        shares = prdc(sides[1]["prc"], first["prc"], prc_neighborhood, "le")
        found |= {"precision": shares["precision"], "recall": shares["recall"]}
        found["f_score"] = f1_score(shares["precision"], shares["recall"])
    return found


def _random(seed: int) -> np.random.RandomState:
    # The generator of torch-fidelity, so that subsets are the same.
    return np.random.RandomState(seed)


def _check_others(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name in _REFUSED:
            if value != _REFUSED[name]:
                raise ValueError(f"{name} must be {_REFUSED[name]!r}: lipgan has nothing in its place, got {value!r}")
        elif name not in _IGNORED and not name.startswith(("ppl_", "input1_model_", "input2_model_")):
            raise TypeError(f"calculate_metrics has no argument {name!r}")


def _batches(value: Any, batch_size: int, suffixes: tuple[str, ...], deep: bool) -> tuple[Iterator[Tensor], int]:
    """Images ``[n, 3, h, w]``, uint8, and about how many batches of them."""
    if isinstance(value, Dataset):
        loader = DataLoader(value, batch_size=batch_size)
        return iter(loader), len(loader)
    if not isinstance(value, str | Path):
        raise TypeError(f"inputs must be folders or data sets of images, got {type(value).__name__}")
    folder = Path(value)
    if not folder.exists():
        raise FileNotFoundError(f"{value}: no such folder; the data sets that torch-fidelity registers are not here")
    if not folder.is_dir():
        raise ValueError(f"inputs must be folders or data sets of images, got the file {value}")
    paths = [path for path in find_images(folder) if path.name.lower().endswith(suffixes)]
    if not deep:
        paths = [path for path in paths if path.parent == folder]
    if not paths:
        raise ValueError(
            f"{value} holds no image ({', '.join(suffixes)}){'' if deep else ', without folders below it'}"
        )
    return image_batches(paths, batch_size, workers=default_workers(), mixed=True), -(-len(paths) // batch_size)


class _Features:
    """Features for each metric, from a function that may give several."""

    def __init__(self, function: Extractor, layers: dict[str, str], order: Sequence[str]) -> None:
        self.function, self.layers, self.order = function, layers, list(order)

    def of(self, batches: Iterator[Tensor], device: torch.device) -> dict[str, Tensor]:
        """By metric: ``[n, d]``, on the CPU."""
        if isinstance(self.function, torch.nn.Module):
            self.function.to(device)
        collected: dict[str, list[Tensor]] = {layer: [] for layer in self.order}
        for images in batches:
            if (
                not isinstance(images, Tensor)
                or images.dtype != torch.uint8
                or images.ndim != 4
                or images.shape[1] != 3
            ):
                kind = (
                    f"{images.dtype} of {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
                )
                raise TypeError(f"a data set must give images [3, h, w] of uint8, got batches {kind}")
            with torch.no_grad():
                output = self.function(images.to(device).contiguous())
            if isinstance(output, Tensor):
                output = dict.fromkeys(self.order, output)
            elif not isinstance(output, dict):
                output = dict(zip(self.order, output, strict=True))
            for layer in self.order:
                collected[layer].append(output[layer].detach().cpu())
        rows = {layer: torch.cat(parts) for layer, parts in collected.items()}
        return {metric: rows[layer] for metric, layer in self.layers.items()}


class _Inception(torch.nn.Module):
    def __init__(self, layers: list[str], weights: str | None) -> None:
        super().__init__()
        self.layers = layers
        self.extractor = features.InceptionFeatures(weights, preprocessing="tensorflow")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in sorted(self.layers):  # 2048 before the logits that are made of it
            if layer in _DIMS:
                found[layer] = self.extractor.means(images, _DIMS[layer])
            else:
                deep = found["2048"] if "2048" in found else self.extractor(images)
                found[layer] = torch.nn.functional.linear(deep, self.extractor.network.fc.weight)
        return found


def _extractor(given: str | Extractor | None, layers: dict[str, str | None], weights: str | None) -> _Features:
    if given is None or given == _INCEPTION:
        names = {metric: layer or _LAYERS[metric] for metric, layer in layers.items()}
        for metric, layer in names.items():
            check_choice(f"feature_layer_{metric}", layer, (*_DIMS, "logits_unbiased"))
        order = sorted(set(names.values()))
        return _Features(_Inception(order, weights), names, order)
    if weights is not None:
        raise ValueError(f"feature_extractor_weights_path must be None beside another extractor, got {weights!r}")
    if callable(given):
        default = {metric: layer or "features" for metric, layer in layers.items()}
        return _Features(given, default, list(dict.fromkeys(default.values())))
    # Who registered a class has imported the package.
    registry = getattr(sys.modules.get("torch_fidelity.registry"), "FEATURE_EXTRACTORS_REGISTRY", {})
    if given not in registry:
        raise ValueError(
            f"feature_extractor must be {_INCEPTION!r}, a function, or a name that was registered with torch_fidelity, "
            f"got {given!r}"
        )
    kind: Any = registry[given]
    names = {metric: layer or kind.get_default_feature_layer_for_metric(metric) for metric, layer in layers.items()}
    order = list(dict.fromkeys(names.values()))
    return _Features(kind(given, order).requires_grad_(False).eval(), names, order)
