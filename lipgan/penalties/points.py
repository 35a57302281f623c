"""Where a gradient penalty is taken: at samples, at mixtures of them, or beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipgan._checks import check_generator, check_real_and_fake
from lipgan._dtypes import accumulation_dtype
from lipgan._transfer import to_device
from lipgan.ops.gradient_penalty import mixtures
from lipgan.penalties.parts import Parts

#: The kinds that are taken at samples, which a loss scores anyway; those of others are drawn.
AT_SAMPLES = ("r1", "r2", "r1+r2")


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


def _uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    check_generator(generator)
    device = like.device if generator is None else generator.device
    dtype = accumulation_dtype(like.dtype)
    if generator is None:  # the form with a generator takes no symbolic shapes, which torch.compile may ask for
        return torch.rand(*shape, device=device, dtype=dtype)
    drawn = torch.rand(*shape, generator=generator, device=device, dtype=dtype)
    return to_device(drawn, like.device)


def points(
    real: Tensor, fake: Tensor | None, kind: str, generator: torch.Generator | None, parts: Parts | None
) -> Tensor:
    """The points at which a penalty of the kind is taken; for "r1+r2" real and fake samples in one batch.

    Args:
        real: ``[B, ...]``; fake: likewise, where the kind needs it.
        kind: see `lipgan.gradient_penalty`.
        generator: of the random numbers.
        parts: what the samples consist of; None for one tensor.
    """
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
    if real.dtype != fake.dtype:
        # A generator under autocast makes half-precision samples, beside data in float32.
        dtype = torch.promote_types(real.dtype, fake.dtype)
        real, fake = real.to(dtype), fake.to(dtype)
    return mixtures(real, fake, _uniform((real.shape[0],), real, generator))
