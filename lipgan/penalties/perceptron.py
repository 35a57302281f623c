"""Multilayer perceptrons: the whole penalty as one call of the op ``mlp_gradient_penalty``.

Small matrices leave PyTorch's operations waiting for Python. A critic that is an `nn.Sequential` of linear layers,
piecewise-linear activations and dropout, and nothing else, is read from its modules instead of being run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lipgan.ops import mlp_gradient_penalty as op

# (penalty, parameters, grads): grads[k] belongs to parameters[k], None stands for zeros.
Solution = tuple[Tensor, list[Tensor], list[Tensor | None]]


@dataclass
class _Layer:
    """A linear layer with the activation and the dropout that follow it."""

    weight: Tensor
    bias: Tensor | None
    slope: float | None = None
    dropouts: list[float] = field(default_factory=list)


def solve(critic: Any, x: Tensor, kind: str, weight: float, target: float) -> Solution | None:
    """The penalty of a critic that is a perceptron, or None for any other critic or where the op does not pay.

    Dropout draws the numbers that the critic's own forward pass would draw.

    Args:
        x: ``[B, ...]``, the points at which the penalty is taken.
        kind, weight, target: of the penalty of the samples' norms, as for the op ``gradient_penalty``.
    """
    layers = _served(critic, x)
    if layers is None:
        return None
    batch = x.shape[0]
    scales = [_scale(layer, batch) for layer in layers[:-1]]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    slopes = [1.0 if layer.slope is None else layer.slope for layer in layers[:-1]]
    penalty, _, grads = op.penalize(x.flatten(1), weights, biases, slopes, scales, kind, weight, target)
    parameters: list[Tensor] = []
    kept: list[Tensor | None] = []
    for w, bias, grad in zip(weights, biases, grads, strict=True):
        if w.requires_grad:
            parameters.append(w)
            kept.append(grad)
        if bias is not None and bias.requires_grad:
            parameters.append(bias)
            kept.append(None)
    return penalty, parameters, kept


def serves(critic: Any, x: Tensor) -> bool:
    """Whether `solve` takes the critic, and it draws no random numbers."""
    layers = _served(critic, x)
    return layers is not None and not any(layer.dropouts for layer in layers)


def _served(critic: Any, x: Tensor) -> list[_Layer] | None:
    """The critic as layers, where the op pays for them."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    layers = _layers(critic, x)
    if layers is None:
        return None
    widths = [layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers)]
    return layers if op.serves(x.shape[0], widths, x.dtype, x.device.type) else None


def _layers(critic: Any, x: Tensor) -> list[_Layer] | None:
    """The critic as layers of which the last is linear with one output, or None where it is not one of these."""
    if type(critic) is not nn.Sequential or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    layers: list[_Layer] = []
    flat = x.ndim == 2
    for module in _flattened((critic,)):
        if module is None:
            return None
        kind = type(module)
        if kind is nn.Identity:
            continue
        if kind is nn.Flatten:
            if module.start_dim != 1 or module.end_dim not in (-1, 1):
                return None
            if module.end_dim == 1 and not flat:
                return None
            flat = True
        elif kind is nn.Linear:
            weight, bias = module._parameters["weight"], module._parameters["bias"]
            if not flat or type(weight) is not nn.Parameter or weight.dtype != x.dtype or weight.device != x.device:
                return None
            if bias is not None and type(bias) is not nn.Parameter:
                return None
            if layers and layers[-1].weight.shape[0] != weight.shape[1]:
                return None
            layers.append(_Layer(weight, bias))
        elif not layers:
            return None
        elif kind is nn.ReLU or kind is nn.LeakyReLU:
            slope = 0.0 if kind is nn.ReLU else module.negative_slope
            if layers[-1].slope is not None or not slope >= 0:
                return None
            layers[-1].slope = slope
        elif kind is nn.Dropout:
            if module.training and module.p > 0:
                layers[-1].dropouts.append(module.p)
        else:
            return None
    if not layers or layers[0].weight.shape[1] != x[0].numel():
        return None
    last = layers[-1]
    return layers if last.weight.shape[0] == 1 and last.slope is None and not last.dropouts else None


def _flattened(modules: Iterable[Any]) -> Iterator[Any]:
    """The modules of nested Sequentials in order; None for one that does more than its class says."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            yield None
        elif type(module) is nn.Sequential:
            yield from _flattened(module._modules.values())
        else:
            yield module


def _scale(layer: _Layer, batch: int) -> Tensor | None:
    """The multipliers of the layer's dropout, as ``torch.nn.functional.dropout`` draws them on a CPU."""
    scale: Tensor | None = None
    for p in layer.dropouts:
        shape, dtype = (batch, layer.weight.shape[0]), layer.weight.dtype
        noise = torch.zeros(shape, dtype=dtype) if p == 1 else _bernoulli(shape, 1 - p, dtype).div_(1 - p)
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
