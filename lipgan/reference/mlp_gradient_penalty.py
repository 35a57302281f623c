"""The gradient penalty of a multilayer perceptron and its gradients, without a double backward.

::

    a_0 = x    z_l = a_{l-1} W_l^T + b_l    a_l = scale_l * leaky_relu(z_l, slope_l)    critic(x) = z_L

Where the critic is differentiable, its gradient ``g = dcritic/dx`` is a product of the weights with the factors
``m_l = scale_l * leaky_relu'(z_l)``, which are constant nearby. With ``v = dP/dg`` of the penalty P of
:mod:`lipgan.reference.gradient_penalty`, the change of P is ``sum <v_i, dg_i>``. So a backward to the input gives
``delta_l`` and g, a forward of the tangent v through the same factors gives ``t_l``, and
``dP/dW_l = delta_l^T t_{l-1}``. The biases occur in the factors alone: their gradients are zero.

A loss of the scores comes along by its derivatives ``w_i = dloss/dcritic(x)_i``: since its own backward would arrive at
``w delta_l``, the gradients of both are ``delta_l^T (t_{l-1} + w a_{l-1})``, and ``sum_i w_i delta_l,i`` by the biases.
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
    score_grads: Tensor | None = None,
    known: Sequence[Tensor] = (),
    first: int = 0,
    last: int | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The penalty, the norms, and the gradients of the penalty, or of the penalty and a loss.

    Args:
        x: ``[B, d_0]``, float32 or float64.
        weights: L of them, ``[d_l, d_{l-1}]``; ``d_L = 1``.
        biases: L of them, ``[d_l]`` or None. That of the last layer changes nothing.
        slopes: of the L - 1 activations: 0 for ReLU, 1 for none; the derivative at 0 is the slope.
        scales: L - 1 of them, ``[B, d_l]`` or None: what dropout multiplies with.
        kind: "two-sided", "one-sided", "squared" or "max".
        weight: factor of the penalty.
        target: what the norms are compared with.
        score_grads: ``[B]``, the derivatives of the loss; None without a loss.
        known: the L - 1 activations ``[B, d_l]``, where there is no scale; none where they are to be computed.
        first, last: the samples with a penalty, ``first <= i < last``.

    Returns:
        ``penalty`` 0-dim; ``norms`` ``[last - first]``; the gradients by the weights, shaped as those; with a loss
        those by the biases, of each layer, else none.
    """
    factors: list[Tensor] = []
    a, activations = x, [x]
    for w, b, slope, scale in zip(weights, biases, slopes, scales, strict=False):
        # An activation has the sign of its z, which is all that the factor needs, and becomes itself again.
        z = known[len(factors)] if known else F.linear(a, w, b)
        # A NaN is neither above zero nor below it, and stays NaN.
        factor = torch.where(z > 0, 1.0, torch.where(z <= 0, slope, z))
        factors.append(factor if scale is None else factor * scale)
        a = z if known else z * factors[-1]
        activations.append(a)
    delta = torch.ones_like(x[:, :1])
    deltas = []
    for layer in range(len(weights) - 1, -1, -1):
        deltas.append(delta)
        delta = delta @ weights[layer]
        if layer > 0:
            delta = delta * factors[layer - 1]
    penalty, norms, steep = gradient_penalty_fwd(delta[first:last], kind, weight, target, "sample")
    tangent = torch.zeros_like(delta)
    tangent[first:last] = steep
    grads, bias_grads = [], []
    for layer, delta in enumerate(reversed(deltas)):
        along = tangent
        if score_grads is not None:
            along = torch.addcmul(tangent, score_grads[:, None], activations[layer])
            bias_grads.append(score_grads @ delta)
        grads.append(delta.T @ along)
        if layer < len(factors):
            tangent = F.linear(tangent, weights[layer]) * factors[layer]
    return penalty, norms, grads, bias_grads
