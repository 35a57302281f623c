"""The launches of a call, and what lies where: all hidden layers side by side in the columns of a few matrices."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import config
from ..activations import CURVES
from ..common import materialized
from ..gradient_penalty import KINDS, gradient_penalty_fwd
from .passes import (
    _mlp_gradient_penalty_activate_kernel,
    _mlp_gradient_penalty_adjoint_kernel,
    _mlp_gradient_penalty_backward_kernel,
    _mlp_gradient_penalty_seed_kernel,
    _mlp_gradient_penalty_sums_kernel,
    _mlp_gradient_penalty_tangent_kernel,
)


def _check_lengths(count: int, *others: int) -> None:
    if count == 0:
        raise ValueError("a group must have at least one layer")
    if any(other != count for other in others):
        raise ValueError("the lists of a group differ in length")


def _expect(tensor: Tensor | None, like: Tensor, numel: int, name: str) -> Tensor | None:
    """A tensor as the kernels read it, if it fits."""
    if tensor is None:
        return None
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of x, {like.device}, got {tensor.device}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} has a dtype that does not fit the others")
    if tensor.numel() != numel:
        raise ValueError(f"{name} must hold {numel} elements, got {tensor.numel()}")
    return materialized(tensor.contiguous())


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    lengths: Sequence[int],
    kind: str,
    first: int,
    last: int,
    curves: Sequence[str],
    constants: Sequence[float],
) -> None:
    count = len(weights)
    _check_lengths(count, *lengths)
    if len(constants) != 3 * len(curves):
        raise ValueError(f"constants must hold 3 numbers for each curve, got {len(constants)}")
    if curves:
        _check_lengths(count, len(curves) + 1)
    for curve in curves:
        if curve and curve not in CURVES:
            raise ValueError(f"a curve must be one of {', '.join(CURVES)}, or empty, got {curve!r}")
    if x.dim() < 1 or x.numel() == 0:
        raise ValueError("x must hold at least one sample")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError("x must be float32 or float64")
    if x.dim() != 2:
        raise ValueError("x must have 2 dimensions")
    if not 0 <= first < last <= x.shape[0]:
        raise ValueError("first and last must be of samples")
    before = x.shape[1]
    for weight in weights:
        if weight.dim() != 2:
            raise ValueError("a weight must have 2 dimensions")
        if weight.shape[0] == 0:
            raise ValueError("a weight must not be empty")
        if weight.dtype != x.dtype:
            raise ValueError("weight has a dtype that does not fit the others")
        if weight.device != x.device:
            raise ValueError(f"weight must be on the device of x, {x.device}, got {weight.device}")
        if weight.shape[1] != before:
            raise ValueError(f"weight must hold {weight.shape[0] * before} elements, got {weight.numel()}")
        before = weight.shape[0]
    if before != 1:
        raise ValueError("the last weight must have one row")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


# Elements that the columns of a layer begin at a multiple of: lines of the cache.
_ALIGNED = 32


def _padded(width: int) -> int:
    return config.ceil_div(width, _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class _Layout:
    """Where the layers lie in the columns of the matrices: the hidden ones, then, of the paths, the samples."""

    places: tuple[int, ...]  # of layer 0, the samples, and of each hidden layer
    row: int  # elements of a row of the signals, the factors and the adjoints
    path_row: int  # of the paths
    widest: int


@functools.lru_cache(maxsize=1024)
def _layout(widths: tuple[int, ...]) -> _Layout:
    places, end = [0], 0
    for width in widths[1:]:
        places.append(end)
        end += _padded(width)
    places[0] = end
    return _Layout(tuple(places), end, end + _padded(widths[0]), max(widths))


class _Call:
    """One call, whose arguments are good.

    Args:
        As for `mlp_gradient_penalty_fwd`; tensors but for weights contiguous, ``known`` with None where there are none.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        curves: Sequence[str],
        score_grads: Tensor | None,
        first: int,
        last: int,
    ) -> None:
        self.x, self.weights, self.score_grads = x, weights, score_grads
        self.curves = ("", *curves) if curves else ("",) * len(weights)  # of layer 0 and the hidden ones
        self.first, self.last, self.batch = first, last, x.shape[0]
        self.widths = (x.shape[1], *(weight.shape[0] for weight in weights[:-1]))
        self.hidden = len(weights) - 1
        self.smooth = max((layer for layer, curve in enumerate(self.curves) if curve), default=0)  # the last such layer
        self.stacked, self.loss = self.smooth > 0, score_grads is not None
        self.layout = _layout(self.widths)
        # p above delta and a above t; where no activation is smooth, delta alone, and a or t + w a above t.
        self.below = self.batch if self.stacked else 0
        self.paths = x.new_empty(2 * self.batch, self.layout.path_row)
        self.signals = x.new_empty(self.below + self.batch, self.layout.row)
        self.factors = x.new_empty(self.batch, self.layout.row)

    def part(self, matrix: Tensor, layer: int, first: int, last: int) -> Tensor:
        """Rows of a layer in a matrix."""
        row = matrix.shape[1]
        shape = last - first, self.widths[layer]
        return matrix.as_strided(shape, (row, 1), first * row + self.layout.places[layer])

    def activation(self, layer: int) -> Tensor:
        return self.part(self.paths, layer, 0, self.batch)

    def delta(self, layer: int) -> Tensor:
        return self.part(self.signals, layer, self.below, self.below + self.batch)

    def adjoint(self, layer: int) -> Tensor:
        return self.part(self.signals, layer, 0, self.batch)

    def factor(self, layer: int) -> Tensor:
        return self.part(self.factors, layer, 0, self.batch)

    def tangent(self, layer: int, first: int = 0, last: int | None = None) -> Tensor:
        return self.part(self.paths, layer, self.batch + first, self.batch + (self.batch if last is None else last))

    def _tiles(self, layer: int) -> tuple[tuple[int], dict[str, int]]:
        """The grid of a launch over all samples and the numbers of a layer, and its options."""
        w = self.widths[layer]
        tile = config.pointwise_tile(self.batch, w, self.x.element_size())
        programs = config.ceil_div(self.batch, tile.block_h) * config.ceil_div(w, tile.block_w)
        return (programs,), {**tile.blocks, **config.launch_options(tile.num_warps)}

    def forward(
        self,
        biases: Sequence[Tensor | None],
        slopes: Sequence[float],
        scales: Sequence[Tensor | None],
        known: Sequence[Tensor | None],
        constants: Sequence[float],
    ) -> None:
        """a_l, m_l and scale phi'' of the hidden layers, and delta of the last of them."""
        before, row, path_row = self.x, self.layout.row, self.layout.path_row
        final = self.weights[-1]
        for layer in range(1, self.hidden + 1):
            given, bias, scale, curve = known[layer - 1], biases[layer - 1], scales[layer - 1], self.curves[layer]
            activation, factor, width = self.activation(layer), self.factor(layer), self.widths[layer]
            if given is None:
                torch.mm(before, self.weights[layer - 1].t(), out=activation)
            is_last = layer == self.hidden
            grid, options = self._tiles(layer)
            _mlp_gradient_penalty_activate_kernel[grid](
                activation if given is None else given,
                bias if given is None else None,
                scale,
                materialized(final.contiguous()) if is_last else None,
                activation, factor,
                self.adjoint(layer) if curve else None,
                self.delta(layer) if is_last else None,
                self.batch, width, path_row if given is None else width, path_row, row, slopes[layer - 1],
                *(constants[3 * layer - 3 : 3 * layer] if curve else (0.0, 0.0, 0.0)),
                CURVE=curve, KNOWN=given is not None, BIASED=given is None and bias is not None,
                SCALED=scale is not None, KEEPS=not is_last or self.loss, LAST=is_last, **options,
            )  # fmt: skip
            before = activation

    def backward(self) -> Tensor:
        """delta_l of the others, and the gradient of the scores at the samples with a penalty, contiguous."""
        count = self.last - self.first
        if self.hidden == 0:
            return self.weights[0].expand(count, -1).contiguous()
        for layer in range(self.hidden - 1, 0, -1):
            delta, smooth = self.delta(layer), self.curves[layer] != ""
            torch.mm(self.delta(layer + 1), self.weights[layer], out=delta)
            grid, options = self._tiles(layer)
            _mlp_gradient_penalty_backward_kernel[grid](
                delta, self.factor(layer), self.adjoint(layer) if smooth else None,
                self.batch, self.widths[layer], self.layout.row, SMOOTH=smooth, **options,
            )  # fmt: skip
        return torch.mm(self.part(self.signals, 1, self.below + self.first, self.below + self.last), self.weights[0])

    def tangent_pass(self, v: Tensor) -> None:
        """t_l, t_l + w a_l, and what the phi'' of each layer make of p_l."""
        first, last, path_row = self.first, self.last, self.layout.path_row
        if self.hidden and (self.loss or self.stacked):
            grid, options = self._tiles(0)
            _mlp_gradient_penalty_seed_kernel[grid](
                self.x, v, self.score_grads, self.activation(0), self.tangent(0) if self.stacked else None,
                self.batch, self.widths[0], path_row, first, last,
                LOSS=self.loss, STACKED=self.stacked, **options,
            )  # fmt: skip
        before = v
        for layer in range(1, self.hidden + 1):
            after, smooth = self.tangent(layer, first, last), self.curves[layer] != ""
            torch.mm(before, self.weights[layer - 1].t(), out=after)
            before = after
            mixed = self.loss and not self.stacked
            top = self.loss and self.stacked and layer == self.hidden
            grid, options = self._tiles(layer)
            _mlp_gradient_penalty_tangent_kernel[grid](
                self.tangent(layer), self.activation(layer) if mixed else None, self.factor(layer),
                self.adjoint(layer) if smooth or top else None, self.delta(layer) if top else None, self.score_grads,
                self.batch, self.widths[layer], path_row, self.layout.row, first, last,
                SMOOTH=smooth, LOSS=self.loss, STACKED=self.stacked, TOP=top, **options,
            )  # fmt: skip

    @property
    def top(self) -> int:
        """The last layer that has a p: with a loss each hidden one."""
        return self.hidden if self.loss else self.smooth

    def adjoint_pass(self) -> None:
        """p_l of the layers before the top."""
        if not self.stacked:
            return
        scratch = self.x.new_empty(self.batch * self.layout.widest)
        for layer in range(self.top - 1, 0, -1):
            width, smooth = self.widths[layer], self.curves[layer] != ""
            above = scratch.as_strided((self.batch, width), (width, 1))
            torch.mm(self.adjoint(layer + 1), self.weights[layer], out=above)
            grid, options = self._tiles(layer)
            _mlp_gradient_penalty_adjoint_kernel[grid](
                self.adjoint(layer), above, self.factor(layer), self.batch, width, self.layout.row,
                SMOOTH=smooth, **options,
            )  # fmt: skip

    def grads(self, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients by weights and by biases; of these none without a loss and a smooth activation."""
        found = [self._weight_grad(layer, v) for layer in range(1, self.hidden + 1)]
        last_grad = self.weights[-1].new_empty(1, self.widths[-1])
        row, path_row = self.layout.row, self.layout.path_row
        by_bias, apart = self.loss or self.stacked, self.loss and (self.stacked or self.hidden == 0)
        steep, activations, activation_row = self.batch, None, path_row
        if self.hidden == 0:
            tangents, path_row, steep = v, v.shape[1], v.shape[0]
            if apart:
                activations, activation_row = self.x, v.shape[1]
        else:
            tangents = self.activation(self.hidden) if self.loss and not self.stacked else self.tangent(self.hidden)
            if apart:
                activations = self.activation(self.hidden)
        kept = row if not self.stacked or self.top == self.hidden else self.layout.places[self.top + 1]
        sums = self.x.new_empty(row + 1) if by_bias else None
        tile = config.column_sums_tile(self.x.element_size())
        programs = config.ceil_div(self.widths[-1], tile.block_w)
        programs += config.ceil_div(row, tile.block_w) if by_bias else 0
        _mlp_gradient_penalty_sums_kernel[(programs,)](
            self.signals if by_bias else None, self.score_grads, tangents, activations, sums, last_grad,
            self.batch, row, row, kept, self.widths[-1], steep, path_row, activation_row,
            BIASES=by_bias, LOSS=self.loss, STACKED=self.stacked, APART=apart,
            **tile.blocks, **config.launch_options(tile.num_warps),
        )  # fmt: skip
        bias_grads: list[Tensor] = []
        if sums is not None:
            places = [*zip(self.layout.places[1:], self.widths[1:], strict=True), (row, 1)]
            bias_grads = [sums.as_strided((width,), (1,), place) for place, width in places]
        return [*found, last_grad], bias_grads

    def _weight_grad(self, layer: int, v: Tensor) -> Tensor:
        """Of a hidden layer."""
        if not self.loss and not self.stacked:
            return torch.mm(self.delta(layer).t(), v if layer == 1 else self.tangent(layer - 1))
        # Samples without a penalty have no tangent: where they come last, they are left out.
        begin = 0 if not self.stacked or layer <= self.top else self.below
        end = self.below + self.last if self.stacked else self.batch
        return torch.mm(self.part(self.signals, layer, begin, end).t(), self.part(self.paths, layer - 1, begin, end))


def mlp_gradient_penalty_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[float],
    scales: Sequence[Tensor | None],
    kind: str,
    weight: float,
    target: float,
    score_grads: Tensor | None,
    known: Sequence[Tensor],
    first: int,
    last: int,
    curves: Sequence[str],
    constants: Sequence[float],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The penalty, the norms, and the gradients of the penalty, or of the penalty and a loss.

    Args:
        As for :func:`lipgan.reference.mlp_gradient_penalty.mlp_gradient_penalty_fwd`.

    Returns:
        (penalty, norms, grads, bias_grads), as there: 0-dim; [last - first]; shaped as the weights; [d_l] each, parts
        of one vector that begin at multiples of 128 bytes.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, an unknown kind or curve.
    """
    _check(x, weights, (len(biases), len(slopes) + 1, len(scales) + 1), kind, first, last, curves, constants)
    if known and len(known) + 1 != len(weights):
        raise ValueError("the lists of a group differ in length")
    batch, hidden = x.shape[0], range(len(weights) - 1)
    widths = [w.shape[0] for w in weights]
    read = materialized(x.contiguous())
    biases = [_expect(bias, x, width, "bias") for bias, width in zip(biases, widths, strict=True)]
    scales = [_expect(scales[k], x, batch * widths[k], "scale") for k in hidden]
    given = [_expect(known[k], x, batch * widths[k], "activation") if known else None for k in hidden]
    for k in hidden:
        if given[k] is not None and (scales[k] is not None or (slopes[k] < 0 and not (curves and curves[k]))):
            raise ValueError("an activation that is known must have no scale, and a slope that is not negative")
    score_grads = _expect(score_grads, x, batch, "score_grads")
    if score_grads is None and last - first < batch:
        # Then no other sample counts.
        read = read[first:last]
        scales, given = (
            [None if t is None else t.reshape(batch, -1)[first:last] for t in tensors] for tensors in (scales, given)
        )
        first, last = 0, last - first
    with torch.no_grad(), torch.cuda.device_of(x):
        call = _Call(read, weights, curves, score_grads, first, last)
        call.forward(biases, slopes, scales, given, constants)
        penalty, norms, v = gradient_penalty_fwd(call.backward(), kind, weight, target, (last - first, x.shape[1], 1))
        call.tangent_pass(v)
        call.adjoint_pass()
        grads, bias_grads = call.grads(v)
    return penalty, norms.squeeze(1), grads, bias_grads
