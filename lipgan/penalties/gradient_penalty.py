"""Gradient penalties of a critic: where they are taken, and what they penalize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import as_number, check_choice, check_critic, check_no_nan, check_real_and_fake
from lipgan._choices import PENALTY_FORMS
from lipgan._dtypes import accumulation_dtype
from lipgan.ops.gradient_penalty import NORMS
from lipgan.ops.gradient_penalty import interpolate as interpolate_by
from lipgan.penalties import engines
from lipgan.penalties.conditions import (
    Float32InPlaceOfFloat16,
    Unsharded,
    as_data,
    clone_if_inference,
    through_ddp,
    uncompiled,
    unwrap,
)
from lipgan.penalties.coupling import CoupledSamples
from lipgan.penalties.critic_call import Critic, CriticCall, Output
from lipgan.penalties.engines import PenaltyForm
from lipgan.penalties.parts import Parts, Samples, check_same_parts, join

_NEEDS_FAKE = ("wgan-gp", "lp", "max", "r2", "r1+r2")


def gradient_penalty(
    critic: Critic,
    real: Samples,
    fake: Samples | None = None,
    *,
    kind: str = "wgan-gp",
    weight: float = 10.0,
    target: float = 1.0,
    norm: str = "sample",
    engine: str = "auto",
    generator: torch.Generator | None = None,
    critic_args: Sequence[Any] = (),
    output: Output = None,
) -> Tensor:
    """The gradient penalty of a critic, ready to be added to its loss.

    With ``g_i`` the gradient of the critic's score of sample i with respect to that sample and ``n_i = |g_i|``:

    =========  ======================================  ====================================  =========================
    kind       taken at                                penalty                               source
    =========  ======================================  ====================================  =========================
    wgan-gp    mixtures of real and fake               ``weight * mean (n - target)^2``      Gulrajani et al. 2017
    lp         mixtures of real and fake               ``weight * mean max(0, n-target)^2``  Petzka et al. 2018
    max        mixtures of real and fake               ``weight * (max n - target)^2``       Zhou et al. 2019 (target 0)
    dragan     real plus noise, see below              ``weight * mean (n - target)^2``      Kodali et al. 2017
    r1         real                                    ``weight * mean n^2 / 2``             Mescheder et al. 2018
    r2         fake                                    ``weight * mean n^2 / 2``             Mescheder et al. 2018
    r1+r2      real and fake                           the sum of r1 and r2                  Huang et al. 2024 (R3GAN)
    =========  ======================================  ====================================  =========================

    A mixture is ``eps real + (1 - eps) fake`` with one uniform ``eps`` for each sample (:func:`interpolate`); DRAGAN's
    noise is ``0.5 * std(real) * U(0, 1)`` for each number, with a std for each tensor where samples consist of several.
    The gradient of a norm is 0 where the norm is 0. No gradient flows to ``real``, ``fake`` or the networks that made
    them.

    "r1+r2" takes real and fake as one batch, unless the critic couples the samples of its batch, as batch norm in
    training and minibatch standard deviation do: then it takes them one after the other, and the critic runs twice.

    With the engine "fused" the gradients of the critic's parameters are ready when this returns, and the backward only
    scales them: it is first order, works with gradient accumulation and ``torch.amp.GradScaler``, and cannot be
    differentiated again (``create_graph=True`` is refused). Parameters that the penalty does not depend on, such as
    biases, get zeros. Within ``torch.no_grad()`` and ``torch.inference_mode()`` only the value is computed.

    ``torch.compile``: a call within a compiled function is one graph break, its backward runs uncompiled, and
    ``fullgraph=True`` is an error. Critics that are compiled themselves run uncompiled in here, and until this returns
    other threads do not compile either.

    DistributedDataParallel: give the wrapper, which then synchronizes the gradients as those of any forward pass; they
    equal those of the joined batch, except for kind "max", which takes the maximum of each process's own samples, and
    "dragan", whose noise is as wide as those.
    Give the wrapped module only in a loss that has a forward pass of the wrapper in it as well. Critics whose weights
    are sharded (``fully_shard``, FullyShardedDataParallel) are refused.

    ``torch.autocast``: in bfloat16 the critic runs as elsewhere. In place of float16 it runs in float32, whose range
    the penalty's intermediate results need, unless it has float16 parameters.

    Args:
        critic: maps samples ``[B, ...]`` to scores, a tensor of any shape; any module or function. The gradient is that
            of their sum: one score for each sample, or one for each patch (PatchGAN), or one for each pack of samples.
        real: ``[B, ...]``, float32, float64, float16 or bfloat16. Samples may consist of several tensors with the same
            B, such as nodes and edges of a graph: then the gradient is that with respect to all of them, one norm for
            each sample, and a mixture takes one ``eps`` for all tensors of a sample. A tuple or list is passed to the
            critic as so many arguments, as `torch.autograd.functional` does, a dict as one argument.
        fake: likewise, of the same shape; for the kinds that are taken at it. Where the two dtypes differ, as under
            autocast, mixtures are of the dtype that they promote to.
        kind: one of the table above.
        weight: the factor, often called lambda or gamma.
        target: the norm that is aimed at, >= 0; "r1", "r2" and "r1+r2" aim at 0 whatever it is.
        norm: "sample" takes the norm over all of a sample, "pixel" over the channels (dimension 1) of each pixel; that
            of samples that are one tensor.
        engine: "fused" is exact and first order; "autograd" is the textbook double backward; "auto" is "fused" where it
            can follow the critic (:func:`explain` tells), else "autograd", and for modules with recurrent layers on a
            CPU "autograd", which is faster there. Tensors of a subclass that only carries something along, such as
            MONAI's MetaTensor, reach the critic as plain tensors, except with "autograd".
        generator: of the random numbers; on the CPU, it draws the same numbers for every device.
        critic_args: passed to the critic after the samples, such as labels; a list or tuple. Where "r1+r2" takes one
            batch, those that are tensors with B rows are repeated for the second half.
        output: which of the critic's outputs are the scores: an index or key into what it returns, or a function of it.

    Returns:
        0-dim; float64 for float64 samples, else float32.

    Raises:
        TypeError: samples that are not dense floating-point tensors, a critic that cannot be called,
            a weight or target that is not a number, ``critic_args`` that are not a list or tuple.
        ValueError: shapes or devices that differ, an empty batch, NaN in the samples (looked for on the CPU only:
            elsewhere it would wait for the device), an unknown kind, norm or engine, a negative or infinite target, a
            weight that is not finite, a critic whose scores do not depend on the samples, that returns their mean, or
            that is sharded.
        UnsupportedCriticError: ``engine="fused"`` and a critic that it cannot follow.

    Example:
        >>> loss = critic(fake).mean() - critic(real).mean() + lipgan.gradient_penalty(critic, real, fake)
        >>> loss.backward()

        A critic that judges packs of 2 rows (PacGAN, CTGAN), penalized by the norm of a pack, with one mixture each:
        samples are packs then.

        >>> packs = real.unflatten(0, (-1, 2)), fake.unflatten(0, (-1, 2))
        >>> penalty = lipgan.gradient_penalty(lambda x: critic(x.flatten(0, 1)), *packs)

        A critic of several tensors, ``critic(nodes, edges)``:

        >>> graphs = torch.randn(4, 5, 3), torch.rand(4, 5, 5)
        >>> critic_of_graphs = lambda nodes, edges: (edges @ nodes).tanh().sum((1, 2))
        >>> penalty = lipgan.gradient_penalty(critic_of_graphs, graphs, kind="r1")
    """
    arguments = (critic, real, fake, kind, weight, target, norm, engine, generator, critic_args, output)
    penalty: Tensor = uncompiled(_gradient_penalty, *arguments)
    return penalty


def _gradient_penalty(
    critic: Critic,
    real_samples: Samples,
    fake_samples: Samples | None,
    kind: str,
    weight: float,
    target: float,
    norm: str,
    engine: str,
    generator: torch.Generator | None,
    critic_args: Sequence[Any],
    output: Output,
) -> Tensor:
    check_choice("kind", kind, tuple(PENALTY_FORMS))
    check_choice("norm", norm, NORMS)
    check_choice("engine", engine, engines.NAMES)
    weight, target = as_number("weight", weight), as_number("target", target, minimum=0.0)
    if fake_samples is None and kind in _NEEDS_FAKE:
        raise ValueError(f"fake must be given for kind {kind!r}, got None")
    convert = as_data if engine != "autograd" else _unchanged
    real, parts = join("real", real_samples, convert)
    fake, fake_parts = (None, parts) if fake_samples is None else join("fake", fake_samples, convert)
    check_same_parts(parts, fake_parts)
    check_real_and_fake(real, fake)
    if norm == "pixel" and (real.ndim < 2 or parts is not None):
        shape = f"shape {tuple(real.shape)}" if parts is None else "several tensors"
        raise ValueError(f"real must have a dimension of channels for norm 'pixel', got {shape}")
    check_critic(critic, critic_args)
    critic_args = [convert(item) for item in critic_args]
    unsharded = Unsharded(critic)
    differentiable = torch.is_grad_enabled()
    # Autograd takes no part in inference mode, but the engines need it.
    with torch.inference_mode(False), torch.no_grad():
        real, fake = clone_if_inference(real), clone_if_inference(fake)
        critic_args = [clone_if_inference(item) for item in critic_args]
        x = _points(real.detach(), None if fake is None else fake.detach(), kind, generator, parts)
        check_no_nan(x, real, fake)
        form = PenaltyForm(PENALTY_FORMS[kind], weight, target, norm)

        def penalty(critic: Critic, x: Tensor, *args: Any) -> Tensor:
            call = CriticCall(critic, args, output, parts)
            if kind == "r1+r2":
                return _r1_and_r2(call, x, form, engine, differentiable)
            return engines.penalty(call, x, form, engine, differentiable)

        with torch.set_grad_enabled(differentiable), unsharded, Float32InPlaceOfFloat16(critic, x) as wide:
            return through_ddp(penalty, critic, x, *wide(critic_args))


def interpolate(real: Tensor, fake: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """``eps_i real_i + (1 - eps_i) fake_i`` with ``eps_i ~ U(0, 1)``, one for each sample.

    Args:
        real: ``[B, ...]``, float32, float64, float16 or bfloat16.
        fake: likewise, of the same shape.
        generator: of the random numbers; on the CPU, it draws the same numbers for every device.

    Returns:
        Shaped as ``real``, of the dtype that both promote to, differentiable in both.

    Raises:
        TypeError: samples that are not floating point.
        ValueError: shapes that differ, an empty batch.

    Source: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", Algorithm 1.
    """
    check_real_and_fake(real, fake)
    return _mixture(real, fake, generator)


def explain(
    critic: Critic,
    real: Samples,
    *,
    critic_args: Sequence[Any] = (),
    output: Output = None,
) -> str | None:
    """Why engine "auto" takes autograd for the critic, naming the module and the operation; None if it takes "fused".

    Either the fused engine cannot follow the critic, or autograd is faster for it.

    The critic runs once; its buffers and the random state are as before.

    Args: as for :func:`gradient_penalty`; ``real`` stands for the points at which the penalty is taken.
    """
    points, parts = join("real", real, as_data)
    check_real_and_fake(points, None)
    check_critic(critic, critic_args)
    reason: str | None = uncompiled(_explain, critic, points, critic_args, output, parts)
    return reason


def _unchanged(item: Any) -> Any:
    return item


def _explain(
    critic: Critic, real: Tensor, critic_args: Sequence[Any], output: Output, parts: Parts | None
) -> str | None:
    try:
        unsharded = Unsharded(critic)
    except ValueError as error:
        return str(error)
    with torch.inference_mode(False), unsharded, Float32InPlaceOfFloat16(critic, real) as wide:
        args = wide([as_data(clone_if_inference(item)) for item in critic_args])
        call, x = CriticCall(unwrap(critic), args, output, parts), clone_if_inference(real)
        return engines.explain(call, x) or engines.slower(call, x)


# ---- the points at which the penalty is taken ----


def _uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    drawn = torch.rand(*shape, generator=generator, device=device, dtype=accumulation_dtype(like.dtype))
    return drawn.to(like.device)


def _points(
    real: Tensor, fake: Tensor | None, kind: str, generator: torch.Generator | None, parts: Parts | None
) -> Tensor:
    if kind == "r1":
        return real
    if kind == "dragan":
        noise = _uniform(real.shape, real, generator)
        deviation = real.std(correction=0) if parts is None else parts.deviations(real)
        return torch.addcmul(real, noise.to(real.dtype), 0.5 * deviation)
    assert fake is not None
    if kind == "r2":
        return fake
    if kind == "r1+r2":
        return torch.cat([real, fake])
    return _mixture(real, fake, generator)


def _mixture(real: Tensor, fake: Tensor, generator: torch.Generator | None) -> Tensor:
    # A generator under autocast makes half-precision samples, beside data in float32.
    dtype = torch.promote_types(real.dtype, fake.dtype)
    real, fake = real.to(dtype), fake.to(dtype)
    return interpolate_by(real, fake, _uniform((real.shape[0],), real, generator))


def _r1_and_r2(call: CriticCall, x: Tensor, form: PenaltyForm, engine: str, differentiable: bool) -> Tensor:
    """The penalty of both halves of ``x``, real and fake: as one batch, or as two where the critic couples samples."""
    half = x.shape[0] // 2
    # The mean over 2 B samples is half of the sum of two means.
    both = replace(form, weight=2 * form.weight)
    joined = replace(call, args=tuple(_twice(item, half) for item in call.args))
    try:
        return engines.penalty(joined, x, both, engine, differentiable, apart=True)
    except CoupledSamples:
        r1, r2 = (engines.penalty(call, points, form, engine, differentiable) for points in (x[:half], x[half:]))
        return r1 + r2


def _twice(argument: Any, batch: int) -> Any:
    if isinstance(argument, Tensor) and argument.ndim and argument.shape[0] == batch:
        return torch.cat([argument, argument])
    return argument
