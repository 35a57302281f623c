"""Features of classifiers of the package torchvision, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lipgan._packages import imported
from lipgan._registry import lookup
from lipgan.metrics.features import weights as weights_files
from lipgan.metrics.features.external import (
    ExternalFeatures,
    Weights,
    absent_weights,
    called,
    check_filter,
    check_origin,
    drawn,
    explaining,
)
from lipgan.metrics.features.preprocessing import Preprocessing

__all__ = ["torchvision"]


def torchvision(
    which: str,
    *,
    weights: Weights = None,
    sha256: str | None = None,
    pretrained: bool = True,
    download: bool = False,
) -> ExternalFeatures:
    """What the last linear layer of a classifier of ``torchvision.models`` is given.

    Args:
        which: such as resnet50, or resnet50.IMAGENET1K_V1; without the name of the weights, torchvision's default ones.
            Their ``transforms`` are the preprocessing.
        weights: a file of weights, .safetensors or what torch.load reads without running code. None: that of
            torchvision, in the cache of torch.hub.
        sha256: what the file's SHA-256 begins with, 8 digits or more. None: those in its name.
        pretrained: False for random weights, always the same.
        download: fetch torchvision's file if it is not in the cache.

    Raises:
        ValueError: torchvision is not installed; an unknown model or weights; a model without a linear layer at its
            end; a file that is damaged or of another model.
        FileNotFoundError: no such file; the message says where to get it and where to put it.
    """
    check_origin(pretrained, download, weights, sha256)
    models: Any = imported("torchvision.models", "torchvision", f"torchvision:{which}")
    model, _, version = which.partition(".")
    lookup(dict.fromkeys(models.list_models(module=models)), model, "model of torchvision")
    versions = models.get_model_weights(model)
    chosen = lookup(dict(versions.__members__), version or "DEFAULT", f"weights of {model}")
    name = f"torchvision:{model}.{chosen.name}"
    with explaining(name, "has no preprocessing that is known"):
        preprocessing = _of_torchvision(chosen.transforms())
    if pretrained:
        path = weights_files.cached(chosen.url) if weights is None else Path(weights)
        if weights is None and download and not path.exists():
            weights_files.download(chosen.url, path, weights_files.digest_in_name(path.name))
        if weights is None and not path.exists():
            raise absent_weights(name, chosen.url, str(path), "put them there, name a file by weights=..., or ")
        state = weights_files.read(path, sha256)
        with explaining(str(path), f"does not hold the weights of {name}"), _reading(chosen, state):
            network: nn.Module = models.get_model(model, weights=chosen)
    else:
        # Of the networks there, these alone are made for one size of images.
        size = {"image_size": preprocessing.crop[0]} if model.startswith("vit_") and preprocessing.crop else {}
        with drawn(True), explaining(name, "cannot be made"):
            network = models.get_model(model, weights=None, **size)
    _behead(name, network)
    return ExternalFeatures(called(name, pretrained, weights), network, preprocessing)


def _of_torchvision(preset: Any) -> Preprocessing:
    crop, resize = list(preset.crop_size), list(preset.resize_size)
    return Preprocessing(
        resize=resize[0] if len(resize) == 1 else (resize[0], resize[1]),
        crop=(crop[0], crop[-1]),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=check_filter(preset.interpolation.value),
        round_up=True,
    )


@contextmanager
def _reading(chosen: Any, state: dict[str, Tensor]) -> Iterator[None]:
    """Weights of torchvision give ``state``, where they would fetch and unpickle a file.

    A model that is made without its weights, and filled later, would be another: some change their input for them.
    """
    chosen.get_state_dict = lambda *args, **kwargs: state
    try:
        yield
    finally:
        del chosen.get_state_dict


def _behead(name: str, network: nn.Module) -> None:
    """Take the last linear layer away, which separates classes."""
    found = [key for key, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError(f"{name} does not end in a linear layer, before which its features would be")
    parent, _, child = found[-1].rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
