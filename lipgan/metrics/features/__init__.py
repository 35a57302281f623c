"""Feature extractors by name: images ``[n, c, h, w]`` to the features ``[n, d]`` that the metrics compare.

`get` returns a `FeatureExtractor`. The metrics take any other callable from images to features as well.

Names with a colon are networks of other packages, with their own preprocessing, or a file of the user's:
``torchvision:NAME``, ``timm:NAME``, ``hf:NAME`` and ``module:PATH.py:FACTORY``. Their options are those of the
functions in `PREFIXES`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lipgan._registry import lookup
from lipgan.metrics.features.base import FeatureExtractor
from lipgan.metrics.features.digits import DigitFeatures
from lipgan.metrics.features.external import ExternalFeatures
from lipgan.metrics.features.huggingface import huggingface as _huggingface
from lipgan.metrics.features.inception import InceptionFeatures
from lipgan.metrics.features.pixels import Pixels
from lipgan.metrics.features.preprocessing import Preprocessing
from lipgan.metrics.features.random import RandomFeatures
from lipgan.metrics.features.timm import timm as _timm
from lipgan.metrics.features.torchvision import torchvision as _torchvision
from lipgan.metrics.features.user import UserFeatures
from lipgan.metrics.features.user import module as _module
from lipgan.metrics.features.vision import ClipFeatures, DinoFeatures

__all__ = [
    "EXTRACTORS",
    "PREFIXES",
    "ClipFeatures",
    "DigitFeatures",
    "DinoFeatures",
    "ExternalFeatures",
    "FeatureExtractor",
    "InceptionFeatures",
    "Pixels",
    "Preprocessing",
    "RandomFeatures",
    "UserFeatures",
    "get",
    "names",
]

#: What makes an extractor, by the name that `get` takes.
EXTRACTORS: Mapping[str, Callable[..., FeatureExtractor]] = MappingProxyType(
    {
        "clip": ClipFeatures,
        "digits": DigitFeatures,
        "dinov2": DinoFeatures,
        "inception": InceptionFeatures,
        "pixels": Pixels,
        "random": RandomFeatures,
    }
)


#: What makes an extractor of another package, by what stands before the colon of a name.
PREFIXES: Mapping[str, Callable[..., FeatureExtractor]] = MappingProxyType(
    {"torchvision": _torchvision, "timm": _timm, "hf": _huggingface, "module": _module}
)


def names() -> list[str]:
    """The names without a colon that `get` knows, sorted."""
    return sorted(EXTRACTORS)


def get(name: str, **options: Any) -> FeatureExtractor:
    """Make the feature extractor called ``name``.

    Args:
        name: one of `names`, or one with a prefix of `PREFIXES` and a colon.
        options: arguments of that extractor, which its class in `EXTRACTORS`, or its function in `PREFIXES`, documents.

    Raises:
        ValueError: unknown name; the message holds the nearest ones.
        TypeError: an option that this extractor does not have.

    Example::

        >>> features = get("random")
        >>> features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 224])
    """
    prefix, colon, which = name.partition(":")
    if colon and prefix in PREFIXES:
        if not which:
            raise ValueError(f"{name} lacks the name of a model, as in timm:resnet50.a1_in1k")
        return PREFIXES[prefix](which, **options)
    return lookup(EXTRACTORS, name, "feature extractor")(**options)
