"""Layers that show a critic how much the samples of a batch differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipgan._checks import check_count

__all__ = ["MinibatchDiscrimination", "MinibatchStdDev"]


class MinibatchDiscrimination(nn.Module):
    """Appends to the features of each sample how close the other samples of the batch are.

    With ``M_i = T f_i``, ``kernels`` rows of ``kernel_dim`` numbers each, kernel k appends::

        o_ik = sum_j exp(-|M_ik - M_jk|_1)

    over all samples j, i among them. The sum over the batch couples the samples: a critic has to see real and fake
    samples apart (``mixes_samples`` says so).

    Args:
        in_features: d, entries of a sample's features.
        kernels: numbers that are appended.
        kernel_dim: length of the rows that are compared.

    Shape: ``[B, d]`` -> ``[B, d + kernels]``.

    Raises:
        ValueError: an argument below 1, or an input of another shape.

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs" (arXiv:1606.03498), section 3.2; their code
    takes 100 kernels of length 5.
    """

    mixes_samples = True

    def __init__(self, in_features: int, kernels: int = 32, kernel_dim: int = 5) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("kernels", kernels), ("kernel_dim", kernel_dim)):
            check_count(name, value)
        self.kernels, self.kernel_dim = kernels, kernel_dim
        self.out_features = in_features + kernels
        self.rows = nn.Linear(in_features, kernels * kernel_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, d]`` -> ``[B, d + kernels]``."""
        if x.ndim != 2:
            raise ValueError(f"x must be [B, {self.rows.in_features}], got shape {tuple(x.shape)}")
        rows = self.rows(x).unflatten(1, (self.kernels, self.kernel_dim))
        distances = (rows.unsqueeze(0) - rows.unsqueeze(1)).abs().sum(3)  # [B, B, kernels]
        return torch.cat([x, torch.exp(-distances).sum(1)], 1)


class MinibatchStdDev(nn.Module):
    """Appends how much the samples of a group differ, one number for the group.

    The standard deviation of each entry over a group of samples (biased), averaged over all entries. Groups are of
    consecutive samples, so a batch of real samples followed by fake ones stays apart where the group's size divides
    both halves. A batch that it does not divide is one group.

    Args:
        group_size: samples of a group.
        eps: added to the variance, so that the derivative is finite where all samples are equal.

    Shape: ``[B, d]`` -> ``[B, d + 1]``; ``[B, c, h, w]`` -> ``[B, c + 1, h, w]``, a constant plane.

    Raises:
        ValueError: ``group_size`` below 1, or ``x`` of fewer than two dimensions.

    Source: Karras et al. 2018, "Progressive Growing of GANs" (arXiv:1710.10196), section 3.
    """

    mixes_samples = True

    def __init__(self, group_size: int = 4, eps: float = 1e-8) -> None:
        super().__init__()
        check_count("group_size", group_size)
        self.group_size, self.eps = group_size, eps

    def forward(self, x: Tensor) -> Tensor:
        """``[B, c, ...]`` -> ``[B, c + 1, ...]``."""
        if x.ndim < 2:
            raise ValueError(f"x must be [B, c, ...], got shape {tuple(x.shape)}")
        batch = x.shape[0]
        group = self.group_size if batch % self.group_size == 0 else batch
        groups = x.reshape(batch // group, group, x.shape[1:].numel())
        centred = groups - groups.mean(1, keepdim=True)
        deviation = ((centred * centred).mean(1) + self.eps).sqrt().mean(1)  # [groups]
        plane = deviation.repeat_interleave(group).view(batch, *[1] * (x.ndim - 1)).expand(batch, 1, *x.shape[2:])
        return torch.cat([x, plane], 1)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, eps={self.eps}"
