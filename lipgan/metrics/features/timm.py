"""Features of models of the package timm, by name."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lipgan._packages import imported
from lipgan._registry import lookup
from lipgan.metrics.features import weights as weights_files
from lipgan.metrics.features.external import (
    ExternalFeatures,
    Weights,
    called,
    check_filter,
    check_origin,
    drawn,
    explaining,
)
from lipgan.metrics.features.preprocessing import Preprocessing

__all__ = ["timm"]


def timm(
    which: str,
    *,
    weights: Weights = None,
    sha256: str | None = None,
    pretrained: bool = True,
    download: bool = False,
) -> ExternalFeatures:
    """What the classifier of a model of the package timm is given: its forward pass with ``num_classes=0``.

    Args:
        which: such as resnet50.a1_in1k or vit_large_patch14_dinov2.lvd142m. Size, crop, filter and norm are those of
            ``timm.data.resolve_data_config``.
        weights: a file of weights, .safetensors or what torch.load reads without running code. None: those of timm, in
            the cache of the hub.
        sha256, pretrained, download: as of :func:`torchvision`.

    Raises:
        ValueError: timm is not installed; an unknown model; weights that are not here, or of another model; a
            preprocessing that cannot be had.
        FileNotFoundError: no such file.
    """
    check_origin(pretrained, download, weights, sha256)
    package: Any = imported("timm", "timm", f"timm:{which}")
    settings: Any = imported("timm.data", "timm", f"timm:{which}")
    lookup(dict.fromkeys(package.list_models()), which.partition(".")[0], "model of timm")
    if sha256 is not None and weights is None:
        raise ValueError("sha256 is of the file weights, got sha256 alone")
    options: dict[str, Any] = {}
    if weights is not None:
        options["pretrained_cfg_overlay"] = {"state_dict": weights_files.read(weights, sha256)}
    name = f"timm:{which}"
    with drawn(not pretrained), explaining(name, "cannot be loaded"), _offline(not download):
        if pretrained and weights is None:
            _check_cache(package, which, download)
        # With all of its classes, because timm then refuses weights of another model; without, it draws what they lack.
        network = package.create_model(which, pretrained=pretrained, **options)
        network.reset_classifier(0)
        config = settings.resolve_data_config({}, model=network)
    # Which of the weights of this name, where it did not say.
    tag = network.pretrained_cfg.get("tag")
    if tag and "." not in name:
        name = f"{name}.{tag}"
    with explaining(name, "has no preprocessing that is known"):
        preprocessing = _of_timm(config)
    return ExternalFeatures(called(name, pretrained, weights), network, preprocessing)


def _check_cache(package: Any, which: str, download: bool) -> None:
    """ValueError for weights that timm would fetch, unless it may: before it draws those of the whole network."""
    config = package.get_pretrained_cfg(which)
    # What timm itself says of unknown weights is said when it makes the model.
    if config is None:
        return
    if not config.hf_hub_id:
        raise ValueError("its weights are not on the hub: name a file of them by weights=...")
    hub: Any = imported("huggingface_hub", "huggingface_hub", f"timm:{which}")
    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    repository, _, revision = config.hf_hub_id.partition("@")
    found = [hub.try_to_load_from_cache(repository, file, revision=revision or None) for file in files]
    if not download and not any(isinstance(path, str) for path in found):
        raise ValueError(
            f"its weights, {config.hf_hub_id} of the hub, are not in the cache: name a file by weights=..., or allow "
            "the download by download=True"
        )


def _of_timm(config: Mapping[str, Any]) -> Preprocessing:
    channels, height, width = config["input_size"]
    mode = config["crop_mode"]
    if channels != 3 or mode not in ("center", "squash") or (mode == "center" and height != width):
        raise ValueError(f"images of {channels} channels, {height} x {width} pixels, cropped by {mode!r}")
    larger = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    return Preprocessing(
        resize=larger[0] if mode == "center" else (larger[0], larger[1]),
        crop=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=check_filter(config["interpolation"]),
        round_up=True,
    )


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """The hub's client reads its environment once, at import, and asks the network first."""
    found = importlib.util.find_spec("huggingface_hub")
    if found is None or not wanted:
        yield
        return
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
