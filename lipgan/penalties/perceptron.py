"""Multilayer perceptrons: the whole penalty as one call of the op ``mlp_gradient_penalty``.

Small matrices leave PyTorch's operations waiting for Python. A critic that runs a chain of linear layers,
piecewise-linear activations and dropout, and nothing else, is recognized from a recording of its operations, however
its modules are nested; from then on it is read instead of being run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.ops import mlp_gradient_penalty as op
from lipgan.penalties.critic_call import CriticCall
from lipgan.penalties.plan import Recorder, Slot, Unrepeatable
from lipgan.penalties.plans import Case, Outcome, case

aten = torch.ops.aten


@dataclass
class _Layer:
    """A linear layer with the activation and the dropout that follow it.

    Attributes:
        weight, bias: their places among the inputs of the recording.
        slope: of the activation, None for none.
        dropouts: the share that each leaves.
    """

    weight: int
    bias: int | None
    slope: float | None = None
    dropouts: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Chain:
    """The layers of a critic, and the shape of its scores."""

    layers: list[_Layer]
    shape: torch.Size


class Perceptron:
    """A critic that is a perceptron, as it is now.

    Args:
        layers: of it.
        shape: of its scores.
        inputs: of the recording, as they are now.
    """

    def __init__(self, layers: list[_Layer], shape: torch.Size, inputs: list[Tensor]) -> None:
        self._layers, self._shape, self._inputs = layers, shape, inputs

    @property
    def is_random(self) -> bool:
        """Whether it draws numbers."""
        return any(layer.dropouts for layer in self._layers)

    def solve(self, kind: str, weight: float, target: float) -> Outcome:
        """The penalty at the samples that it was recognized for.

        Dropout draws the numbers that the critic's own forward pass would draw.

        Args:
            kind, weight, target: of the penalty of the samples' norms, as for the op ``gradient_penalty``.
        """
        arguments = self._arguments()
        penalty, _, grads = op.penalize(*arguments, kind, weight, target)
        return None, penalty, *self._by_parameter(grads, [None] * len(grads))

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """The scores of the samples, as the critic returns them, and the activations of the layers before the last.

        For critics that draw no numbers.
        """
        a, weights, biases, slopes, _ = self._arguments()
        activations = []
        for w, b, slope in zip(weights, biases, slopes, strict=False):
            a = F.linear(a, w, b)
            if slope != 1.0:
                a = F.relu_(a) if slope == 0.0 else F.leaky_relu_(a, slope)
            activations.append(a)
        return F.linear(a, weights[-1], biases[-1]).view(self._shape), activations

    def solve_with_loss(
        self, kind: str, weight: float, target: float, activations: list[Tensor], score_grads: Tensor, penalized: range
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """The penalty at some of the samples, the parameters, and the gradients of the penalty and of a loss.

        Args:
            kind, weight, target: as for `solve`.
            activations: by `forward`.
            score_grads: the derivative of the loss by each score.
            penalized: the samples with a penalty.
        """
        by_score = score_grads.reshape(-1).to(self._inputs[0].dtype)
        penalty, _, grads, bias_grads = op.penalize_with_loss(
            *self._arguments(), kind, weight, target, by_score, penalized, activations=activations
        )
        return penalty, *self._by_parameter(grads, bias_grads)

    def _arguments(self) -> tuple[Tensor, list[Tensor], list[Tensor | None], list[float], list[Tensor | None]]:
        """Samples, weights, biases, slopes and multipliers, as the op takes them."""
        inputs, layers = self._inputs, self._layers
        x = inputs[0]
        weights = [inputs[layer.weight] for layer in layers]
        biases = [None if layer.bias is None else inputs[layer.bias] for layer in layers]
        scales = [_scale(layer, x.shape[0], w) for layer, w in zip(layers[:-1], weights, strict=False)]
        slopes = [1.0 if layer.slope is None else layer.slope for layer in layers[:-1]]
        return x.flatten(1), weights, biases, slopes, scales

    def _by_parameter(
        self, grads: Sequence[Tensor], bias_grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The parameters that are trained, with their gradients."""
        parameters: list[Tensor] = []
        kept: list[Tensor | None] = []
        for layer, grad, bias_grad in zip(self._layers, grads, bias_grads, strict=True):
            for place, own in ((layer.weight, grad), (layer.bias, bias_grad)):
                if place is not None and self._inputs[place].requires_grad:
                    parameters.append(self._inputs[place])
                    kept.append(own)
        return parameters, kept


def recognize(call: CriticCall, x: Tensor) -> Perceptron | None:
    """A critic as a perceptron, or None for any other critic or where the op does not pay.

    Args:
        x: ``[B, ...]``, the points at which the penalty is taken.
    """
    if not _may_be_called(call, x):
        return None
    asked = case(call, x, "perceptron")
    if asked is None:
        return None
    found = asked.find()
    if found is None:
        if not (asked.is_due(at_once=True) and _may_be(call.critic)):
            return None
        chain = _recorded(asked, call, x)
        found = None if chain is None else asked.find()
        if found is None:
            return None
    chain, inputs = found
    layers: list[_Layer] = chain.layers
    widths = [inputs[layers[0].weight].shape[1], *(inputs[layer.weight].shape[0] for layer in layers)]
    return Perceptron(layers, chain.shape, inputs) if op.serves(x.shape[0], widths, x.dtype, "cpu") else None


def may_be_perceptron(call: CriticCall, x: Tensor) -> bool:
    """Whether it is worth while to look: `recognize`."""
    return _may_be_called(call, x) and isinstance(call.critic, nn.Module) and _may_be(call.critic)


def _may_be_called(call: CriticCall, x: Tensor) -> bool:
    return x.device.type == "cpu" and not call.args and call.output is None and call.parts is None


def _may_be(critic: Any) -> bool:
    """Whether a critic has only what a perceptron has."""
    if next(critic.buffers(), None) is not None:
        return False
    return all(parameter.ndim <= 2 for parameter in critic.parameters())


def _recorded(asked: Case, call: CriticCall, x: Tensor) -> _Chain | None:
    """The layers of a critic, from a forward pass whose random draws are undone; they are remembered."""
    leaf = x.detach().requires_grad_()
    recorder = asked.begin(leaf, at_once=True, rehearsal=True)
    if recorder is None:
        return None
    state = torch.default_generator.get_state()
    try:
        with torch.enable_grad(), recorder:
            scores = call.critic(leaf)
    except Unrepeatable:
        return None
    finally:
        torch.default_generator.set_state(state)
    if not isinstance(scores, Tensor):
        return None
    layers = _layers(recorder, leaf, scores)
    if layers is None:
        return None
    chain = _Chain(layers, scores.shape)
    asked.keep(recorder, chain)
    return chain


_RESHAPES = {
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
}
_PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor}
_SLOPES: dict[Any, float | None] = {
    aten.relu.default: 0.0,
    aten.relu_.default: 0.0,
    aten.leaky_relu.default: None,  # an argument
    aten.leaky_relu_.default: None,
}


def _layers(recorder: Recorder, x: Tensor, scores: Tensor) -> list[_Layer] | None:
    """The operations from the samples to the scores as layers, of which the last is linear with one output; or None."""
    current: Slot | None = recorder.slot(x)
    steps = recorder.needed_for(scores)
    layers: list[_Layer] = []
    width = x[0].numel()
    transposed: dict[Slot, Slot] = {}
    noise: dict[Slot, float | None] = {}
    if steps is None or current is None:
        return None
    for step in steps:
        func, args = step.func, step.args
        if step.kwargs and func is not aten.empty_like.default:
            return None
        if step.is_transpose:
            weight = recorder.input_of(args[0])
            if weight is None or weight.dtype != x.dtype:
                return None
            transposed[step.results] = args[0]
        elif func in _RESHAPES:
            # The numbers of a sample stay in their order, and the widths tell whether they stay together.
            if args[0] != current:
                return None
            current = step.results
        elif func is aten.addmm.default or func is aten.mm.default:
            bias, a, w = args if func is aten.addmm.default else (None, *args)
            if a != current or w not in transposed or len(args) > 3:
                return None
            weight = recorder.input_of(transposed[w])
            assert weight is not None
            if weight.shape[1] != width or not (bias is None or _is_bias(recorder.input_of(bias), weight)):
                return None
            width = weight.shape[0]
            layers.append(_Layer(int(transposed[w]), None if bias is None else int(bias)))
            current = step.results
        elif func in _SLOPES and args[0] == current and layers:
            known = _SLOPES[func]
            slope = known if known is not None else args[1] if len(args) > 1 else 0.01
            if layers[-1].slope is not None or layers[-1].dropouts or not slope >= 0:
                return None
            layers[-1].slope = slope
            current = current if step.results is None else step.results
        elif func is aten.empty_like.default and args[0] == current:
            noise[step.results] = None
        elif func is aten.bernoulli_.float and args[0] in noise:
            noise[args[0]] = args[1] if len(args) > 1 else 0.5
        elif func is aten.div_.Scalar and args[0] in noise and noise[args[0]] == args[1]:
            pass
        elif func in _PRODUCTS and args[0] == current and layers and isinstance(args[1], Slot):
            left = noise.get(args[1])
            if left is None:
                return None
            layers[-1].dropouts.append(left)
            current = current if step.results is None else step.results
        else:
            return None
    if not layers or recorder.slot(scores) != current:
        return None
    last = layers[-1]
    if scores.numel() != x.shape[0] or width != 1 or last.slope is not None or last.dropouts:
        return None
    return layers


def _is_bias(bias: Tensor | None, weight: Tensor) -> bool:
    return bias is not None and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype


def _scale(layer: _Layer, batch: int, weight: Tensor) -> Tensor | None:
    """The multipliers of the layer's dropout, as ``torch.nn.functional.dropout`` draws them on a CPU."""
    scale: Tensor | None = None
    for p in layer.dropouts:
        noise = _bernoulli((batch, weight.shape[0]), p, weight.dtype).div_(p)
        scale = noise if scale is None else scale * noise
    return scale


def _bernoulli(
    shape: tuple[int, ...], p: float, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """``torch.empty(shape, dtype=dtype).bernoulli_(p)``, in less than half of its time where that is possible."""
    if _is_bernoulli_of_uniforms():
        return _bernoulli_of_uniforms(shape, p, dtype, generator)
    return torch.empty(shape, dtype=dtype).bernoulli_(p, generator=generator)


def _bernoulli_of_uniforms(
    shape: tuple[int, ...], p: float, dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    return (torch.empty(shape, dtype=torch.float64).uniform_(generator=generator) < p).to(dtype)


@functools.cache
def _is_bernoulli_of_uniforms() -> bool:
    """Whether ``bernoulli_`` compares one float64 uniform with p for each number here.

    It does so number by number, where a uniform tensor and a comparison are vectorized. On Intel's processors PyTorch
    asks MKL for other random numbers, and a later version may ask somebody else.
    """
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    theirs = torch.empty(1000).bernoulli_(0.3, generator=one)
    ours = _bernoulli_of_uniforms((1000,), 0.3, torch.float32, other)
    return torch.equal(theirs, ours) and torch.equal(one.get_state(), other.get_state())
