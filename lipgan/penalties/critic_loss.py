"""The loss of a critic with its gradient penalty, from one forward pass where they are taken at the same samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipgan._checks import check_no_nan
from lipgan.objectives import losses
from lipgan.penalties import engines, shortcut
from lipgan.penalties.conditions import OutsideOfInferenceMode, uncompiled
from lipgan.penalties.coupling import CoupledSamples
from lipgan.penalties.critic_call import Critic, CriticCall, Output
from lipgan.penalties.loss_of_scores import Loss, LossOfBoth, checked, named, of_batch, own
from lipgan.penalties.parts import Samples
from lipgan.penalties.points import AT_SAMPLES, points
from lipgan.penalties.request import Request, request
from lipgan.penalties.task import Execution, PenaltyForm, as_one_batch


class CriticLoss(NamedTuple):
    """What a critic minimizes, and what it consists of.

    Attributes:
        total: loss + penalty, 0-dim; its backward gives the gradients of both.
        loss: of the scores, 0-dim, detached.
        penalty: 0-dim, detached; 0 where none was asked for.
        real_scores, fake_scores: as the critic returned them, detached.
    """

    total: Tensor
    loss: Tensor
    penalty: Tensor
    real_scores: Tensor
    fake_scores: Tensor


def critic_loss(
    critic: Critic,
    real: Samples,
    fake: Samples,
    loss: str | LossOfBoth,
    *,
    kind: str | None = None,
    weight: float = 10.0,
    target: float = 1.0,
    norm: str = "sample",
    engine: str = "auto",
    compile: bool | str = False,
    generator: torch.Generator | None = None,
    critic_args: Sequence[Any] = (),
    output: Output = None,
) -> CriticLoss:
    """The loss of a critic on real and fake samples, with its gradient penalty.

    As ``loss(critic(real), critic(fake)) + gradient_penalty(critic, real, fake, ...)``, with fewer passes through the
    critic: the kinds "r1", "r2" and "r1+r2" are taken at samples that have been scored already, so that one forward
    pass serves both, with one draw of its dropout. With the engine "fused" the gradients of the loss come along with
    those of the penalty: where the score of a sample does not depend on the others and the critic consists of linear
    maps and piecewise-linear activations, they cost no pass at all. "auto" takes "autograd" for small perceptrons on a
    CPU, where it is faster, unless they have the closed form of :func:`lipgan.gradient_penalty`, or there is a plan:
    its first calls may differ from later ones by rounding.

    The critic is called on real, then on fake samples; "r1+r2" joins them in one batch unless the critic couples
    samples or fails for so many (see :func:`lipgan.gradient_penalty`), returns scores in another order than that of the
    samples, or "autograd" serves it as above; the other kinds call it once more, at their own points. Where forward
    passes change the critic (spectral normalization, batch norm), as many changes are made as there are passes.

    No gradient flows to ``real``, ``fake`` or the networks that made them. What else ``loss`` depends on gets its
    gradients as usual.

    Args:
        critic, real, fake, norm, engine, compile, generator, critic_args, output: as for
            :func:`lipgan.gradient_penalty`, which also tells of DistributedDataParallel, autocast and
            ``torch.compile``: within a compiled function a ``loss`` that is a name is a part of the same operation.
            One that is a function is traced like the code around it, and the passes that give scores and penalty are
            taken once more in the backward, with what the loss owes to each score; on a GPU the host waits there once.
        loss: a name of :data:`lipgan.losses`, for what its critic minimizes, or a function of the scores of real and of
            fake samples, as the critic returned them, that returns a 0-dim tensor.
        kind: of penalty, one of those of :func:`lipgan.gradient_penalty`; None for none.
        weight, target: of the penalty.

    Returns:
        The total, whose ``backward()`` is first order unless the engine is "autograd", its parts and the scores.

    Raises:
        TypeError, ValueError: as :func:`lipgan.gradient_penalty`; ``loss`` is neither a name nor callable, an unknown
            name, or returns something else than a 0-dim floating-point tensor that depends on the scores.
        UnsupportedCriticError: ``engine="fused"`` and a critic that it cannot follow.

    Example:
        >>> step = lipgan.critic_loss(critic, real, fake, "non-saturating", kind="r1", weight=1.0)
        >>> step.total.backward()
    """
    if not callable(loss) and not isinstance(loss, str):
        raise TypeError(f"loss must be a name of lipgan.losses or a function of two tensors of scores, got {loss!r}")
    if torch.compiler.is_compiling():
        from lipgan.penalties import traced

        if traced.fits(critic, (real, fake), critic_args, (weight, target), output, generator):
            asked = (critic, real, fake, critic_args, weight, target, generator)
            if isinstance(loss, str):
                settings = (loss, kind, norm, engine, compile, output)
                return CriticLoss(*traced.call(traced.WithGradients, _in_graph, settings, 5, *asked))
            from lipgan.penalties.traced_scores import OfScores

            # The caller's own code, which dynamo traces as it does the rest.
            penalty, *scores = traced.call(
                OfScores, _in_graph_for_function, (kind, norm, engine, compile, output), 3, *asked
            )
            value = checked(loss(*scores))
            if kind is None:
                penalty = torch.zeros_like(value.detach())
            real_scores, fake_scores = scores
            return CriticLoss(
                value + penalty, value.detach(), penalty.detach(), real_scores.detach(), fake_scores.detach()
            )
    arguments = (critic, real, fake, kind, weight, target, norm, engine, compile, critic_args, output)
    result: CriticLoss = uncompiled(_critic_loss, arguments, named(loss) if isinstance(loss, str) else loss, generator)
    return result


def _critic_loss(
    arguments: tuple[Any, ...], loss: losses.Loss | LossOfBoth, generator: torch.Generator | None
) -> CriticLoss:
    """`critic_loss`, given the loss as one of `lipgan.losses` or as a function."""
    loss = (own(loss) or loss) if callable(loss) else loss
    key = shortcut.A_FUNCTION if callable(loss) else loss
    short = shortcut.find(*arguments, loss=key)
    if short is not None:
        critic, real, fake, *_ = arguments
        found = short.loss_and_penalty(critic, real, fake, loss, generator)
        if found is not None:
            return CriticLoss(*found)
    result, asked = _by_request(arguments, loss, generator)
    if short is None and asked.kind is not None:
        real, fake = asked.real, asked.fake
        assert fake is not None
        if real.dtype == fake.dtype and real.shape == fake.shape and (len(real) > 1 or asked.kind == "r1+r2"):
            beside = None if asked.kind in AT_SAMPLES else real  # of the same shape
            x = functools.partial(torch.cat, shortcut.batch(real, fake, beside))
            shortcut.note(asked, arguments[1], arguments[2], arguments[3:9], x, key)
    return result


def _by_request(
    arguments: tuple[Any, ...], loss: losses.Loss | LossOfBoth, generator: torch.Generator | None
) -> tuple[CriticLoss, Request]:
    """The long way, and what was asked for."""
    asked = request(*arguments)
    kind, form = asked.kind, asked.form
    if asked.fake is None:
        raise TypeError("fake must be a tensor, got NoneType")
    # Under autocast a generator makes half-precision samples, beside data in float32.
    dtype = torch.promote_types(asked.real.dtype, asked.fake.dtype)
    real, fake = asked.real.to(dtype), asked.fake.to(dtype)
    with OutsideOfInferenceMode(), torch.no_grad():
        for samples in (real, fake):
            check_no_nan(samples, real, fake)
        # Points that are no samples are drawn before the critic draws: as `gradient_penalty` does it.
        beside = None if kind is None or kind in AT_SAMPLES else points(real, fake, kind, generator, asked.parts)

        def judge(critic: Critic, real: Tensor, fake: Tensor, *args: Any) -> CriticLoss:
            call = asked.call(critic, args)
            judged = _Judged(call, form, asked.execution, loss)
            if kind is None:
                value = judged.loss(call.scores(real), call.scores(fake))
                penalty = torch.zeros((), dtype=value.dtype, device=value.device)
            elif (both := judged.in_closed_form(real, fake, kind, beside)) is not None:
                value, penalty = both
            elif beside is not None:
                value = judged.loss(call.scores(real), call.scores(fake))
                penalty = engines.penalty(call, beside, form, asked.execution)
            elif kind == "r1":
                value, penalty = judged.real_penalized(real, fake)
            elif kind == "r2":
                value, penalty = judged.fake_penalized(real, fake)
            else:
                value, penalty = judged.both_penalized(real, fake)
            return CriticLoss(value + penalty, value.detach(), penalty.detach(), *judged.scores)

        result: CriticLoss = asked.run(judge, real, fake)
        return result, asked


def _in_graph(
    loss: str,
    kind: str | None,
    norm: str,
    engine: str,
    compile: bool | str,
    output: Output,
) -> tuple[Callable[..., CriticLoss], Callable[..., Tensor]]:
    """What runs an operation of a graph, and tells the scores, see `lipgan.penalties.traced`."""
    known = named(loss)

    def run(
        critic: Critic,
        real: Tensor,
        fake: Tensor,
        args: tuple[Any, ...],
        weight: float,
        target: float,
        generator: torch.Generator | None,
    ) -> CriticLoss:
        arguments = (critic, real, fake, kind, weight, target, norm, engine, compile, args, output)
        result: CriticLoss = uncompiled(_critic_loss, arguments, known, generator)
        return result

    return run, _score(output)


def _in_graph_for_function(
    kind: str | None, norm: str, engine: str, compile: bool | str, output: Output
) -> tuple[Callable[..., CriticLoss], Callable[..., Tensor]]:
    """What runs the operations of a graph that has the loss in it, see `lipgan.penalties.traced_scores`."""

    def run(
        critic: Critic,
        real: Tensor,
        fake: Tensor,
        args: tuple[Any, ...],
        weight: float,
        target: float,
        generator: torch.Generator | None,
        of_scores: LossOfBoth,
        penalized: bool,
    ) -> CriticLoss:
        of_kind = kind if penalized else None
        arguments = (critic, real, fake, of_kind, weight, target, norm, engine, compile, args, output)
        result: CriticLoss = uncompiled(_critic_loss, arguments, of_scores, generator)
        return result

    return run, _score(output)


def _score(output: Output) -> Callable[..., Tensor]:
    """What tells the scores, see `lipgan.penalties.traced`."""

    def score(critic: Critic, x: Tensor, args: tuple[Any, ...]) -> Tensor:
        return CriticCall(critic, args, output).scores(x)

    return score


class _Judged:
    """The loss, and a penalty at samples that it scores.

    Args:
        call: of the critic.
        form: of the penalty of one batch.
        execution: how they are computed.
        loss: one of `lipgan.losses` or a function.
    """

    def __init__(
        self,
        call: CriticCall,
        form: PenaltyForm,
        execution: Execution,
        loss: losses.Loss | LossOfBoth,
    ) -> None:
        self._call, self._form, self._execution, self._loss = call, form, execution, loss
        self._of_scores: LossOfBoth = loss if callable(loss) else loss.critic_loss
        self.scores: tuple[Tensor, Tensor]

    def loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """The loss, as autograd knows it; the scores are noted."""
        self._note(real_scores, fake_scores)
        return checked(self._of_scores(real_scores, fake_scores))

    def real_penalized(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the penalty at real samples."""
        return self._penalized(real, lambda scores: self.loss(scores, self._call.scores(fake)))

    def fake_penalized(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the penalty at fake samples."""
        real_scores = self._call.scores(real)
        return self._penalized(fake, lambda scores: self.loss(real_scores, scores))

    def both_penalized(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the sum of the penalties at real and at fake samples."""
        try:
            x = torch.cat([real, fake])
            joined, form = as_one_batch(self._call, self._form, x)
            return engines.loss_and_penalty(
                *(joined, x, form, self._execution),
                self._of_both(2),
                apart=True,
            )
        except CoupledSamples:
            of_fake: list[Tensor] = []

            def with_fake(real_scores: Tensor) -> Tensor:
                value, penalty = self._penalized(fake, lambda scores: self.loss(real_scores, scores))
                of_fake[:] = [penalty]
                return value

            value, of_real = self._penalized(real, with_fake)
            return value, of_real + of_fake[0]

    def in_closed_form(
        self, real: Tensor, fake: Tensor, kind: str, beside: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The loss and the penalty of a perceptron that has a closed form: its samples do not see each other.

        Args:
            kind: of the penalty.
            beside: where it is taken, if not at samples.
        """
        call, form, execution = self._call, self._form, self._execution
        if not engines.may_be_in_closed_form(call, real, form, execution):
            return None
        n = len(real)
        if n == 1 and kind != "r1+r2":  # a critic may drop a dimension of one
            x = points(real, fake, kind, None, None) if beside is None else beside
            if engines.in_closed_form(call, x, form, execution) is None:
                return None
            return self.loss(call.scores(real), call.scores(fake)), engines.penalty(call, x, form, execution)
        x = torch.cat(shortcut.batch(real, fake, beside))
        perceptron = engines.in_closed_form(call, x, form, execution)
        if perceptron is None:
            return None
        if kind == "r1+r2":
            form = as_one_batch(call, form, x)[1]
        return engines.loss_and_penalty_in_closed_form(
            perceptron, call, x, form, execution, self._of_both(shortcut.parts_of(kind)), shortcut.penalized(kind, n)
        )

    def _of_both(self, parts: int) -> Loss:
        """The loss of the scores of a batch of so many parts: real samples, fake ones, others that it does not see."""
        return of_batch(self._loss, parts, self._note)

    def _note(self, real_scores: Tensor, fake_scores: Tensor) -> None:
        self.scores = real_scores.detach(), fake_scores.detach()

    def _penalized(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return engines.loss_and_penalty(self._call, x, self._form, self._execution, loss)
