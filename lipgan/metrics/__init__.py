"""Metrics of generative models: statistics of features, and distances between them."""

from lipgan.metrics.feature_stats import FeatureStats
from lipgan.metrics.frechet import (
    FrechetDistance,
    FrechetInfo,
    frechet_distance,
    frechet_distance_from_features,
)

__all__ = ["FeatureStats", "FrechetDistance", "FrechetInfo", "frechet_distance", "frechet_distance_from_features"]
