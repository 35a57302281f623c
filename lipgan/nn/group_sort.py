"""Sorting within groups of features: an activation that keeps the norm of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipgan._checks import check_count

__all__ = ["GroupSort", "MaxMin"]


class GroupSort(nn.Module):
    """Sort the features within groups of ``group_size`` consecutive ones, the largest first.

    It permutes the features, so it keeps norms, of gradients too, and is 1-Lipschitz in every p-norm. Groups of 2 are
    taken by maximum and minimum, which is faster than sorting.

    Args:
        group_size: features in a group, at least 1.
        dim: the dimension of the features.

    Shape:
        ``[B, C, ...]`` to the same, in the dtype of the input; C a multiple of ``group_size``.

    Raises:
        TypeError: ``group_size`` is not an int.
        ValueError: ``group_size < 1``; in the forward, a number of features that is no multiple of it.

    Source: Anil, Lucas, Grosse 2019, "Sorting out Lipschitz function approximation", Section 4.
    """

    def __init__(self, group_size: int = 2, *, dim: int = 1) -> None:
        super().__init__()
        check_count("group_size", group_size)
        self.group_size = group_size
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, ...]`` to the same."""
        dim = self.dim % x.ndim
        features = x.shape[dim]
        if features % self.group_size:
            raise ValueError(
                f"the number of features must be a multiple of group_size = {self.group_size}, got {features} in "
                f"dimension {dim} of shape {tuple(x.shape)}"
            )
        groups = torch.unflatten(x, dim, (features // self.group_size, self.group_size))
        if self.group_size == 2:
            a, b = groups.unbind(dim + 1)
            groups = torch.stack([torch.maximum(a, b), torch.minimum(a, b)], dim + 1)
        else:
            groups = groups.sort(dim + 1, descending=True).values
        return groups.flatten(dim, dim + 1)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}" + (f", dim={self.dim}" if self.dim != 1 else "")


class MaxMin(GroupSort):
    """:class:`GroupSort` by twos."""

    def __init__(self, *, dim: int = 1) -> None:
        super().__init__(2, dim=dim)
