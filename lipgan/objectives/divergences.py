r"""The f-divergences of f-GAN, each with what a critic needs to estimate it from samples.

``D_f(p | q) = integral of q(x) f(p(x) / q(x)) dx`` for a convex f, with p the data and q the generator. With the convex
conjugate ``f*(t) = sup_u (u t - f(u))``

    D_f(p | q) >= E_p T(x) - E_q f*(T(x))

for every function T with values in the domain of f*, with equality at ``T* = f'(p / q)``. A critic is a network
V with any real score, followed by the activation g of the divergence, which maps the real line into that domain:
``T = g(V)``.

The table is that of the paper, with f as there; where its integral differs, f decides (docs/numerics/divergences.md).
``pearson`` is the integral of ``(p - q)^2 / q``; ``jensen-shannon`` is twice the Jensen-Shannon divergence; ``gan`` is
the same minus log 4, which is its value where p and q agree.

Source: Nowozin, Cseke and Tomioka, "f-GAN: Training Generative Neural Samplers using Variational Divergence
Minimization" (2016, arXiv:1606.00709), equations 2 to 8, tables 1, 2 and 6.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lipgan._registry import lookup

__all__ = ["DIVERGENCES", "Divergence", "get", "names", "softplus", "widen"]

Formula = Callable[[Tensor], Tensor]


def widen(x: Tensor) -> Tensor:
    """``x`` in float32 where it has a half type: sums of half types lose digits, and scaled losses overflow."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's own is x itself from 20 on, which is too early for float64."""
    return -logsigmoid(-x)


@dataclass(frozen=True)
class _Formulas:
    f: Formula
    derivative: Formula
    conjugate: Formula
    activation: Formula
    # Apart from the two above, because the values between them leave the range of the dtype long before the result.
    conjugate_of_activation: Formula
    optimal_score: Formula


@dataclass(frozen=True)
class Divergence:
    """An f-divergence. Functions are elementwise, of tensors of any shape, and differentiable.

    They keep the dtype, float64, float32, float16 or bfloat16; half types are computed in float32 and rounded once.

    Attributes:
        name: the key in the table.
        upper: the domain of f* is all t below it; ``math.inf`` where that is the real line.
    """

    name: str
    upper: float
    formulas: _Formulas

    def f(self, u: Tensor) -> Tensor:
        """``f(u)`` for ``u >= 0``; infinite at 0 where its limit is."""
        return _apply("u", u, self.formulas.f)

    def derivative(self, u: Tensor) -> Tensor:
        """``f'(u)`` for ``u >= 0``; minus infinity at 0 where its limit is."""
        return _apply("u", u, self.formulas.derivative)

    def optimal(self, u: Tensor) -> Tensor:
        """``T* = f'(u)``, with which the bound is tight where ``p / q = u``."""
        return self.derivative(u)

    def conjugate(self, t: Tensor) -> Tensor:
        """``f*(t)``; infinite from ``upper`` on.

        For Pearson it is the conjugate over all real u, as in the paper, ``t^2 / 4 + t``. Over ``u >= 0`` it would be
        -1 below ``t = -2``; T* is never there.
        """
        return _apply("t", t, self.formulas.conjugate)

    def activation(self, scores: Tensor) -> Tensor:
        """``g(V)``, increasing, from the real line into the domain of f* (or, by rounding, onto its border)."""
        return _apply("scores", scores, self.formulas.activation)

    def conjugate_of_activation(self, scores: Tensor) -> Tensor:
        """``f*(g(V))``, finite for scores for which ``f*`` of the rounded ``g(V)`` would be infinite."""
        return _apply("scores", scores, self.formulas.conjugate_of_activation)

    def optimal_score(self, log_ratio: Tensor) -> Tensor:
        """The score V* with ``g(V*) = T*``, as a function of ``log(p / q)``."""
        return _apply("log_ratio", log_ratio, self.formulas.optimal_score)

    def variational_bound(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """``E_p g(V) - E_q f*(g(V))``: at most the divergence, up to the error of the means.

        Args:
            real_scores: ``[m]``, scores V of samples of p, before the activation.
            fake_scores: ``[n]``, of samples of q.

        Returns:
            0-dim, in the dtype of the scores, in float32 for half types.
        """
        real = self.formulas.activation(_floating("real_scores", real_scores))
        fake = self.formulas.conjugate_of_activation(_floating("fake_scores", fake_scores))
        return real.mean() - fake.mean()

    def __reduce__(self) -> tuple[Callable[[str], "Divergence"], tuple[str]]:
        # Lambdas do not pickle; the name says it all.
        return get, (self.name,)


def _floating(name: str, x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a real floating-point dtype, got {x.dtype}")
    return widen(x)


def _apply(name: str, x: Tensor, formula: Formula) -> Tensor:
    return formula(_floating(name, x)).to(x.dtype)


def _log1mexp(t: Tensor) -> Tensor:
    """``log(1 - exp(t))`` for ``t < 0``, minus infinity from 0 on; to a few roundings everywhere."""
    # Both branches are computed, so each gets arguments with which its gradient is finite (or the branch is taken).
    near, far = t.clamp(min=-math.log(2)), t.clamp(max=-math.log(2))
    return torch.where(t > -math.log(2), torch.log((-torch.expm1(near)).clamp(min=0)), torch.log1p(-torch.exp(far)))


def _log_mean_ratio(u: Tensor) -> Tensor:
    """``log(2 u / (1 + u))``, also where u is near 1, tiny or huge."""
    return -torch.log1p(_half_excess(u))


def _half_excess(u: Tensor) -> Tensor:
    return (1 - u) / u * 0.5


#: By name.
DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        divergence.name: divergence
        for divergence in (
            Divergence(
                "kl",
                math.inf,
                _Formulas(
                    f=lambda u: torch.special.xlogy(u, u),
                    derivative=lambda u: 1 + torch.log(u),
                    conjugate=lambda t: torch.exp(t - 1),
                    activation=lambda v: v,
                    conjugate_of_activation=lambda v: torch.exp(v - 1),
                    optimal_score=lambda log_ratio: 1 + log_ratio,
                ),
            ),
            Divergence(
                "reverse-kl",
                0.0,
                _Formulas(
                    f=lambda u: -torch.log(u),
                    derivative=lambda u: -1 / u,
                    conjugate=lambda t: -1 - torch.log((-t).clamp(min=0)),
                    activation=lambda v: -torch.exp(-v),
                    conjugate_of_activation=lambda v: v - 1,
                    optimal_score=lambda log_ratio: log_ratio,
                ),
            ),
            Divergence(
                "pearson",
                math.inf,
                _Formulas(
                    f=lambda u: (u - 1).square(),
                    derivative=lambda u: 2 * (u - 1),
                    conjugate=lambda t: t * (t / 4 + 1),
                    activation=lambda v: v,
                    conjugate_of_activation=lambda v: v * (v / 4 + 1),
                    optimal_score=lambda log_ratio: 2 * torch.expm1(log_ratio),
                ),
            ),
            Divergence(
                "hellinger",
                1.0,
                _Formulas(
                    # sqrt(u) - 1 without cancellation.
                    f=lambda u: ((u - 1) / (u.sqrt() + 1)).square(),
                    derivative=lambda u: (u - 1) / (u + u.sqrt()),
                    conjugate=lambda t: t / (1 - t).clamp(min=0),
                    activation=lambda v: -torch.expm1(-v),
                    conjugate_of_activation=lambda v: torch.expm1(v),
                    optimal_score=lambda log_ratio: log_ratio / 2,
                ),
            ),
            Divergence(
                "jensen-shannon",
                math.log(2),
                _Formulas(
                    # u log(2 u / (1 + u)) - log((1 + u) / 2)
                    f=lambda u: -torch.special.xlog1py(u, _half_excess(u)) - torch.log1p((u - 1) / 2),
                    derivative=_log_mean_ratio,
                    conjugate=lambda t: -torch.log1p(-torch.expm1(t).clamp(max=1)),
                    activation=lambda v: math.log(2) + logsigmoid(v),
                    conjugate_of_activation=lambda v: softplus(v) - math.log(2),
                    optimal_score=lambda log_ratio: log_ratio,
                ),
            ),
            Divergence(
                "gan",
                0.0,
                _Formulas(
                    # u log(u / (1 + u)) - log(1 + u)
                    f=lambda u: -torch.special.xlog1py(u, 1 / u) - torch.log1p(u),
                    derivative=lambda u: -torch.log1p(1 / u),
                    conjugate=lambda t: -_log1mexp(t),
                    activation=logsigmoid,
                    conjugate_of_activation=softplus,
                    optimal_score=lambda log_ratio: log_ratio,
                ),
            ),
        )
    }
)


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return sorted(DIVERGENCES)


def get(name: str) -> Divergence:
    """The divergence called ``name``.

    Raises:
        ValueError: unknown name; the message names the nearest ones.
    """
    return lookup(DIVERGENCES, name, "divergence")
