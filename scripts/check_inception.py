"""Inception with the published weights, against numbers that were published with them.

    python scripts/check_inception.py [WEIGHTS]

WEIGHTS is the file of pytorch-fid; by default the one in the cache of torch.hub. Its checksum is compared first. Then
the examples in the documentation of torchmetrics 1.2.1 are computed again: FID, Inception Score and KID of random
images with the seed 123. It takes a few minutes on a CPU, and no network. The exit status is 1 if a number differs.
"""

import sys

import torch
from torch import Tensor

import lipgan
from lipgan.metrics import FeatureStats, inception_score, kernel_distance
from lipgan.metrics.features import InceptionFeatures
from lipgan.metrics.features.inception import InceptionNetwork

# What torchmetrics prints, and how far its rounding to four decimals and the arithmetic of float32 may be off.
PUBLISHED = {"FID of 64 features": (12.7202, 3e-3), "Inception Score": (1.0544, 1e-4), "KID": (0.0337, 1e-4)}
SIDE, BATCH = 299, 10


def start(seed: int = 123) -> None:
    """Bring the random numbers to where an example is that has made its metric: a network's weights are drawn first."""
    torch.manual_seed(seed)
    InceptionNetwork()  # torch-fidelity makes its layers in the same order


def draw(low: int, high: int, count: int) -> Tensor:
    return torch.randint(low, high, (count, 3, SIDE, SIDE), dtype=torch.uint8)


def examples(extract: InceptionFeatures, count: int = 100, splits: int = 10, subset: int = 50) -> dict[str, float]:
    """The numbers of the three examples, of ``count`` images a side."""

    def means(images: Tensor, dim: int) -> Tensor:
        return torch.cat([extract.means(batch, dim) for batch in images.split(BATCH)])

    with torch.no_grad():
        start()
        real, fake = draw(0, 200, count), draw(100, 255, count)
        a, b = (FeatureStats(64).update(means(images, 64)) for images in (real, fake))
        fid = float(lipgan.frechet_distance(a.mean, a.cov, b.mean, b.cov))

        start()
        images = draw(0, 255, count)
        order = torch.randperm(count)
        probabilities = torch.cat([extract.probabilities(batch) for batch in images.split(BATCH)])
        score, _ = inception_score(probabilities[order], splits)

        start()
        x, y = (means(draw(low, high, count), 2048) for low, high in ((0, 200), (100, 255)))
        distances = []
        for _ in range(100):
            rows, columns = torch.randperm(count)[:subset], torch.randperm(count)[:subset]
            distances.append(kernel_distance(x[rows], y[columns], subsets=1, subset_size=subset)[0])
    return dict(zip(PUBLISHED, (fid, score, sum(distances) / len(distances)), strict=True))


def main() -> int:
    # torchmetrics takes TensorFlow's levels; images of this size are not scaled.
    found = examples(InceptionFeatures(*sys.argv[1:2], preprocessing="tensorflow"))
    wrong = 0
    for name, value in found.items():
        published, tolerance = PUBLISHED[name]
        good = abs(value - published) <= tolerance
        wrong += not good
        print(f"{name}: {value:.4f}, published {published:.4f}: {'as it should be' if good else 'DIFFERENT'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
