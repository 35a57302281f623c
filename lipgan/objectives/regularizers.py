"""Terms that are added to a player's loss, and the clipping of weights.

None of them knows of a trainer: they are functions of features or samples, or hold the parameters of one module.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipgan._checks import as_number, check_choice
from lipgan.objectives.divergences import widen

__all__ = ["HistoricalAverage", "clip_weights", "energy_distance", "feature_matching", "pulling_away"]

ESTIMATORS = ("unbiased", "biased")


def _check_rows(name: str, x: Tensor, minimum: int = 1) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a real floating-point dtype, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (B, d), got {tuple(x.shape)}")
    if len(x) < minimum:
        raise ValueError(f"{name} must have at least {minimum} row{'s' * (minimum > 1)}, got {len(x)}")


def _check_widths(first: str, x: Tensor, second: str, y: Tensor) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{second} must have the width of {first}, {x.shape[1]}, got {y.shape[1]}")


def feature_matching(real_features: Tensor, fake_features: Tensor) -> Tensor:
    """``|E f(x) - E f(G(z))|^2`` of features f of the critic: a loss of the generator.

    No gradient goes to ``real_features``.

    Args:
        real_features: ``[m, d]``, floating point.
        fake_features: ``[n, d]``; m and n may differ.

    Returns:
        0-dim, in the dtype of the features, in float32 for half types.

    Raises:
        TypeError: not floating point.
        ValueError: another shape, other widths, or no rows.

    Source: Salimans et al., "Improved Techniques for Training GANs" (2016, arXiv:1606.03498), section 3.1.
    """
    _check_rows("real_features", real_features)
    _check_rows("fake_features", fake_features)
    _check_widths("real_features", real_features, "fake_features", fake_features)
    return (widen(real_features).detach().mean(0) - widen(fake_features).mean(0)).square().sum()


def pulling_away(features: Tensor) -> Tensor:
    """The mean squared cosine between the features of two samples of a batch: EBGAN's repelling regularizer.

    Args:
        features: ``[B, d]`` of the generator's samples, floating point. A row of zeros is orthogonal to all.

    Returns:
        0-dim, between 0 (all orthogonal) and 1 (all on one line), in the dtype of the features, in float32 for half
        types.

    Raises:
        TypeError: not floating point.
        ValueError: another shape, or fewer than 2 rows.

    Source: Zhao, Mathieu and LeCun, "Energy-based Generative Adversarial Network" (2016, arXiv:1609.03126), eq. 4.
    """
    _check_rows("features", features, minimum=2)
    rows = nn.functional.normalize(widen(features), dim=1)
    cosines = rows @ rows.T
    n = len(rows)
    others = ~torch.eye(n, dtype=torch.bool, device=rows.device)
    return (cosines * others).square().sum() / (n * (n - 1))


def energy_distance(x: Tensor, y: Tensor, *, estimator: str = "unbiased") -> Tensor:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` of two samples, differentiable: the distance of the Cramer GAN.

    In one dimension it is twice the integral of the squared difference of the distribution functions. Its gradient from
    samples is unbiased, which that of the Wasserstein distance is not.

    Coincident points have the gradient 0, of every order.

    Args:
        x: ``[m, d]``, floating point.
        y: ``[n, d]``.
        estimator: "unbiased" takes the means within a sample over pairs of different samples; it may be negative.
            "biased" takes them over all pairs, a sample with itself included: the distance of the two samples
            themselves, never negative.

    Returns:
        0-dim, in the dtype of x and y, in float32 for half types.

    Raises:
        TypeError: not floating point.
        ValueError: another shape, other widths, too few rows (2 for "unbiased"), an unknown estimator.

    Source: Bellemare et al., "The Cramer Distance as a Solution to Biased Wasserstein Gradients" (2017,
    arXiv:1705.10743), section 4; Szekely and Rizzo, "Energy statistics" (2013).
    """
    check_choice("estimator", estimator, ESTIMATORS)
    minimum = 2 if estimator == "unbiased" else 1
    _check_rows("x", x, minimum)
    _check_rows("y", y, minimum)
    _check_widths("x", x, "y", y)
    x, y = widen(x), widen(y)
    m, n = len(x), len(y)
    pairs_x, pairs_y = (m * (m - 1), n * (n - 1)) if estimator == "unbiased" else (m * m, n * n)
    within = _distances(x, x).sum() / pairs_x + _distances(y, y).sum() / pairs_y
    return 2 * _distances(x, y).mean() - within


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|``, ``[m, n]``. Not torch.cdist, which has no second derivative; a gradient penalty needs it."""
    squares = (x[:, None] - y).square().sum(-1)
    apart = squares > 0
    # The inner choice keeps the infinite slope of the root at 0 out of the gradient, which would be 0 times it.
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)


class HistoricalAverage:
    """``sum |theta - mean of theta's past|^2`` over the parameters of a module: historical averaging.

    Call `update` after every step of the optimizer, and add a multiple of `penalty` to the player's loss.

    Args:
        module: whose parameters count, all of them.

    Source: Salimans et al., "Improved Techniques for Training GANs" (2016, arXiv:1606.03498), section 3.3.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._count = 0
        # The steps of a half-typed average would fall below its rounding after some hundred updates.
        self._means = {name: torch.zeros_like(widen(value)) for name, value in _parameters(module).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters into the average; all updates count alike."""
        self._count += 1
        for name, value in _parameters(self._module).items():
            self._means[name].lerp_(value.to(self._means[name]), 1 / self._count)

    def penalty(self) -> Tensor:
        """0-dim, with a gradient to the parameters; 0 before the first `update`. In float32 for half types."""
        squares = [
            (widen(value) - (self._means[name] if self._count else widen(value).detach())).square().sum()
            for name, value in _parameters(self._module).items()
        ]
        return torch.stack(squares).sum() if squares else torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The number of updates, ``count``, and a copy of the averages by parameter name, ``means``."""
        return {"count": self._count, "means": {name: mean.clone() for name, mean in self._means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: a part is missing, or is of another module: other names or shapes. Nothing is changed then.
        """
        missing = [key for key in ("count", "means") if key not in state]
        if missing:
            raise ValueError(f"state must have the key {missing[0]!r}, got {', '.join(sorted(state)) or 'no keys'}")
        count, means = state["count"], state["means"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"count must be a whole number of at least 0, got {count!r}")
        if set(means) != set(self._means):
            odd = sorted(set(means) ^ set(self._means))
            raise ValueError(f"means must have the names of the module's parameters; {odd[0]!r} is only on one side")
        for name, mean in means.items():
            if mean.shape != self._means[name].shape:
                raise ValueError(
                    f"the mean of {name} must have shape {tuple(self._means[name].shape)}, got {tuple(mean.shape)}"
                )
        self._count = count
        for name, mean in means.items():
            self._means[name].copy_(mean)


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


@torch.no_grad()
def clip_weights(module: nn.Module, bound: float) -> None:
    """Clip every parameter of ``module`` to ``[-bound, bound]``, biases too, in place: the critic's Lipschitz control.

    Args:
        module: a critic, after its optimizer's step.
        bound: positive and finite; 0.01 in the paper.

    Raises:
        TypeError: ``bound`` is not a number.
        ValueError: ``bound`` is not positive and finite.

    Source: Arjovsky, Chintala and Bottou, "Wasserstein GAN" (2017, arXiv:1701.07875), Algorithm 1, line 7.
    """
    if not as_number("bound", bound) > 0:
        raise ValueError(f"bound must be positive and finite, got {bound!r}")
    parameters: list[Tensor] = list(module.parameters())
    if parameters:
        torch._foreach_clamp_min_(parameters, -bound)
        torch._foreach_clamp_max_(parameters, bound)
