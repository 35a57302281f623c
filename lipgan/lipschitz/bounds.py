"""The two bounds: of the interpreter from above, of a search from below."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipgan.lipschitz.interpreter import Interpreter
from lipgan.lipschitz.modules import plain_copy, watch_module


@dataclass(frozen=True)
class Bounds:
    """Enclosure of a Lipschitz constant in the Euclidean norm: ``lower <= constant <= upper``.

    Attributes:
        upper: certified, for all inputs of the shape that was met.
        lower: the largest norm of a gradient that was found.
    """

    upper: float
    lower: float


def upper_bound(critic: nn.Module, x: Tensor, labels: Tensor | None, n_iterations: int) -> float:
    if labels is None:
        x = x[:1]
    else:
        # What is added or multiplied for a label counts for that label only: one sample of each.
        _, inverse = torch.unique(labels, return_inverse=True)
        first = [int((inverse == k).nonzero()[0]) for k in range(int(inverse.max()) + 1)]
        x, labels = x[first], labels[first]
    critic = copy.deepcopy(critic)
    x = x.clone()
    interpreter = Interpreter(x, n_iterations)
    for name, module in critic.named_modules():
        watch_module(interpreter, name, module)
    with torch.no_grad(), interpreter:
        scores = critic(x) if labels is None else critic(x, labels)
    if not isinstance(scores, Tensor) or scores.shape != x.shape[:1]:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"critic must return scores of shape ({x.shape[0]},), got {shape}")
    return interpreter.constant(scores)


def _slopes(critic: nn.Module, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients ``[B, ...]`` of the scores at the samples, and their norms ``[B]``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        scores = critic(x) if labels is None else critic(x, labels)
        if not scores.requires_grad:
            return torch.zeros_like(x), x.new_zeros(x.shape[0])
        (gradient,) = torch.autograd.grad(scores.sum(), x, materialize_grads=True)
    return gradient, torch.linalg.vector_norm(gradient.flatten(1), dim=1)


def lower_bound(critic: nn.Module, data: Tensor, labels: Tensor | None, batch_size: int, steps: int) -> float:
    # A stream of its own: the same answer every time, and no draw from the caller's.
    generator = torch.Generator(data.device).manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    spread = float((data - data.mean(0)).flatten(1).square().mean().sqrt()) or float(data.abs().max()) or 1.0
    best: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for start in range(0, data.shape[0], batch_size):
        x = data[start : start + batch_size]
        y = None if labels is None else labels[start : start + batch_size]
        # Points between two samples of the batch too: there a critic that separates them is steep.
        share = torch.rand(x.shape[0], generator=generator, dtype=x.dtype, device=x.device)
        share = share.reshape(-1, *[1] * (x.ndim - 1))
        order = torch.randperm(x.shape[0], generator=generator, device=x.device)
        for points in (x, share * x + (1 - share) * x[order]):
            # On a kink autograd's answer need not be a slope of the critic; beside it, it is.
            points = points + 1e-9 * spread * noise(points)
            _, norms = _slopes(critic, points, y)
            kept = norms.topk(min(len(norms), 32)).indices
            best.append((norms[kept], points[kept], None if y is None else y[kept]))
    norms = torch.cat([part[0] for part in best])
    kept = norms.topk(min(len(norms), 32)).indices
    norms, x = norms[kept], torch.cat([part[1] for part in best])[kept]
    y = None if labels is None else torch.cat([part[2] for part in best if part[2] is not None])[kept]
    # The slope of a piecewise linear critic has no derivative to follow: points move by chance, along the gradient
    # and beside it, and go back from where it is less steep.
    for step in range(steps):
        gradient, _ = _slopes(critic, x, y)
        direction = gradient / norms.clamp_min(1e-300).reshape(-1, *[1] * (x.ndim - 1))
        length = spread * 2.0 ** (2 - step % 8)
        side = noise(x) / math.sqrt(x[0].numel())
        turn = torch.randint(0, 3, (x.shape[0],), generator=generator, device=x.device) - 1
        turn = turn.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        candidates = x + length * (turn * direction + side)
        _, found = _slopes(critic, candidates, y)
        better = found >= norms  # across plateaus too
        x = torch.where(better.reshape(-1, *[1] * (x.ndim - 1)), candidates, x)
        norms = torch.where(better, found, norms)
    return float(norms.max())


def bounds(
    critic: nn.Module,
    data: Tensor,
    labels: Tensor | None = None,
    *,
    batch_size: int = 256,
    steps: int = 16,
    n_iterations: int = 10,
) -> Bounds:
    """Enclose the Lipschitz constant of a critic, in the Euclidean norm of one sample.

    The critic is taken as it acts in eval mode: batch normalization by its running statistics, spectral normalization
    with the vectors it has, orthogonal layers with their factors. It is not changed.

    ``upper`` holds for every two inputs of the shape of a sample (and, of a critic with labels, for the labels given)
    and the critic in exact arithmetic with its weights as stored. It is the product over layers, the sum where
    branches are added, of certified norms: every rounding in it goes up. Known are Linear and convolution layers,
    activations, GroupSort, batch normalization, pooling, nearest upsampling, shapes, joins and sums.

    ``lower`` is the largest norm of a gradient, in float64, at the samples, between pairs of them, and at points that a
    random search reaches from the steepest of these. It is deterministic.

    Args:
        critic: maps samples ``[B, ...]`` (and labels ``[B]``) to scores ``[B]``, each of its own sample only.
        data: ``[N, ...]``, N at least 1, floating point, on the device of the critic.
        labels: ``[N]``, int64, of a critic that takes them.
        batch_size: samples in one forward.
        steps: of the search.
        n_iterations: Gram products for the frequency blocks of a convolution; they exceed its norm by the factor
            ``rank^(2^-(n_iterations + 1))``, and are most of the cost.

    Raises:
        TypeError: ``critic`` is no module, ``data`` no floating-point tensor.
        ValueError: an operation without a known bound (the message names its module), weights that are not finite,
            scores of another shape, empty or not finite data, or a number out of its range.

    Example:
        >>> _, critic = lipgan.models.build("lipschitz", (1, 16, 16))
        >>> 1 <= bounds(critic, torch.rand(4, 1, 16, 16)).upper <= 1.00001
        True

    Source: Szegedy et al. 2013, "Intriguing properties of neural networks", Section 4.3, for the product; the norms
    are those of :func:`lipgan.linalg.spectral_norm_bound` and :func:`lipgan.linalg.conv_spectral_norm_bound`.
    """
    if not isinstance(critic, nn.Module):
        raise TypeError(f"critic must be a torch.nn.Module, got {type(critic).__name__}")
    if not isinstance(data, Tensor) or not data.is_floating_point():
        got = data.dtype if isinstance(data, Tensor) else type(data).__name__
        raise TypeError(f"data must be a floating-point tensor, got {got}")
    if data.ndim < 2 or data.numel() == 0:
        raise ValueError(f"data must be samples [N, ...] with N at least 1, got shape {tuple(data.shape)}")
    if not bool(data.isfinite().all()):
        raise ValueError("data must be finite, got entries that are NaN or infinite")
    if labels is not None and labels.shape != data.shape[:1]:
        raise ValueError(f"labels must have the shape ({data.shape[0]},), got {tuple(labels.shape)}")
    for name, value, least in (("batch_size", batch_size, 1), ("steps", steps, 0), ("n_iterations", n_iterations, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    plain = plain_copy(critic)
    data = data.detach().double()
    upper = upper_bound(plain, data, labels, n_iterations)
    lower = lower_bound(plain, data, labels, batch_size, steps)
    # The norm of a gradient is rounded, some 1e-15 of it, where the bound is exact.
    if lower > upper * (1 + 1e-9):
        raise RuntimeError(
            f"lower bound {lower:.17g} above upper bound {upper:.17g}: do samples change others' scores?"
        )
    return Bounds(upper, min(lower, upper))
