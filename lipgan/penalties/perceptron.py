"""Multilayer perceptrons: the whole penalty as one call of the op ``mlp_gradient_penalty``.

Small matrices leave PyTorch's operations waiting for Python. A critic that runs a chain of linear layers, common
activations and dropout, and nothing else, is recognized from a recording of its operations, however
its modules are nested, and also as a function of them; from then on it is read instead of being run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.ops import mlp_gradient_penalty as op
from lipgan.penalties.critic_call import CriticCall
from lipgan.penalties.plan import Recorder
from lipgan.penalties.plans import Case, Outcome, case
from lipgan.penalties.reach import owner
from lipgan.penalties.steps import Slot
from lipgan.penalties.undo import Undo

aten = torch.ops.aten


@dataclass(frozen=True)
class _Activation:
    """An activation as the op takes it.

    Attributes:
        curve: its name, "" for a leaky ReLU.
        slope: of a leaky ReLU.
        constants: three.
    """

    curve: str
    slope: float = 0.0
    constants: tuple[float, ...] = (0.0, 0.0, 0.0)


_NO_ACTIVATION = _Activation("", 1.0)


@dataclass(frozen=True)
class _Dropout:
    """A dropout.

    Attributes:
        left: the share that it leaves.
        fused: the share that it takes where it is the one operation ``native_dropout``, whose order of random numbers
            is its own; else None.
    """

    left: float
    fused: float | None = None


@dataclass
class _Layer:
    """A linear layer with the activation and the dropout that follow it.

    Attributes:
        weight, bias: their places among the inputs of the recording.
        activation: None for none.
        dropouts: in their order.
    """

    weight: int
    bias: int | None
    activation: _Activation | None = None
    dropouts: list[_Dropout] = field(default_factory=list)


@dataclass(frozen=True)
class _Chain:
    """The layers of a critic, and the shape of its scores; with what the op takes of the layers but the last."""

    layers: list[_Layer]
    shape: torch.Size

    @functools.cached_property
    def is_random(self) -> bool:
        return any(layer.dropouts for layer in self.layers)

    @functools.cached_property
    def activations(self) -> list[_Activation]:
        return [layer.activation or _NO_ACTIVATION for layer in self.layers[:-1]]

    @functools.cached_property
    def curves(self) -> list[str]:
        return [activation.curve for activation in self.activations]

    @functools.cached_property
    def constants(self) -> list[float]:
        return [number for activation in self.activations for number in activation.constants]

    @functools.cached_property
    def slopes(self) -> list[float]:
        return [activation.slope for activation in self.activations]


# Samples, weights, biases, slopes and multipliers.
_Operands = tuple[Tensor, list[Tensor], list[Tensor | None], list[float], list[Tensor | None]]


class Perceptron:
    """A critic that is a perceptron, as it is now.

    Args:
        chain: what was recorded of it.
        inputs: of the recording, as they are now.
    """

    def __init__(self, chain: _Chain, inputs: list[Tensor]) -> None:
        self._chain, self._layers, self._inputs = chain, chain.layers, inputs
        #: Whether it draws numbers.
        self.is_random = chain.is_random
        self._operands: _Operands | None = None

    def solve(self, kind: str, weight: float, target: float) -> Outcome:
        """The penalty at the samples that it was recognized for.

        Dropout draws the numbers that the critic's own forward pass would draw.

        Args:
            kind, weight, target: of the penalty of the samples' norms, as for the op ``gradient_penalty``.
        """
        penalty, _, grads, bias_grads = op.penalize(
            *self._arguments(), kind, weight, target, curves=self._chain.curves, constants=self._chain.constants
        )
        return None, penalty, *self._by_parameter(grads, bias_grads or [None] * len(grads))

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """The scores of the samples, as the critic returns them, and what `solve_with_loss` takes of the layers before
        the last.

        For critics that draw no numbers.
        """
        a, weights, biases, _, _ = self._arguments()
        known = []
        for w, b, activation in zip(weights, biases, self._chain.activations, strict=False):
            z = F.linear(a, w, b)
            if activation.curve:
                a = _FUNCTIONS[activation.curve](z, *activation.constants)
            elif activation.slope != 1.0:
                a = z = F.relu_(z) if activation.slope == 0.0 else F.leaky_relu_(z, activation.slope)
            else:
                a = z
            known.append(z)
        return F.linear(a, weights[-1], biases[-1]).view(self._chain.shape), known

    def solve_with_loss(
        self, kind: str, weight: float, target: float, known: list[Tensor], score_grads: Tensor, penalized: range
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """The penalty at some of the samples, the parameters, and the gradients of the penalty and of a loss.

        Args:
            kind, weight, target: as for `solve`.
            known: by `forward`.
            score_grads: the derivative of the loss by each score.
            penalized: the samples with a penalty.
        """
        by_score = score_grads.reshape(-1).to(self._inputs[0].dtype)
        penalty, _, grads, bias_grads = op.penalize_with_loss(
            *(*self._arguments(), kind, weight, target, by_score, penalized),
            activations=known,
            curves=self._chain.curves,
            constants=self._chain.constants,
        )
        return penalty, *self._by_parameter(grads, bias_grads)

    def _arguments(self) -> _Operands:
        """What the op takes; drawn anew where numbers are drawn."""
        operands = self._operands
        if operands is None or self.is_random:
            inputs, layers = self._inputs, self._layers
            x = inputs[0]
            weights = [inputs[layer.weight] for layer in layers]
            biases = [None if layer.bias is None else inputs[layer.bias] for layer in layers]
            scales: list[Tensor | None] = [None] * (len(layers) - 1)
            if self.is_random:
                scales = [_scale(layer, x, w) for layer, w in zip(layers[:-1], weights, strict=False)]
            operands = self._operands = x.flatten(1), weights, biases, self._chain.slopes, scales
        return operands

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


def recognize(call: CriticCall, x: Tensor, *, harmless: bool = False) -> Perceptron | None:
    """A critic as a perceptron, or None for any other critic or where the op does not pay.

    Args:
        x: ``[B, ...]``, the points at which the penalty is taken.
        harmless: whether the critic is known to leave nothing behind at such points, and was not found before: a plan
            of it has been kept.
    """
    asked = asked_for(call, x)
    if asked is None:
        return None
    found = asked.find()
    if found is None:
        if not ((harmless or asked.is_due(at_once=True)) and _may_be(call.critic)):
            return None
        chain = _recorded(asked, call, x, harmless)
        found = None if chain is None else asked.find()
        if found is None:
            return None
    return known(*found)


def asked_for(call: CriticCall, x: Tensor) -> Case | None:
    """The layers of a critic as something that may have been kept; None where they cannot be."""
    return case(call, x, "perceptron") if _may_be_called(call, x) else None


def known(chain: _Chain, inputs: list[Tensor]) -> Perceptron | None:
    """A perceptron of what was kept, and of the samples and the critic's tensors; None as for `recognize`."""
    x, *held = inputs
    return Perceptron(chain, inputs) if serves(chain, held, x, x.shape[0]) else None


def serves(chain: _Chain, held: list[Tensor], samples: Tensor, rows: int) -> bool:
    """Whether the op pays for ``rows`` such samples.

    Args:
        held: the critic's tensors.
    """
    places = [layer.weight - 1 for layer in chain.layers]  # among the inputs, where samples come first
    widths = [held[places[0]].shape[1], *(held[place].shape[0] for place in places)]
    return op.serves(rows, widths, samples.dtype, samples.device.type)


def may_be_perceptron(call: CriticCall, x: Tensor) -> bool:
    """Whether it is worth while to look: `recognize`."""
    return _may_be_called(call, x) and _may_be(call.critic)


def _may_be_called(call: CriticCall, x: Tensor) -> bool:
    plain = not call.args and call.output is None and call.parts is None
    return x.device.type in ("cpu", "cuda") and plain


def _may_be(critic: Any) -> bool:
    """Whether a critic, or of the modules that a function uses the first, has only what a perceptron has."""
    first = owner(critic)
    if first is None:
        return False
    # By the dictionaries of the modules: `parameters` of them takes as long as the penalty of a small perceptron.
    modules: list[nn.Module | None] = [first]
    seen = set()
    while modules:
        module = modules.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        for buffer in module._buffers.values():
            if buffer is not None:
                return False
        for parameter in module._parameters.values():
            if parameter is not None and parameter.ndim > 2:
                return False
        modules += module._modules.values()
    return True


def _recorded(asked: Case, call: CriticCall, x: Tensor, harmless: bool) -> _Chain | None:
    """The layers of a critic, from a forward pass whose random draws are undone; they are remembered."""
    leaf = x.detach().requires_grad_()
    recorder = asked.begin(leaf, always=harmless, at_once=True, rehearsal=True, harmless=harmless)
    if recorder is None:
        return None
    undo = Undo(leaf)
    undo.keep_random_state()
    try:
        with torch.enable_grad(), recorder, recorder.watch:
            scores = call.critic(leaf)
        recorder.note_critic()
    except (
        Exception
    ):  # `plan.Unrepeatable`, or the critic's own: it may take no other batch than the one it is called for
        return None
    finally:
        undo.restore()
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


def _leaky_relu(slope: float = 0.01) -> _Activation | None:
    return _Activation("", slope) if slope >= 0 else None


def _softplus(beta: float = 1, threshold: float = 20) -> _Activation | None:
    return _Activation("softplus", constants=(beta, threshold, 0.0)) if 0 < beta < math.inf else None


def _elu(alpha: float = 1, scale: float = 1, input_scale: float = 1) -> _Activation | None:
    return _Activation("elu", constants=(alpha, scale, input_scale)) if 0 < input_scale < math.inf else None


def _celu(alpha: float = 1) -> _Activation | None:
    return _elu(alpha, 1, 1 / alpha) if alpha > 0 else None


def _gelu(*, approximate: str = "none") -> _Activation | None:
    return {"none": _Activation("gelu"), "tanh": _Activation("gelu-tanh")}.get(approximate)


# What makes of the arguments behind the first an activation; None where the op has none for them.
_ACTIVATIONS: dict[Any, Callable[..., _Activation | None]] = {
    **dict.fromkeys((aten.relu.default, aten.relu_.default), lambda: _Activation("")),
    **dict.fromkeys((aten.leaky_relu.default, aten.leaky_relu_.default), _leaky_relu),
    **dict.fromkeys((aten.tanh.default, aten.tanh_.default), lambda: _Activation("tanh")),
    **dict.fromkeys((aten.sigmoid.default, aten.sigmoid_.default), lambda: _Activation("sigmoid")),
    **dict.fromkeys((aten.silu.default, aten.silu_.default), lambda: _Activation("silu")),
    **dict.fromkeys((aten.gelu.default, aten.gelu_.default), _gelu),
    **dict.fromkeys((aten.elu.default, aten.elu_.default), _elu),
    **dict.fromkeys((aten.celu.default, aten.celu_.default), _celu),
    aten.softplus.default: _softplus,
}
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "tanh": lambda z, *_: torch.tanh(z),
    "sigmoid": lambda z, *_: torch.sigmoid(z),
    "softplus": lambda z, beta, threshold, _: F.softplus(z, beta, threshold),
    "silu": lambda z, *_: F.silu(z),
    "gelu": lambda z, *_: F.gelu(z),
    "gelu-tanh": lambda z, *_: F.gelu(z, approximate="tanh"),
    "elu": aten.elu.default,
}
_KEYWORDS = {aten.empty_like.default, aten.gelu.default, aten.gelu_.default}


def _layers(recorder: Recorder, x: Tensor, scores: Tensor) -> list[_Layer] | None:
    """The operations from the samples to the scores as layers, of which the last is linear with one output; or None."""
    current: Slot | None = recorder.slot(x)
    steps = recorder.needed_for(scores)
    layers: list[_Layer] = []
    width = x[0].numel()
    transposed: dict[Slot, Slot] = {}
    noise: dict[Slot, float | None] = {}  # the share that is left of random zeros and ones, None before they are drawn
    scaled: dict[Slot, float] = {}  # that of those that were divided by it
    if steps is None or current is None:
        return None
    for step in steps:
        func, args = step.func, step.args
        if step.kwargs and func not in _KEYWORDS:
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
        elif func in _ACTIVATIONS and args[0] == current and layers:
            activation = _ACTIVATIONS[func](*args[1:], **step.kwargs)
            if layers[-1].activation is not None or layers[-1].dropouts or activation is None:
                return None
            layers[-1].activation = activation
            current = current if step.results is None else step.results
        elif func is aten.empty_like.default and args[0] == current:
            noise[step.results] = None
        elif func is aten.bernoulli_.float and noise.get(args[0], 0.0) is None:
            noise[args[0]] = args[1] if len(args) > 1 else 0.5
        elif func is aten.div_.Scalar and noise.get(args[0]) == args[1]:
            del noise[args[0]]
            scaled[args[0]] = args[1]
        elif func is aten.native_dropout.default and args[0] == current and layers and args[2]:
            # A GPU's dropout, as one operation.
            layers[-1].dropouts.append(_Dropout(1 - args[1], fused=args[1]))
            current = step.results[0]
        elif func in _PRODUCTS and args[0] == current and layers and isinstance(args[1], Slot):
            left = scaled.pop(args[1], None)
            if left is None or scaled or noise:  # each is used once, in the order in which they are drawn
                return None
            layers[-1].dropouts.append(_Dropout(left))
            current = current if step.results is None else step.results
        else:
            return None
    if not layers or recorder.slot(scores) != current or noise or scaled:
        return None
    last = layers[-1]
    if scores.numel() != x.shape[0] or width != 1 or last.activation is not None or last.dropouts:
        return None
    return layers


def _is_bias(bias: Tensor | None, weight: Tensor) -> bool:
    return bias is not None and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype


def _scale(layer: _Layer, x: Tensor, weight: Tensor) -> Tensor | None:
    """The multipliers of the layer's dropout, as ``torch.nn.functional.dropout`` draws them."""
    scale: Tensor | None = None
    shape = x.shape[0], weight.shape[0]
    for dropout in layer.dropouts:
        if dropout.fused is not None:
            noise = torch.native_dropout(weight.new_ones(shape), dropout.fused, True)[0]
        elif x.device.type == "cpu":
            noise = _bernoulli(shape, dropout.left, weight.dtype).div_(dropout.left)
        else:
            noise = weight.new_empty(shape).bernoulli_(dropout.left).div_(dropout.left)
        scale = noise if scale is None else scale * noise
    return scale


def _bernoulli(
    shape: tuple[int, ...], p: float, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """``torch.empty(shape, dtype=dtype).bernoulli_(p)``, in less than half of its time where that is possible."""
    if _is_bernoulli_of_uniforms():
        return _bernoulli_of_uniforms(shape, p, dtype, generator)
    return torch.empty(shape, dtype=dtype, device="cpu").bernoulli_(p, generator=generator)


def _bernoulli_of_uniforms(
    shape: tuple[int, ...], p: float, dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    return (torch.empty(shape, dtype=torch.float64, device="cpu").uniform_(generator=generator) < p).to(dtype)


@functools.cache
def _is_bernoulli_of_uniforms() -> bool:
    """Whether ``bernoulli_`` compares one float64 uniform with p for each number here.

    It does so number by number, where a uniform tensor and a comparison are vectorized. On Intel's processors PyTorch
    asks MKL for other random numbers, and a later version may ask somebody else.
    """
    one, other = (torch.Generator("cpu").manual_seed(0) for _ in range(2))
    theirs = torch.empty(1000, device="cpu").bernoulli_(0.3, generator=one)
    ours = _bernoulli_of_uniforms((1000,), 0.3, torch.float32, other)
    return torch.equal(theirs, ours) and torch.equal(one.get_state(), other.get_state())
