"""Feature extractors by name: images ``[n, c, h, w]`` to the features ``[n, d]`` that the metrics compare.

`get` returns a `FeatureExtractor`. The metrics take any other callable from images to features as well.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lipgan._registry import lookup
from lipgan.metrics.features.base import FeatureExtractor
from lipgan.metrics.features.digits import DigitFeatures
from lipgan.metrics.features.inception import InceptionFeatures
from lipgan.metrics.features.pixels import Pixels
from lipgan.metrics.features.random import RandomFeatures

__all__ = [
    "EXTRACTORS",
    "DigitFeatures",
    "FeatureExtractor",
    "InceptionFeatures",
    "Pixels",
    "RandomFeatures",
    "get",
    "names",
]

#: What makes an extractor, by the name that `get` takes.
EXTRACTORS: Mapping[str, Callable[..., FeatureExtractor]] = MappingProxyType(
    {"digits": DigitFeatures, "inception": InceptionFeatures, "pixels": Pixels, "random": RandomFeatures}
)


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return sorted(EXTRACTORS)


def get(name: str, **options: Any) -> FeatureExtractor:
    """Make the feature extractor called ``name``.

    Args:
        name: one of `names`.
        options: arguments of that extractor, which its class in `EXTRACTORS` documents.

    Raises:
        ValueError: unknown name; the message holds the nearest ones.
        TypeError: an option that this extractor does not have.

    Example::

        >>> features = get("random")
        >>> features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 224])
    """
    return lookup(EXTRACTORS, name, "feature extractor")(**options)
