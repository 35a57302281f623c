"""The op ``mlp_gradient_penalty`` at the boundary of PyTorch's dispatcher.

``lipgan::mlp_gradient_penalty_fwd`` takes a multilayer perceptron, whose activations are leaky ReLUs or smooth ones, to
the gradient penalty and to its gradients by the parameters, in one call of first order. It is functional.

On a GPU the matrix products are PyTorch's, and Triton has all that lies between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.ops import _backend
from lipgan.reference import mlp_gradient_penalty as reference

DTYPES = (torch.float32, torch.float64)

# (penalty, norms, grads, bias_grads)
Outcome = tuple[Tensor, Tensor, list[Tensor], list[Tensor]]

_library = torch.library.Library("lipgan", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "mlp_gradient_penalty_fwd(Tensor x, Tensor[] weights, Tensor?[] biases, float[] slopes, Tensor?[] scales, "
    "str kind, float weight, float target, Tensor? score_grads, Tensor[] activations, int first, int last, "
    "str[] curves, float[] constants, str? backend) -> (Tensor, Tensor, Tensor[], Tensor[])"
)


# ---- reference: PyTorch, everywhere; both forms take the arguments of the schema but for the backend ----


def _reference_fwd(*arguments: Any) -> Outcome:
    with torch.no_grad():  # called without the dispatcher, whose autograd is left out
        return reference.mlp_gradient_penalty_fwd(*arguments)


# ---- native: C++ on CPU tensors ----


def _native_fwd(*arguments: Any) -> Outcome:
    result: Outcome = _backend.serving_native().mlp_gradient_penalty_fwd(*arguments, torch.get_num_threads())
    return result


# ---- triton: GPU tensors, or CPU tensors in Triton's interpreter ----


def _triton_fwd(*arguments: Any) -> Outcome:
    from lipgan.kernels import mlp_gradient_penalty as kernels

    result: Outcome = kernels.mlp_gradient_penalty_fwd(*arguments)
    return result


_FORWARD: dict[str, Callable[..., Outcome]] = {
    "reference": _reference_fwd,
    "native": _native_fwd,
    "triton": _triton_fwd,
}


def _fwd(x: Tensor, *others: Any) -> Outcome:
    *arguments, backend = others
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    return _FORWARD[_backend.resolve("mlp_gradient_penalty", backend, x.device.type)](x, *arguments)


for _key in ("CPU", "CUDA"):
    _library.impl("mlp_gradient_penalty_fwd", _fwd, _key)  # type: ignore[no-untyped-call]


@torch.library.register_fake("lipgan::mlp_gradient_penalty_fwd", lib=_library)  # type: ignore[untyped-decorator]
def _fwd_fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    slopes: list[float],
    scales: list[Tensor | None],
    kind: str,
    weight: float,
    target: float,
    score_grads: Tensor | None,
    activations: Sequence[Tensor],
    first: int,
    last: int,
    curves: list[str],
    constants: list[float],
    backend: str | None,
) -> Outcome:
    bias_grads = [] if score_grads is None and not any(curves) else [w.new_empty(w.shape[0]) for w in weights]
    return x.new_empty(()), x.new_empty(last - first), [w.new_empty(w.shape) for w in weights], bias_grads


def serves(batch: int, widths: Sequence[int], dtype: torch.dtype, device: str) -> bool:
    """Whether the op takes a critic of ``widths`` (d_0, ..., d_L) and a batch of ``dtype``: one output, nothing empty,
    float32 or float64; and a backend that has it was chosen, if one was.

    There is no upper limit. The C++ kernel was faster than the same algorithm by :func:`torch.mm` at every size
    measured, 2-16-1 with 16 samples to 4096-4096-4096-1 with 256, with one thread and with two.
    """
    fits = batch >= 1 and min(widths) >= 1 and widths[-1] == 1 and dtype in DTYPES
    return fits and _backend.serves("mlp_gradient_penalty", device)


def penalize(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[float],
    scales: Sequence[Tensor | None],
    kind: str,
    weight: float,
    target: float,
    *,
    curves: Sequence[str] = (),
    constants: Sequence[float] = (),
    backend: str | None = None,
) -> Outcome:
    """The gradient penalty of a multilayer perceptron and its gradients, without autograd, for callers whose arguments
    are known to be good; :mod:`lipgan.reference.mlp_gradient_penalty` defines it.

    Layer l of the critic is ``a_l = scale_l * phi_l(a_{l-1} W_l^T + b_l)``, the last one without activation and scale;
    its widths are ``d_0, d_1, ..., d_L = 1``. phi is a leaky ReLU or one of the smooth activations of
    :data:`lipgan.reference.mlp_gradient_penalty.CURVES`.

    Args:
        x: ``[B, d_0]``, float32 or float64.
        weights: L of them, ``[d_l, d_{l-1}]``, in the dtype of ``x``.
        biases: L of them, ``[d_l]`` or None.
        slopes: L - 1 of them, of the leaky ReLUs: 0 for ReLU, 1 for no activation.
        scales: L - 1 of them, ``[B, d_l]`` or None: the multipliers of dropout, 0 or ``1 / (1 - p)``.
        kind: "two-sided", "one-sided", "squared" or "max".
        weight: factor of the penalty.
        target: what the norms are compared with.
        curves: names of L - 1 activations, "" for leaky ReLUs; none at all where all are leaky ReLUs.
        constants: three for each of the curves: ``beta, threshold, 0`` of "softplus", ``alpha, scale, input_scale`` of
            "elu", for others any.
        backend: "reference", "native" or "triton"; None for the best available.

    Returns:
        ``(penalty, norms, grads, bias_grads)``: 0-dim; ``[B]``; ``dpenalty / dW_l``, shaped as the weights and
        contiguous; ``dpenalty / db_l``, ``[d_l]``, for each layer whether it has a bias or not, but none at all where
        all activations are leaky ReLUs: those gradients are zero. The gradient of a norm at 0 is taken as 0. A NaN in
        ``x`` makes the penalty NaN, unless the critic is linear.

    Raises:
        TypeError: ``x`` is neither float32 nor float64.
        ValueError: a curve that there is not; sizes or dtypes that do not fit (native and triton backends).
        UnavailableError: the backend asked for cannot serve here.
    """
    loss_and_samples = None, (), 0, x.shape[0]
    return _call(
        x, weights, biases, slopes, scales, kind, weight, target, *loss_and_samples, curves, constants, backend
    )


def penalize_with_loss(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[float],
    scales: Sequence[Tensor | None],
    kind: str,
    weight: float,
    target: float,
    score_grads: Tensor,
    penalized: range,
    *,
    activations: Sequence[Tensor] = (),
    curves: Sequence[str] = (),
    constants: Sequence[float] = (),
    backend: str | None = None,
) -> Outcome:
    """As :func:`penalize`, and the gradients of a loss of the scores in the same products.

    Args:
        score_grads: ``[B]``, the derivative of the loss by the score of each sample, in the dtype of ``x``.
        penalized: the samples at which the penalty is taken; at least one, in steps of 1.
        activations: L - 1 of them, ``[B, d_l]``, of the layers but the last where a forward pass has computed them:
            ``z_l`` of a smooth one, ``a_l`` of others; for critics without scales and with slopes >= 0.
        Others as for :func:`penalize`.

    Returns:
        ``(penalty, norms, grads, bias_grads)``: the first two of the penalty alone; the gradients of penalty and loss,
        by the biases ``[d_l]``, for each layer whether it has one or not.

    Raises:
        As :func:`penalize`.
    """
    loss_and_samples = score_grads, activations, penalized.start, penalized.stop
    return _call(
        x, weights, biases, slopes, scales, kind, weight, target, *loss_and_samples, curves, constants, backend
    )


def _call(*arguments: Any) -> Outcome:
    """The op with the arguments of its schema."""
    x, weights, biases, _, scales, *_, score_grads, activations, _, _, _, _, _ = arguments
    if _backend.is_plain([t for t in (x, score_grads, *activations, *weights, *biases, *scales) if t is not None]):
        return _fwd(*arguments)
    with torch.no_grad():
        result: Outcome = torch.ops.lipgan.mlp_gradient_penalty_fwd.default(*arguments)
    return result
