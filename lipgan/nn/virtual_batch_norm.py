"""Batch normalization by the statistics of a fixed reference batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipgan._checks import check_count

__all__ = ["VirtualBatchNorm"]


class VirtualBatchNorm(nn.Module):
    """Batch norm by the statistics of a reference batch and of the one sample that is normalized.

    The first ``reference`` samples of the input are the reference batch, which a network carries along in front of the
    samples it is asked for (`lipgan.models.Generator` does). With R reference samples of mean m and variance v, a
    sample of mean m_i and variance v_i (over its pixels; 0 for vectors) is normalized by those of the R + 1 together::

        mean = (R m + m_i) / (R + 1)
        var  = (R v + v_i) / (R + 1) + R / (R + 1)^2 (m - m_i)^2

    and the reference samples by m and v. What becomes of a sample does not depend on the others of its batch, in
    training as in evaluation; there are no running statistics.

    Args:
        num_features: channels, or entries of a vector.
        reference: samples in the reference batch.
        eps: added to the variance.

    Shape: ``x [R + B, num_features, ...]`` -> as x.

    Raises:
        ValueError: ``num_features`` or ``reference`` below 1, or an input with fewer samples than the reference batch
            or another number of channels.

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs" (arXiv:1606.03498), section 3.4.
    """

    def __init__(self, num_features: int, reference: int, eps: float = 1e-5) -> None:
        super().__init__()
        for name, value in (("num_features", num_features), ("reference", reference)):
            check_count(name, value)
        self.num_features, self.reference, self.eps = num_features, reference, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """``[R + B, num_features, ...]`` -> as x."""
        r = self.reference
        if x.ndim < 2 or x.shape[1] != self.num_features or x.shape[0] < r:
            raise ValueError(
                f"x must hold {r} reference samples and then others, of {self.num_features} channels each, "
                f"got shape {tuple(x.shape)}"
            )
        pixels = list(range(2, x.ndim))
        # In the sums of squared differences nothing cancels, unlike in mean squares minus squared means.
        reference_var, reference_mean = torch.var_mean(x[:r], [0, *pixels], correction=0, keepdim=True)
        if pixels:
            own_var, own_mean = torch.var_mean(x[r:], pixels, correction=0, keepdim=True)
        else:
            own_var, own_mean = torch.zeros_like(x[r:]), x[r:]
        mean = (r * reference_mean + own_mean) / (r + 1)
        spread = r / (r + 1) ** 2 * (reference_mean - own_mean).square()
        var = (r * reference_var + own_var) / (r + 1) + spread
        mean = torch.cat([reference_mean.expand(r, *mean.shape[1:]), mean])
        var = torch.cat([reference_var.expand(r, *var.shape[1:]), var])
        affine = (-1, *[1] * len(pixels))
        return (x - mean) * ((var + self.eps).rsqrt() * self.weight.view(affine)) + self.bias.view(affine)

    def extra_repr(self) -> str:
        return f"{self.num_features}, reference={self.reference}, eps={self.eps}"
