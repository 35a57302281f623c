"""The gradient penalty of a multilayer perceptron and its gradients, without a double backward.

::

    a_0 = x    z_l = a_{l-1} W_l^T + b_l    a_l = scale_l * leaky_relu(z_l, slope_l)    critic(x) = z_L

Where the critic is differentiable, its gradient ``g = dcritic/dx`` is a product of the weights with the factors
``m_l = scale_l * leaky_relu'(z_l)``, which are constant nearby. With ``v = dP/dg`` of the penalty P of
:mod:`lipgan.reference.gradient_penalty`, the change of P is ``sum <v_i, dg_i>``. So a backward to the input gives
``delta_l`` and g, a forward of the tangent v through the same factors gives ``t_l``, and
``dP/dW_l = delta_l^T t_{l-1}``. The biases occur in the factors alone: their gradients are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lipgan.reference.gradient_penalty import gradient_penalty_fwd


def mlp_gradient_penalty_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[float],
    scales: Sequence[Tensor | None],
    kind: str,
    weight: float,
    target: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The penalty, the norms, and the gradients of the penalty.

    Args:
        x: ``[B, d_0]``, float32 or float64.
        weights: L of them, ``[d_l, d_{l-1}]``; ``d_L = 1``.
        biases: L of them, ``[d_l]`` or None. That of the last layer changes nothing.
        slopes: of the L - 1 activations: 0 for ReLU, 1 for none; the derivative at 0 is the slope.
        scales: L - 1 of them, ``[B, d_l]`` or None: what dropout multiplies with.
        kind: "two-sided", "one-sided", "squared" or "max".
        weight: factor of the penalty.
        target: what the norms are compared with.

    Returns:
        ``penalty`` 0-dim; ``norms`` ``[B]``; the gradients by the weights, shaped as those.
    """
    factors, a = [], x
    for w, b, slope, scale in zip(weights, biases, slopes, scales, strict=False):
        z = F.linear(a, w, b)
        # A NaN is neither above zero nor below it, and stays NaN.
        factor = torch.where(z > 0, 1.0, torch.where(z <= 0, slope, z))
        factors.append(factor if scale is None else factor * scale)
        a = z * factors[-1]
    delta = torch.ones_like(x[:, :1])
    deltas = []
    for layer in range(len(weights) - 1, -1, -1):
        deltas.append(delta)
        delta = delta @ weights[layer]
        if layer > 0:
            delta = delta * factors[layer - 1]
    penalty, norms, tangent = gradient_penalty_fwd(delta, kind, weight, target, "sample")
    grads = []
    for layer, delta in enumerate(reversed(deltas)):
        grads.append(delta.T @ tangent)
        if layer < len(factors):
            tangent = F.linear(tangent, weights[layer]) * factors[layer]
    return penalty, norms, grads
