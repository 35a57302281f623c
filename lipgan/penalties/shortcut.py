"""The short way of a penalty, or of a loss with its penalty, that is like an earlier one.

Around a small critic the checks of a call take longer than the penalty. What they found holds as long as what they
looked at is the same: the settings, classes, dtypes and shapes of the samples, and the settings of the process. Those
are compared by two calls; the critic itself is compared as ever, by the conditions of what was kept for it
(`lipgan.penalties.plans`). Where anything differs, or where nothing was kept, the call goes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import GlobalStateGuard
from torch.autograd import forward_ad

from lipgan._checks import check_no_nan
from lipgan.objectives import losses
from lipgan.penalties import plans
from lipgan.penalties.comparison import tensor_guards
from lipgan.penalties.conditions import hooks_may_change, unwrap
from lipgan.penalties.engines import Again
from lipgan.penalties.loss_of_scores import LossOfBoth, of_batch
from lipgan.penalties.points import AT_SAMPLES, points
from lipgan.penalties.request import Request, are_plain

# The caller's, which is called anew each time, and of which nothing is kept.
A_FUNCTION = "a function"
OfBoth = losses.Loss | LossOfBoth

# Of one critic: enough for the batch sizes and settings that a training program goes through.
_KEPT = 8


class Shortcut:
    """What is known of calls like one that went the long way.

    Args:
        real, fake: the samples of that call.
        kind: of the penalty.
        again: what serves such calls.
    """

    def __init__(self, real: Tensor, fake: Tensor | None, kind: str, again: Again) -> None:
        self._process: Any = GlobalStateGuard()
        self._are_alike: Callable[..., bool] = tensor_guards([real] if fake is None else [real, fake])
        self._kind, self._again = kind, again

    def fits(self, real: Tensor, fake: Tensor | None) -> bool:
        """Whether process and samples are as in the first call; a mode, a transform or a tracer is a difference."""
        if not self._process.check() or torch._C._len_torch_function_stack():
            return False
        if forward_ad._current_level >= 0 or hooks_may_change():
            return False
        return self._are_alike(real) if fake is None else self._are_alike(real, fake)

    def penalty(
        self, critic: nn.Module, real: Tensor, fake: Tensor | None, generator: torch.Generator | None
    ) -> Tensor | None:
        """The penalty; None, with nothing drawn or changed, if the critic has changed or nothing was kept."""
        found = self._again.find(critic)
        if found is None:
            return None
        if self._kind in ("r1", "r2"):
            x = real if self._kind == "r1" or fake is None else fake
            x = x.detach() if x.requires_grad else x
        else:
            with torch.no_grad():
                x = points(real, fake, self._kind, generator, None)
        check_no_nan(x, real, fake)
        return self._again.run(found, x)

    def loss_and_penalty(
        self, critic: nn.Module, real: Tensor, fake: Tensor, loss: OfBoth, generator: torch.Generator | None
    ) -> tuple[Tensor, ...] | None:
        """What a `lipgan.penalties.CriticLoss` consists of; None as for `penalty`.

        Args:
            loss: of the scores.
        """
        found = self._again.find(critic)
        n, parts = len(real), parts_of(self._kind)
        if found is None or not self._again.serves(found, real, parts * n):
            return None
        with torch.no_grad():
            beside = None if self._kind in AT_SAMPLES else points(real, fake, self._kind, generator, None)
            x = torch.cat(batch(real, fake, beside))
        check_no_nan(x, real, fake)
        scores: list[Tensor] = []

        def note(real_scores: Tensor, fake_scores: Tensor) -> None:
            scores[:] = real_scores.detach(), fake_scores.detach()

        of_scores = of_batch(loss, parts, note)
        value, penalty, total = self._again.run_with_loss(found, x, of_scores, penalized(self._kind, n))
        return total, value, penalty, *scores


def parts_of(kind: str) -> int:
    """Of how many parts a `batch` is."""
    return 2 if kind in AT_SAMPLES else 3


def penalized(kind: str, n: int) -> range:
    """Which samples of a `batch` of n real samples and as many fake ones have the penalty."""
    return {"r1": range(n), "r2": range(n, 2 * n), "r1+r2": range(2 * n)}.get(kind, range(2 * n, 3 * n))


def batch(real: Tensor, fake: Tensor, beside: Tensor | None) -> list[Tensor]:
    """What is scored at once: the samples, and the points of a penalty that is taken elsewhere."""
    return [real, fake] if beside is None else [real, fake, beside]


class _OfOneCritic:
    """The shortcuts of one critic, the newest first, and how often there was none."""

    def __init__(self) -> None:
        self.kept: list[tuple[Hashable, Shortcut]] = []
        self.misses = 0


_known: WeakKeyDictionary[nn.Module, _OfOneCritic] = WeakKeyDictionary()


def find(
    critic: Any,
    real: Any,
    fake: Any,
    kind: Any,
    weight: Any,
    target: Any,
    norm: Any,
    engine: Any,
    compile: Any,
    critic_args: Any,
    output: Any,
    *,
    loss: losses.Loss | str | None = None,
) -> Shortcut | None:
    """The shortcut for the arguments of `lipgan.gradient_penalty`, None if there is none.

    Args:
        loss: for those of `lipgan.critic_loss`, `A_FUNCTION` for any function.
    """
    if not isinstance(critic, nn.Module) or type(real) is not Tensor or type(fake) not in (Tensor, type(None)):
        return None
    known = _known.get(critic)
    if known is None or output is not None or type(critic_args) is not tuple or critic_args:
        return None
    if not are_plain(kind, weight, target, norm, engine, compile) or plans.checking():
        return None
    settings = kind, weight, target, norm, engine, compile, loss, fake is None
    for key, shortcut in known.kept:
        if key == settings and shortcut.fits(real, fake):
            return shortcut
    return None


def note(
    asked: Request,
    real: Any,
    fake: Any,
    settings: tuple[Any, ...],
    x: Callable[[], Tensor],
    loss: losses.Loss | str | None = None,
) -> None:
    """Remember a call that went the long way, if one like it can go the short one.

    Args:
        asked: the call.
        real, fake: the samples, as they were given.
        settings: of the call: kind, weight, target, norm, engine, compile.
        x: makes the points, or what has their shape; a `batch` where there is a loss.
        loss: as for `find`.
    """
    critic = asked.critic
    if not isinstance(critic, nn.Module) or unwrap(critic) is not critic:
        return
    if type(real) is not Tensor or type(fake) not in (Tensor, type(None)) or fake is real:
        return
    if asked.critic_args or asked.output is not None or asked.parts is not None or not are_plain(*settings):
        return
    if (
        torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled(real.device.type)
        or torch.is_inference_mode_enabled()
    ):
        return
    known = _known.get(critic)
    if known is None:
        known = _known[critic] = _OfOneCritic()
    known.misses += 1
    if known.misses & (known.misses - 1) and known.misses > _KEPT:  # a critic for which nothing is kept, time and again
        return
    joined = asked.kind == "r1+r2"
    again = Again.of(
        *(asked.call(critic, ()), x(), asked.form, asked.execution),
        joined=joined,
        loss=loss is not None,
        partly=loss is not None and not joined,
    )
    if again is not None and again.find(critic) is not None:
        assert asked.kind is not None
        known.kept.insert(0, ((*settings, loss, fake is None), Shortcut(real, fake, asked.kind, again)))
        del known.kept[_KEPT:]
