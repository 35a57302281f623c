"""What ``torchmetrics.image`` offers for generative models, computed by lipgan; torchmetrics has to be installed.

The classes are subclasses of those of torchmetrics, so they go wherever those go, into ``MetricCollection``,
``FeatureShare`` and Lightning, and have what those have: ``forward``, ``to``, ``set_dtype``, ``state_dict``, ``plot``,
``sync`` over processes. Their states have the same names and meanings. What differs:

- ``feature=`` a number or "logits_unbiased" takes lipgan's Inception, which needs no torch-fidelity, and no weights but
  those that torch-fidelity and pytorch-fid keep in the cache of torch.hub. Nothing is downloaded.
- The Frechet distance is the nuclear norm of a product of factors, in float64: faster, never negative, never NaN.
  Features that hold a NaN or an infinity are a ValueError.
- ``forward`` with ``reset_real_features=False`` counts the real features once.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from lipgan.metrics import frechet_distance, inception_score
from lipgan.metrics.features.inception import InceptionFeatures
from lipgan.metrics.kernel_distance import distance_of_subsets

try:
    from torchmetrics.image.fid import FrechetInceptionDistance as _FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore as _InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance as _KernelInceptionDistance
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:
    raise ImportError(
        f"lipgan.compat.torchmetrics needs the package torchmetrics (pip install torchmetrics): {error}"
    ) from error

__all__ = ["FrechetInceptionDistance", "InceptionScore", "KernelInceptionDistance"]

_DIMS = (64, 192, 768, 2048)


class _Inception(nn.Module):
    """lipgan's Inception-v3 with the preprocessing of torchmetrics, in the place of its ``NoTrainInceptionV3``."""

    def __init__(self, feature: int | str, weights: str | os.PathLike[str] | None, antialias: bool) -> None:
        super().__init__()
        self.unbiased = feature == "logits_unbiased"
        self.num_features = 1008 if self.unbiased else int(feature)
        self.extractor = InceptionFeatures(
            weights, dim=self.num_features, preprocessing="torchmetrics" if antialias else "tensorflow"
        )

    def forward(self, imgs: Tensor) -> Tensor:
        if imgs.dtype != torch.uint8:
            raise ValueError(f"imgs must be uint8, or in [0, 1] with normalize=True, got {imgs.dtype}")
        return self.extractor.logits(imgs, bias=False) if self.unbiased else self.extractor(imgs)


def _network(
    feature: Any, names: tuple[int | str, ...], weights: str | os.PathLike[str] | None, antialias: bool
) -> nn.Module:
    if isinstance(feature, nn.Module):
        if weights is not None:
            raise ValueError(f"feature_extractor_weights_path must be None for a module as feature, got {weights!r}")
        return feature
    if isinstance(feature, bool) or not isinstance(feature, int | str):
        raise TypeError(f"feature must be one of {names} or a torch.nn.Module, got {type(feature).__name__}")
    if feature not in names:
        raise ValueError(f"feature must be one of {names} or a torch.nn.Module, got {feature!r}")
    return _Inception(feature, weights, antialias)


class FrechetInceptionDistance(_FrechetInceptionDistance):
    """``torchmetrics.image.fid.FrechetInceptionDistance``.

    Args:
        feature: 64, 192, 768 or 2048 for a layer of Inception, or a module that gives features ``[n, d]``. Its ``d`` is
            ``num_features``, or found by a random image.
        reset_real_features: whether ``reset`` forgets the real features too.
        normalize: whether images for Inception are floating point in [0, 1]; uint8 otherwise.
        input_img_size: of that random image.
        feature_extractor_weights_path: file of Inception's weights; None for that in the cache of torch.hub.
        antialias: whether images are scaled to Inception's size with antialiasing.
        kwargs: those of ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: as torchmetrics; a file beside a module.
        FileNotFoundError: Inception's weights are not there.
    """

    # torchmetrics adds the state from before a forward to that of its batch, and real features that a reset keeps are
    # in both.
    full_state_update: bool = True

    def __init__(
        self,
        feature: int | nn.Module = 2048,
        reset_real_features: bool = True,
        normalize: bool = False,
        input_img_size: tuple[int, int, int] = (3, 299, 299),
        feature_extractor_weights_path: str | os.PathLike[str] | None = None,
        antialias: bool = True,
        **kwargs: Any,
    ) -> None:
        network = _network(feature, _DIMS, feature_extractor_weights_path, antialias)
        super().__init__(
            feature=network,
            reset_real_features=reset_real_features,
            normalize=normalize,
            input_img_size=input_img_size,
            **kwargs,
        )
        # It decides what `normalize` does.
        self.used_custom_model = network is feature
        # Of a metric whose state was loaded, before it has seen features.
        self.orig_dtype = torch.float32

    def compute(self) -> Tensor:
        """The distance, in the dtype of the features. RuntimeError unless both sides have 2 samples."""
        moments = []
        for side in ("real", "fake"):
            count = int(getattr(self, f"{side}_features_num_samples"))
            if count < 2:
                raise RuntimeError(
                    f"More than one sample is required for both the real and fake distributed to compute FID, "
                    f"got {count} {side}"
                )
            mean = getattr(self, f"{side}_features_sum").double() / count
            scatter = getattr(self, f"{side}_features_cov_sum").double().addr(mean, mean, alpha=-count)
            moments += [mean, scatter / (count - 1)]
        return frechet_distance(*moments).to(self.orig_dtype)  # type: ignore[no-any-return]


class KernelInceptionDistance(_KernelInceptionDistance):
    """``torchmetrics.image.kid.KernelInceptionDistance``; with the same seed, of the same subsets.

    Args:
        feature: "logits_unbiased", 64, 192, 768 or 2048 for a layer of Inception, or a module that gives features.
        subsets: number of random subsets.
        subset_size: samples of each side in a subset.
        degree, gamma, coef: of the kernel ``(gamma x.y + coef)^degree``; gamma None for ``1 / d``.
        reset_real_features, normalize, kwargs: as in :class:`FrechetInceptionDistance`.
        feature_extractor_weights_path, antialias: likewise.

    Raises:
        TypeError, ValueError, FileNotFoundError: as :class:`FrechetInceptionDistance`.
    """

    full_state_update: bool = True

    def __init__(
        self,
        feature: str | int | nn.Module = 2048,
        subsets: int = 100,
        subset_size: int = 1000,
        degree: int = 3,
        gamma: float | None = None,
        coef: float = 1.0,
        reset_real_features: bool = True,
        normalize: bool = False,
        *,
        feature_extractor_weights_path: str | os.PathLike[str] | None = None,
        antialias: bool = True,
        **kwargs: Any,
    ) -> None:
        network = _network(feature, ("logits_unbiased", *_DIMS), feature_extractor_weights_path, antialias)
        super().__init__(
            feature=network,
            subsets=subsets,
            subset_size=subset_size,
            degree=degree,
            gamma=gamma,
            coef=coef,
            reset_real_features=reset_real_features,
            normalize=normalize,
            **kwargs,
        )
        self.used_custom_model = network is feature

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the subsets. ValueError with fewer samples than a subset has."""
        real, fake = dim_zero_cat(self.real_features), dim_zero_cat(self.fake_features)
        for side, rows in (("real", real), ("fake", fake)):
            if len(rows) < self.subset_size:
                raise ValueError(
                    f"Argument `subset_size` should be smaller than the number of samples, "
                    f"got {self.subset_size} and {len(rows)} {side}"
                )
        # The draws of torchmetrics, in its order.
        draws = [[torch.randperm(len(rows))[: self.subset_size] for rows in (real, fake)] for _ in range(self.subsets)]
        in_real, in_fake = (torch.stack(chosen) for chosen in zip(*draws, strict=True))
        values = distance_of_subsets(real, fake, in_real, in_fake, degree=self.degree, gamma=self.gamma, coef=self.coef)
        mean, deviation = (real.new_tensor(value) for value in values)
        return mean, deviation


class InceptionScore(_InceptionScore):
    """``torchmetrics.image.inception.InceptionScore``; with the same seed, of the same splits.

    Args:
        feature: as in :class:`KernelInceptionDistance`; the features are logits.
        splits: the score is the mean over so many parts of the images.
        normalize: whether images are floating point in [0, 1]; here they are made uint8 for a module as well.
        feature_extractor_weights_path, antialias, kwargs: as in :class:`FrechetInceptionDistance`.

    Raises:
        TypeError, ValueError, FileNotFoundError: as :class:`FrechetInceptionDistance`.
    """

    def __init__(
        self,
        feature: str | int | nn.Module = "logits_unbiased",
        splits: int = 10,
        normalize: bool = False,
        *,
        feature_extractor_weights_path: str | os.PathLike[str] | None = None,
        antialias: bool = True,
        **kwargs: Any,
    ) -> None:
        network = _network(feature, ("logits_unbiased", *_DIMS), feature_extractor_weights_path, antialias)
        super().__init__(feature=network, splits=splits, normalize=normalize, **kwargs)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the splits, of shuffled images."""
        logits = dim_zero_cat(self.features)
        logits = logits[torch.randperm(len(logits)).to(logits.device)]
        # Not the splits of lipgan: torch.chunk makes all but the last of one length.
        parts = logits.double().softmax(1).chunk(self.splits)
        scores = logits.new_tensor([inception_score(part, splits=1)[0] for part in parts], dtype=torch.float64)
        return scores.mean().to(logits), scores.std().to(logits)
