"""Gradient penalties of a critic: where they are taken, and what they penalize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import check_critic, check_no_nan, check_real_and_fake
from lipgan.penalties import engines, shortcut
from lipgan.penalties.conditions import (
    Float32InPlaceOfFloat16,
    OutsideOfInferenceMode,
    Unsharded,
    as_data,
    clone_if_inference,
    uncompiled,
    unwrap,
)
from lipgan.penalties.coupling import CoupledSamples
from lipgan.penalties.critic_call import Critic, CriticCall, Output
from lipgan.penalties.parts import Parts, Samples, join
from lipgan.penalties.points import points
from lipgan.penalties.request import request
from lipgan.penalties.task import Execution, PenaltyForm, as_one_batch


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
    compile: bool | str = False,
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
    training and minibatch standard deviation do, or fails for so many, as one does that holds the labels of a batch:
    then it takes them one after the other, and the critic runs twice.

    With the engine "fused" the gradients of the critic's parameters are ready when this returns, and the backward only
    scales them: it is first order, works with gradient accumulation and ``torch.amp.GradScaler``, and cannot be
    differentiated again (``create_graph=True`` is refused). Parameters that the penalty does not depend on, such as
    biases, get zeros. Within ``torch.no_grad()`` and ``torch.inference_mode()`` only the value is computed.

    When the same is asked for again, a plan, which is a recording of its operations, stands for the Python code of the
    critic, as long as nothing that the code reads has changed.

    ``torch.compile``: within a compiled function a call is one operation of the graph, with ``fullgraph=True`` too,
    where the critic is a module (not DistributedDataParallel), the samples are tensors, ``critic_args`` constants and
    tensors that require no gradient, and ``output`` is no function. The graph is made for one ``generator``, whose
    states may be any: keep it for all steps, as another one is traced anew, and from the fifth on breaks the graph.
    Otherwise it is one graph break, its backward runs uncompiled, and ``fullgraph=True`` is an error. Inside, the
    critic runs as in an eager call: critics that are compiled themselves run uncompiled, and until this returns other
    threads do not compile either. To compile what happens inside is what ``compile=True`` is for.

    DistributedDataParallel: give the wrapper, which then synchronizes the gradients as those of any forward pass; they
    equal those of the joined batch, except for kind "max", which takes the maximum of each process's own samples, and
    "dragan", whose noise is as wide as those. The wrapper waits for the gradients of all parameters that the scores
    depend on, so that with the engine "autograd", too, those that the penalty does not depend on get zeros.
    Give the wrapped module only in a loss that has a forward pass of the wrapper in it as well. Critics whose weights
    are sharded (``fully_shard``, FullyShardedDataParallel) are refused. Lightning Fabric's wrapper waits for gradients
    of what it returns, so that autograd serves it; its ``module`` gets the engine "fused".

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
            CPU "autograd" unless there is a plan, which is faster. Tensors of a subclass that only carries something
            along, such as MONAI's MetaTensor, reach the critic as plain tensors, except with "autograd".
        compile: True has the plan compiled by Inductor when it is first asked for, which takes half a minute or
            more, and pays for large critics with smooth activations or normalization. What is compiled runs once from
            the same state as the tape, and is used if it computes the same but for rounding; a draw is that of an eager
            call. A perceptron that has a closed form takes it. "cudagraph" has the plan captured in CUDA graphs
            as well, a perceptron's too.
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
            that is sharded; ``compile`` with engine "autograd", or "cudagraph" for samples that are not on a GPU.
        UnsupportedCriticError: ``engine="fused"`` and a critic that it cannot follow; ``compile`` and a critic of which
            there can be no plan (docs/numerics/gradient_penalty.md, Plans), with the reason.
        RuntimeError: within a transform of torch.func, or for a critic with dual tensors of forward mode.

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
    if torch.compiler.is_compiling():
        from lipgan.penalties import traced

        if traced.fits(critic, (real, fake), critic_args, (weight, target), output, generator):
            settings = (kind, norm, engine, compile, output)
            return traced.call(
                traced.WithGradients, _in_graph, settings, 1, critic, real, fake, critic_args, weight, target, generator
            )[0]
    arguments = (critic, real, fake, kind, weight, target, norm, engine, compile, critic_args, output)
    penalty: Tensor = uncompiled(_gradient_penalty, arguments, generator)
    return penalty


def _gradient_penalty(arguments: tuple[Any, ...], generator: torch.Generator | None) -> Tensor:
    short = shortcut.find(*arguments)
    if short is not None:
        critic, real, fake, *_ = arguments
        found = short.penalty(critic, real, fake, generator)
        if found is not None:
            return found
    asked = request(*arguments)
    assert asked.kind is not None
    # Autograd takes no part in inference mode, but the engines need it.
    with OutsideOfInferenceMode(), torch.no_grad():
        x = points(asked.real, asked.fake, asked.kind, generator, asked.parts)
        check_no_nan(x, asked.real, asked.fake)

        def penalty(critic: Critic, x: Tensor, *args: Any) -> Tensor:
            of_kind = _r1_and_r2 if asked.kind == "r1+r2" else engines.penalty
            return of_kind(asked.call(critic, args), x, asked.form, asked.execution)

        result: Tensor = asked.run(penalty, x)
    if short is None:
        shortcut.note(asked, arguments[1], arguments[2], arguments[3:9], lambda: x)
    return result


def _in_graph(
    kind: str, norm: str, engine: str, compile: bool | str, output: Output
) -> tuple[Callable[..., tuple[Tensor]], None]:
    """What runs an operation of a graph, see `lipgan.penalties.traced`."""

    def run(
        critic: Critic,
        real: Tensor,
        fake: Tensor | None,
        args: tuple[Any, ...],
        weight: float,
        target: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor]:
        arguments = (critic, real, fake, kind, weight, target, norm, engine, compile, args, output)
        return (uncompiled(_gradient_penalty, arguments, generator),)

    return run, None


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
    x, parts = join("real", real, as_data)
    check_real_and_fake(x, None)
    check_critic(critic, critic_args)
    reason: str | None = uncompiled(_explain, critic, x, critic_args, output, parts)
    return reason


def _explain(
    critic: Critic, real: Tensor, critic_args: Sequence[Any], output: Output, parts: Parts | None
) -> str | None:
    try:
        unsharded = Unsharded(critic)
    except ValueError as error:
        return str(error)
    with OutsideOfInferenceMode(), unsharded, Float32InPlaceOfFloat16(critic, real) as wide:
        args = wide([as_data(clone_if_inference(item)) for item in critic_args])
        call, x = CriticCall(unwrap(critic), args, output, parts), clone_if_inference(real)
        return engines.explain(call, x) or engines.slower(call, x)


def _r1_and_r2(call: CriticCall, x: Tensor, form: PenaltyForm, execution: Execution) -> Tensor:
    """The penalty of both halves of ``x``, real and fake: as one batch, or as two where the critic couples samples."""
    joined, both = as_one_batch(call, form, x)
    try:
        return engines.penalty(joined, x, both, execution, apart=True)
    except CoupledSamples:
        r1, r2 = (engines.penalty(call, half, form, execution) for half in x.chunk(2))
        return r1 + r2
