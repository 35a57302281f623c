"""Adversarial objectives, as pairs of functions of the critic's scores.

A loss knows nothing of networks: it maps scores ``[B]`` (higher: more real) to 0-dim tensors that are minimized, of the
dtype of the scores, or float32 for half types. Each is a row of `LOSSES`; `get` gives it with other options.

The estimate of a loss is what its critic measures: a lower bound, up to the error of means over samples, on a distance
between the data p and the generator's distribution q, which the best critic reaches. It is what a log should show, for
the loss itself also has the constants of its formula.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lipgan._checks import as_number
from lipgan._registry import lookup
from lipgan.objectives import divergences
from lipgan.objectives.divergences import Divergence, softplus, widen

__all__ = [
    "FGAN",
    "LOSSES",
    "Energy",
    "Hinge",
    "KLWasserstein",
    "LeastSquares",
    "Loss",
    "Minimax",
    "NonSaturating",
    "Relativistic",
    "Wasserstein",
    "get",
    "names",
]


class Loss(Protocol):
    """What a trainer asks of an objective. Scores are ``[B]``, floating point; results are 0-dim.

    One may also have ``critic_derivatives(real_scores, fake_scores)``, the derivatives of its ``critic_loss`` by either
    as tensors like them, of scores that are float32 or wider. :func:`lipgan.critic_loss` takes them where it can, as
    autograd takes longer than they do.
    """

    @property
    def paired(self) -> bool:
        """Whether ``generator_loss`` needs the scores of real samples, as many as of fake ones."""
        ...

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """What the critic minimizes."""
        ...

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """What the generator minimizes."""
        ...

    def estimate(self, real_scores: Tensor, fake_scores: Tensor, critic_loss: Tensor | None = None) -> Tensor:
        """What the critic has measured, for a log; ``critic_loss``, where known, is its loss for these scores."""
        ...


# By the scores of real and of fake samples, each of the shape of the scores.
Derivatives = tuple[Tensor, Tensor]


def _falling(hinged: Tensor) -> Tensor:
    """The derivative of ``relu(hinged).mean()`` by what ``hinged`` falls with; as torch has it at 0 and at NaN."""
    return torch.full_like(hinged, -1 / hinged.numel()).masked_fill_(hinged <= 0, 0.0)


def _check_smoothing(label_smoothing: float) -> None:
    as_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")


@dataclass(frozen=True)
class Minimax:
    """The training scheme of Goodfellow et al. (2014, arXiv:1406.2661, eq. 1), with ``D = sigmoid(score)``.

    ``critic = -E log D(x) - E log(1 - D(G(z)))`` and ``generator = E log(1 - D(G(z)))``, which hardly has a gradient
    while the critic is sure. A critic that cannot tell the two apart (all scores 0) has loss log 4.

    The estimate is ``log 4 - critic``, which bounds twice the Jensen-Shannon divergence.

    Attributes:
        label_smoothing: eps in [0, 1). The label of real samples is ``1 - eps``, that of fake ones stays 0 (one-sided;
            Salimans et al. 2016, arXiv:1606.03498, section 3.4). The estimate is without it.

    Raises:
        TypeError: ``label_smoothing`` is not a number.
        ValueError: ``label_smoothing`` out of its range.
    """

    paired: ClassVar[bool] = False
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> 0-dim."""
        real, fake = widen(real_scores), widen(fake_scores)
        loss = softplus(-real).mean() + softplus(fake).mean()
        # (1 - eps) softplus(-s) + eps softplus(s) = softplus(-s) + eps s
        return loss + self.label_smoothing * real.mean() if self.label_smoothing else loss

    def critic_derivatives(self, real_scores: Tensor, fake_scores: Tensor) -> Derivatives:
        """Those of `critic_loss`."""
        real = -torch.sigmoid(-real_scores)
        if self.label_smoothing:
            real += self.label_smoothing
        return real / real.numel(), torch.sigmoid(fake_scores) / fake_scores.numel()

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of fake samples -> 0-dim."""
        return -softplus(widen(fake_scores)).mean()

    def estimate(self, real_scores: Tensor, fake_scores: Tensor, critic_loss: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> at most ``2 JS(p, q)``, which is at most log 4."""
        if critic_loss is None or self.label_smoothing:
            critic_loss = softplus(-widen(real_scores)).mean() + softplus(widen(fake_scores)).mean()
        return math.log(4) - critic_loss


@dataclass(frozen=True)
class NonSaturating(Minimax):
    """The critic of `Minimax` with ``generator = -E log D(G(z))`` (Goodfellow et al. 2014, section 3)."""

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of fake samples -> 0-dim."""
        return softplus(-widen(fake_scores)).mean()


@dataclass(frozen=True)
class LeastSquares:
    """LSGAN (Mao et al. 2017, arXiv:1611.04076), with the labels 0 and 1, and 1 for the generator.

    ``critic = E (D(x) - 1)^2 / 2 + E D(G(z))^2 / 2`` and ``generator = E (D(G(z)) - 1)^2 / 2``.

    The best critic ``p / (p + q)`` has the loss ``1/4 - Delta / 8`` with the triangular discrimination
    ``Delta = integral of (p - q)^2 / (p + q)``, between 0 and 2: twice Pearson's divergence of p from the middle of p
    and q. The estimate, ``2 - 8 critic``, bounds it.

    Attributes:
        label_smoothing: eps in [0, 1). The critic's label of real samples is ``1 - eps``.

    Raises:
        TypeError: ``label_smoothing`` is not a number.
        ValueError: ``label_smoothing`` out of its range.
    """

    paired: ClassVar[bool] = False
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> 0-dim."""
        real, fake = widen(real_scores), widen(fake_scores)
        return 0.5 * ((real - (1 - self.label_smoothing)).square().mean() + fake.square().mean())

    def critic_derivatives(self, real_scores: Tensor, fake_scores: Tensor) -> Derivatives:
        """Those of `critic_loss`."""
        real = (real_scores - (1 - self.label_smoothing)) / real_scores.numel()
        return real, fake_scores / fake_scores.numel()

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of fake samples -> 0-dim."""
        return 0.5 * (widen(fake_scores) - 1).square().mean()

    def estimate(self, real_scores: Tensor, fake_scores: Tensor, critic_loss: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> at most ``Delta(p, q)``, which is at most 2."""
        # A smaller label scales the best critic, and its loss by the square.
        loss = self.critic_loss(real_scores, fake_scores) if critic_loss is None else critic_loss
        return 2 - 8 / (1 - self.label_smoothing) ** 2 * loss


@dataclass(frozen=True)
class Hinge:
    """The hinge loss of Lim and Ye (2017, arXiv:1705.02894), used by SN-GAN (Miyato et al. 2018, eq. 16, 17).

    ``critic = E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))`` and ``generator = -E D(G(z))``. A critic
    that cannot tell the two apart (all scores 0) has loss 2; one that separates them by a margin of 1 has 0.

    The estimate is ``2 - critic``, which bounds the integral of ``|p - q|``, twice the total variation.
    """

    paired: ClassVar[bool] = False

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> 0-dim."""
        return F.relu(1 - widen(real_scores)).mean() + F.relu(1 + widen(fake_scores)).mean()

    def critic_derivatives(self, real_scores: Tensor, fake_scores: Tensor) -> Derivatives:
        """Those of `critic_loss`."""
        return _falling(1 - real_scores), -_falling(1 + fake_scores)

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of fake samples -> 0-dim."""
        return -widen(fake_scores).mean()

    def estimate(self, real_scores: Tensor, fake_scores: Tensor, critic_loss: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> at most the integral of ``|p - q|``, which is at most 2."""
        return 2 - (self.critic_loss(real_scores, fake_scores) if critic_loss is None else critic_loss)


@dataclass(frozen=True)
class Wasserstein:
    """The loss of WGAN (Arjovsky et al. 2017, arXiv:1701.07875, Algorithm 1), of a critic that is kept Lipschitz.

    ``critic = E D(G(z)) - E D(x)`` and ``generator = -E D(G(z))``. Minus the critic's loss estimates the Wasserstein-1
    distance between the two distributions, times the critic's Lipschitz constant, from below.
    """

    paired: ClassVar[bool] = False

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> 0-dim."""
        return widen(fake_scores).mean() - widen(real_scores).mean()

    def critic_derivatives(self, real_scores: Tensor, fake_scores: Tensor) -> Derivatives:
        """Those of `critic_loss`."""
        real = torch.full_like(real_scores, -1 / real_scores.numel())
        return real, torch.full_like(fake_scores, 1 / fake_scores.numel())

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of fake samples -> 0-dim."""
        return -widen(fake_scores).mean()

    def estimate(self, real_scores: Tensor, fake_scores: Tensor, critic_loss: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> at most ``K W_1(p, q)`` for a K-Lipschitz critic."""
        return -(self.critic_loss(real_scores, fake_scores) if critic_loss is None else critic_loss)


@dataclass(frozen=True)
class KLWasserstein:
    """KL-WGAN (Song and Ermon 2020, arXiv:1910.09779), of a critic that is kept Lipschitz.

    ``critic = E r D(G(z)) - E D(x)`` and ``generator = -E r D(G(z))`` with the importance weights
    ``r = exp D(G(z)) / E exp D(G(z))`` over the batch of fake samples: a WGAN whose fake samples count the more, the
    more real they look. They are the weights that minimize ``E_p D - E_q r D + E_q r log r``, the KL case of the
    paper's objective, whose value with them is ``E_p D - log E_q exp D``: the Donsker-Varadhan bound on ``KL(p | q)``,
    reached at ``D = log(p / q)`` up to a constant. The estimate is that bound.

    The weights are constants for the gradient, in both losses. As they are a minimum, the gradient of either player is
    then that of the Donsker-Varadhan bound, and the critic learns the density ratio. With gradients through the
    weights, as in the authors' code for images (which has a hinge and a temperature as well), neither would hold, and
    the generator would lower the score of a fake sample that scores 1 less than the weighted mean.
    """

    paired: ClassVar[bool] = False

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> 0-dim."""
        return self._weighted(fake_scores) - widen(real_scores).mean()

    def critic_derivatives(self, real_scores: Tensor, fake_scores: Tensor) -> Derivatives:
        """Those of `critic_loss`, whose weights are constants."""
        return torch.full_like(real_scores, -1 / real_scores.numel()), fake_scores.softmax(0)

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of fake samples -> 0-dim."""
        return -self._weighted(fake_scores)

    def estimate(self, real_scores: Tensor, fake_scores: Tensor, critic_loss: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> at most ``KL(p | q)``."""
        fake = widen(fake_scores)
        return widen(real_scores).mean() - (fake.logsumexp(0) - math.log(len(fake)))

    def _weighted(self, fake_scores: Tensor) -> Tensor:
        fake = widen(fake_scores)
        return (fake.detach().softmax(0) * fake).sum()


@dataclass(frozen=True)
class Relativistic:
    """Relativistic pairing (RpGAN: Jolicoeur-Martineau 2018, arXiv:1807.00734; R3GAN: Huang et al. 2024, 2501.05441).

    ``critic = E softplus(-(D(x) - D(G(z))))`` and ``generator = E softplus(-(D(G(z)) - D(x)))``: real and fake samples
    are compared two by two, in the order of the batches. A critic that cannot tell the two apart has loss log 2.

    The estimate is ``log 2 - critic``. It bounds the Jensen-Shannon divergence of the two orders of a pair,
    ``p(x) q(y)`` and ``q(x) p(y)``, and reaches it at ``D = log(p / q)`` up to a constant.
    """

    paired: ClassVar[bool] = True

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of real and of as many fake samples -> 0-dim.

        Raises:
            ValueError: numbers of samples that differ.
        """
        return softplus(-self._margins(real_scores, fake_scores)).mean()

    def critic_derivatives(self, real_scores: Tensor, fake_scores: Tensor) -> Derivatives:
        """Those of `critic_loss`."""
        fake = torch.sigmoid(-self._margins(real_scores, fake_scores)) / real_scores.numel()
        return -fake, fake

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of fake and of as many real samples -> 0-dim.

        Raises:
            ValueError: no ``real_scores``, or numbers of samples that differ.
        """
        if real_scores is None:
            raise ValueError("real_scores must be given to the generator's relativistic loss, got None")
        return softplus(self._margins(real_scores, fake_scores)).mean()

    def estimate(self, real_scores: Tensor, fake_scores: Tensor, critic_loss: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of real and of as many fake samples -> at most ``JS(p q, q p)``, which is at most log 2."""
        return math.log(2) - (self.critic_loss(real_scores, fake_scores) if critic_loss is None else critic_loss)

    def _margins(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        if real_scores.shape != fake_scores.shape:
            raise ValueError(
                f"real_scores must have the shape of fake_scores, {tuple(fake_scores.shape)}, "
                f"got {tuple(real_scores.shape)}"
            )
        return widen(real_scores) - widen(fake_scores)


@dataclass(frozen=True)
class Energy:
    """EBGAN (Zhao et al. 2016, arXiv:1609.03126, eq. 1, 2): the critic's scores are minus energies, ``D = -E``.

    ``critic = E E(x) + E max(0, m - E(G(z)))`` and ``generator = E E(G(z))``. Energies are not negative: those of the
    paper are the errors of an autoencoder. Where the score of a real sample is above 0, which such a critic does not
    have, its energy counts as 0; another critic would lower its loss without end.

    The best critic has the energies 0 and m, and the loss m minus m times the total variation. The estimate,
    ``1 - critic / m``, bounds the total variation, half the integral of ``|p - q|``.

    Attributes:
        margin: m, positive and finite, in the units of the energies.

    Raises:
        TypeError: ``margin`` is not a number.
        ValueError: ``margin`` out of its range.
    """

    paired: ClassVar[bool] = False
    margin: float = 1.0

    def __post_init__(self) -> None:
        as_number("margin", self.margin)
        if not 0 < self.margin < math.inf:
            raise ValueError(f"margin must be positive and finite, got {self.margin!r}")

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> 0-dim."""
        return F.relu(-widen(real_scores)).mean() + F.relu(self.margin + widen(fake_scores)).mean()

    def critic_derivatives(self, real_scores: Tensor, fake_scores: Tensor) -> Derivatives:
        """Those of `critic_loss`."""
        return _falling(-real_scores), -_falling(self.margin + fake_scores)

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of fake samples -> 0-dim."""
        return -widen(fake_scores).mean()

    def estimate(self, real_scores: Tensor, fake_scores: Tensor, critic_loss: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> at most the total variation, which is at most 1."""
        loss = self.critic_loss(real_scores, fake_scores) if critic_loss is None else critic_loss
        return 1 - loss / self.margin


@dataclass(frozen=True)
class FGAN:
    """f-GAN (Nowozin et al. 2016, arXiv:1606.00709, eq. 6): the divergence of a row of `lipgan.divergences`.

    With ``T = g(score)``, ``critic = -E T(x) + E f*(T(G(z)))``, whose negative is the estimate: a lower bound on the
    divergence.

    Attributes:
        divergence: of the data from the generator's distribution.
        saturating: the generator minimizes the bound itself, ``-E f*(T(G(z)))``. Without it ``-E T(G(z))``, which the
            paper recommends (section 3.2) and which extends Goodfellow's second loss: it has the same stationary
            points, and a gradient where the critic is sure of a fake sample.

    Raises:
        TypeError: ``saturating`` is not a bool.
    """

    paired: ClassVar[bool] = False
    divergence: Divergence
    saturating: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.saturating, bool):
            raise TypeError(f"saturating must be True or False, got {self.saturating!r}")

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> 0-dim."""
        return -self.divergence.variational_bound(real_scores, fake_scores)

    def generator_loss(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of fake samples -> 0-dim."""
        of_scores = self.divergence.conjugate_of_activation if self.saturating else self.divergence.activation
        return -of_scores(widen(fake_scores)).mean()

    def estimate(self, real_scores: Tensor, fake_scores: Tensor, critic_loss: Tensor | None = None) -> Tensor:
        """Scores ``[B]`` of real and of fake samples -> at most ``D_f(p | q)``."""
        return self.divergence.variational_bound(real_scores, fake_scores) if critic_loss is None else -critic_loss


#: By name.
LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "minimax": Minimax(),
        "non-saturating": NonSaturating(),
        "least-squares": LeastSquares(),
        "hinge": Hinge(),
        "wasserstein": Wasserstein(),
        "kl-wgan": KLWasserstein(),
        "relativistic": Relativistic(),
        "energy": Energy(),
        **{f"f-{name}": FGAN(divergence) for name, divergence in divergences.DIVERGENCES.items()},
    }
)


def _options(loss: Any) -> list[str]:
    """What `get` may change: the fields with a default. The divergence of an f-GAN is in its name."""
    return [field.name for field in dataclasses.fields(loss) if field.default is not dataclasses.MISSING]


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return sorted(LOSSES)


def get(name: str, **options: Any) -> Loss:
    """The loss called ``name``, with ``options`` (attributes of its class) changed.

    Raises:
        TypeError: the value of an option has the wrong type.
        ValueError: unknown name, and the message names the nearest ones; an option that the loss does not have, and the
            message names the losses that have it; a value of an option out of its range.

    Example::

        >>> get("non-saturating", label_smoothing=0.1)
        NonSaturating(label_smoothing=0.1)
    """
    loss: Any = lookup(LOSSES, name, "loss")
    for option in options:
        if option not in _options(loss):
            having = ", ".join(other for other in names() if option in _options(LOSSES[other]))
            raise ValueError(f"loss {name!r} has no option {option!r}; losses that have it: {having or 'none'}")
    changed: Loss = dataclasses.replace(loss, **options)
    return changed
