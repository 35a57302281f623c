"""Self-attention over the pixels of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipgan._checks import check_count

__all__ = ["SelfAttention2d"]


class SelfAttention2d(nn.Module):
    """Adds to each pixel a weighted mean over all pixels: ``y = x + gamma o``.

    With 1x1 convolutions f, g, h to C' channels and v back to C, for pixels i and j::

        beta_ji = softmax_i(<f(x_i), g(x_j)>),    o_j = v(sum_i beta_ji h(x_i))

    gamma starts at 0, and the layer as the identity. The products and the softmax are written out: the fused attention
    of PyTorch has no second derivative, which gradient penalties and unrolled steps take. Memory is ``B (h w)^2``.

    Args:
        channels: C.
        reduction: C' is ``C / reduction``, at least 1.

    Shape: ``[B, C, h, w]`` -> as x.

    Raises:
        ValueError: an argument below 1.

    Source: Zhang et al. 2018, "Self-Attention Generative Adversarial Networks" (arXiv:1805.08318), equations 1 to 3.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("reduction", reduction)):
            check_count(name, value)
        inner = max(channels // reduction, 1)
        self.f, self.g, self.h = (nn.Conv2d(channels, inner, 1, bias=False) for _ in range(3))
        self.v = nn.Conv2d(inner, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> as x."""
        f, g, h = (layer(x).flatten(2) for layer in (self.f, self.g, self.h))  # [B, C', h w]
        beta = torch.softmax(torch.bmm(g.mT, f), 2)  # [B, j, i]
        o = torch.bmm(h, beta.mT).view(*h.shape[:2], *x.shape[2:])
        attended: Tensor = self.v(o)
        return x + self.gamma * attended
