"""Batch normalization with a gain and a shift of their own for each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan._checks import check_count

__all__ = ["ConditionalBatchNorm1d", "ConditionalBatchNorm2d"]


class _ConditionalBatchNorm(nn.modules.batchnorm._BatchNorm):
    def __init__(self, num_features: int, classes: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        check_count("classes", classes)
        super().__init__(num_features, eps, momentum, affine=False)
        self.classes = classes
        # Parameters and not embeddings: spectral normalization of a whole generator would shrink an embedding of ones.
        self.gain = nn.Parameter(torch.ones(classes, num_features))
        self.shift = nn.Parameter(torch.zeros(classes, num_features))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """``x [B, num_features, ...]`` and ``labels [B]``, int64 -> as x."""
        normalized = super().forward(x)
        shape = (*normalized.shape[:2], *[1] * (normalized.ndim - 2))
        gain, shift = (F.embedding(labels, table).view(shape) for table in (self.gain, self.shift))
        return torch.addcmul(shift, normalized, gain)

    def extra_repr(self) -> str:
        return f"{self.num_features}, classes={self.classes}, eps={self.eps}, momentum={self.momentum}"


class ConditionalBatchNorm1d(_ConditionalBatchNorm, nn.BatchNorm1d):
    """Batch norm of vectors whose gain and shift depend on the class: ``gain[y] (x - mean) / std + shift[y]``.

    Mean and standard deviation are those of the whole batch, of all classes. Running statistics, eps and momentum are
    those of :class:`torch.nn.BatchNorm1d`. The gains start at 1 and the shifts at 0.

    Args:
        num_features: entries of one sample.
        classes: labels are 0 to classes - 1.

    Shape: ``x [B, num_features]``, ``labels [B]`` int64 -> ``[B, num_features]``.

    Raises:
        ValueError: ``classes`` below 1, or ``x`` of another number of dimensions.

    Source: Dumoulin et al. 2017, "A Learned Representation for Artistic Style" (arXiv:1610.07629); in a generator by
    Miyato and Koyama 2018 (arXiv:1802.05637).
    """


class ConditionalBatchNorm2d(_ConditionalBatchNorm, nn.BatchNorm2d):
    """:class:`ConditionalBatchNorm1d` for images: statistics over samples and pixels.

    Shape: ``x [B, num_features, h, w]``, ``labels [B]`` int64 -> as x.
    """
