"""Metrics of generative models: statistics of features, and distances between them."""

from lipgan.metrics.divergence import jensen_shannon_divergence, kl_divergence, sample_histograms
from lipgan.metrics.feature_stats import FeatureStats
from lipgan.metrics.frechet import (
    FrechetDistance,
    FrechetInfo,
    frechet_distance,
    frechet_distance_from_features,
)
from lipgan.metrics.inception_score import InceptionScore, inception_score
from lipgan.metrics.kernel_distance import CMMD, KernelDistance, cmmd, kernel_distance
from lipgan.metrics.modes import ModeCoverage, mode_coverage
from lipgan.metrics.prdc import PRDC, f1_score, prdc
from lipgan.metrics.wasserstein import WassersteinInfo, sliced_wasserstein_distance, wasserstein_distance

__all__ = [
    "CMMD",
    "PRDC",
    "FeatureStats",
    "FrechetDistance",
    "FrechetInfo",
    "InceptionScore",
    "KernelDistance",
    "ModeCoverage",
    "WassersteinInfo",
    "cmmd",
    "f1_score",
    "frechet_distance",
    "frechet_distance_from_features",
    "inception_score",
    "jensen_shannon_divergence",
    "kernel_distance",
    "kl_divergence",
    "mode_coverage",
    "prdc",
    "sample_histograms",
    "sliced_wasserstein_distance",
    "wasserstein_distance",
]
