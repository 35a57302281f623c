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

The factors of a smooth activation ``a_l = scale_l * phi(z_l)`` are ``m_l = scale_l * phi'(z_l)``, and they change with
z. With ``e_l = delta_{l+1} W_{l+1}`` and ``s_l = t_{l-1} W_l^T``, the derivatives ``p_l`` by ``z_l`` of the tangent's
score and of the loss come backward from ``p_L = w`` (0 without a loss)::

    p_l = scale_l * phi''(z_l) * s_l * e_l + m_l * (p_{l+1} W_{l+1})

and the gradients of both are ``delta_l^T t_{l-1} + p_l^T a_{l-1}``, and ``sum_i p_l,i`` by the biases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lipgan.reference.gradient_penalty import gradient_penalty_fwd

# What `curves` may name, besides "" for a leaky ReLU.
CURVES = ("tanh", "sigmoid", "softplus", "silu", "gelu", "gelu-tanh", "elu")


def activate(curve: str, z: Tensor, constants: Sequence[float] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """A smooth activation: ``phi(z)``, ``phi'(z)`` and ``phi''(z)``.

    Derivatives are written without differences of nearly equal numbers, so that they keep their relative precision
    where the activation saturates.

    Args:
        curve: one of `CURVES`.
        z: where.
        constants: beta and threshold of "softplus"; alpha, scale and input_scale of "elu", as ``torch.ops.aten.elu``
            has them.
    """
    if curve == "tanh":
        a, slope = torch.tanh(z), torch.cosh(z).square().reciprocal()
        return a, slope, -2 * a * slope
    if curve == "softplus":
        beta, threshold = constants[:2]
        x = beta * z
        above = x > threshold
        value = (x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))) / beta
        slope = torch.sigmoid(x)
        bend = beta * slope * torch.sigmoid(-x)
        return torch.where(above, z, value), torch.where(above, 1.0, slope), torch.where(above, 0.0, bend)
    if curve == "elu":
        alpha, scale, input_scale = constants
        x, above = (input_scale * z).clamp_max(0), z > 0
        decayed = alpha * scale * input_scale * torch.exp(x)
        value = torch.where(above, scale * z, alpha * scale * torch.expm1(x))
        return value, torch.where(above, scale, decayed), torch.where(above, 0.0, input_scale * decayed)
    if curve == "gelu":
        near = z.clamp(-50, 50)  # where the density is 0, and its factors must not overflow
        below, density = torch.special.erfc(-near * math.sqrt(0.5)) / 2, torch.exp(-near * near / 2)
        density = density / math.sqrt(2 * math.pi)
        return z * below, below + near * density, density * (2 - near * near)
    # z s(x), or s itself, of the logistic function s; with tanh(x / 2) = 2 s(x) - 1.
    near = z.clamp(-30, 30) if curve == "gelu-tanh" else z  # likewise, where s' is 0
    factor, cubic = math.sqrt(8 / math.pi), 0.044715
    x = factor * near * (1 + cubic * near.square()) if curve == "gelu-tanh" else z
    s, steep, centred = torch.sigmoid(x), torch.sigmoid(x) * torch.sigmoid(-x), torch.tanh(x / 2)
    if curve == "sigmoid":
        return s, steep, -centred * steep
    if curve == "silu":
        return z * s, s + z * steep, steep * (2 - z * centred)
    if curve == "gelu-tanh":
        first, second = factor * (1 + 3 * cubic * near.square()), 6 * factor * cubic * near
        bend = steep * (2 * first + near * (second - centred * first.square()))
        return z * s, s + near * steep * first, bend
    raise ValueError(f"a curve must be one of {', '.join(CURVES)}, or empty, got {curve!r}")


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
    curves: Sequence[str] = (),
    constants: Sequence[float] = (),
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
        known: L - 1 of them, ``[B, d_l]``, where there is no scale: ``z_l`` of a smooth activation, ``a_l`` of others;
            none where they are to be computed.
        first, last: the samples with a penalty, ``first <= i < last``.
        curves: names of the L - 1 activations, as `activate` takes them; "" for those that have a slope. None at all:
            no activation is smooth.
        constants: three for each of the curves, of which each takes what it needs.

    Returns:
        ``penalty`` 0-dim; ``norms`` ``[last - first]``; the gradients by the weights, shaped as those; with a loss, or
        a smooth activation, those by the biases, of each layer, else none.
    """
    factors: list[Tensor] = []
    bends: list[Tensor | None] = []  # scale phi''(z), then that times e
    a, activations = x, [x]
    for w, b, slope, scale in zip(weights, biases, slopes, scales, strict=False):
        k = len(factors)
        # An activation has the sign of its z, which is all that the factor needs, and becomes itself again.
        z = known[k] if known else F.linear(a, w, b)
        bend = None
        if curves and curves[k]:
            a, factor, bend = activate(curves[k], z, constants[3 * k : 3 * k + 3])
            if scale is not None:
                a, factor, bend = scale * a, scale * factor, scale * bend
        else:
            # A NaN is neither above zero nor below it, and stays NaN.
            factor = torch.where(z > 0, 1.0, torch.where(z <= 0, slope, z))
            factor = factor if scale is None else factor * scale
            a = z if known else z * factor
        factors.append(factor)
        bends.append(bend)
        activations.append(a)
    delta = torch.ones_like(x[:, :1])
    deltas: list[Tensor] = []
    for layer in range(len(weights) - 1, -1, -1):
        deltas.insert(0, delta)
        delta = delta @ weights[layer]
        if layer > 0:
            bend = bends[layer - 1]
            bends[layer - 1] = None if bend is None else bend * delta
            delta = delta * factors[layer - 1]
    penalty, norms, steep = gradient_penalty_fwd(delta[first:last], kind, weight, target, "sample")
    tangent = torch.zeros_like(delta)
    tangent[first:last] = steep
    tangents = [tangent]
    for layer, factor in enumerate(factors):
        tangent, bend = F.linear(tangent, weights[layer]), bends[layer]
        if bend is not None:
            bends[layer] = torch.zeros_like(bend)
            bends[layer][first:last] = (bend * tangent)[first:last]  # type: ignore[index]
        tangents.append(tangent * factor)
        tangent = tangents[-1]
    if any(curves):
        grads, bias_grads = _with_adjoints(weights, factors, bends, deltas, tangents, activations, score_grads)
        return penalty, norms, grads, bias_grads
    grads, bias_grads = [], []
    for layer, delta in enumerate(deltas):
        along = tangents[layer]
        if score_grads is not None:
            along = torch.addcmul(along, score_grads[:, None], activations[layer])
            bias_grads.append(score_grads @ delta)
        grads.append(delta.T @ along)
    return penalty, norms, grads, bias_grads


def _with_adjoints(
    weights: Sequence[Tensor],
    factors: list[Tensor],
    bends: list[Tensor | None],
    deltas: list[Tensor],
    tangents: list[Tensor],
    activations: list[Tensor],
    score_grads: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients by the weights and by the biases where an activation is smooth.

    Args:
        bends: ``scale * phi''(z) * s * e`` of each layer.
        Others: m, delta, t and a of each layer.
    """
    adjoint = torch.zeros_like(deltas[-1]) if score_grads is None else score_grads[:, None]
    grads: list[Tensor] = []
    bias_grads: list[Tensor] = []
    for layer in range(len(weights) - 1, -1, -1):
        grads.insert(0, deltas[layer].T @ tangents[layer] + adjoint.T @ activations[layer])
        bias_grads.insert(0, adjoint.sum(0))
        if layer > 0:
            adjoint, bend = (adjoint @ weights[layer]) * factors[layer - 1], bends[layer - 1]
            adjoint = adjoint if bend is None else adjoint + bend
    return grads, bias_grads
