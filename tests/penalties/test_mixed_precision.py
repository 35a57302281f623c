"""`lipgan.gradient_penalty` with autocast, half types and GradScaler."""

import copy
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from penalty_critics import (
    ENGINES,
    FAKE,
    KINDS,
    REAL,
    Conditional,
    assert_same,
    draws,
    grads_of,
    image_critic,
    samples,
    step,
)
from tolerance import assert_as_accurate
from torch import nn

import lipgan
from lipgan import gradient_penalty


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_two_dtypes_are_mixed_in_the_wider_one(kind: str, engine: str) -> None:
    # What mixed precision makes: a generator's samples in half precision, beside data in float32.
    critic, real = image_critic().float(), REAL.float()
    fake = FAKE.bfloat16()
    options: dict[str, Any] = {"kind": kind, "engine": engine}
    if kind == "r2":  # taken at the half-precision samples themselves
        critic, options["generator"] = critic.bfloat16(), None
        plain = gradient_penalty(critic, real.bfloat16(), fake, **options)
        assert torch.equal(gradient_penalty(critic, real, fake, **options), plain)
        return
    mixed = gradient_penalty(critic, real, fake, generator=draws(), **options)
    plain = gradient_penalty(critic, real, fake.float(), generator=draws(), **options)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


def test_interpolation_promotes_as_the_textbook_does() -> None:
    x_hat = lipgan.interpolate(REAL.float(), FAKE.half(), generator=draws())
    eps = torch.rand(6, generator=draws()).view(6, 1, 1, 1)
    assert x_hat.dtype == torch.float32
    torch.testing.assert_close(x_hat, eps * REAL.float() + (1 - eps) * FAKE.half())


def steep_critic() -> nn.Sequential:
    """Its float16 gradient overflows: the slopes reach 2e6."""
    torch.manual_seed(6)
    critic = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1))
    with torch.no_grad():
        for layer in (critic[0], critic[2], critic[4]):
            layer.weight.mul_(400)
    return critic


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_finite_where_float32_is(dtype: torch.dtype, engine: str) -> None:
    critic, x = steep_critic(), samples(16, 8, dtype=torch.float32)
    plain = gradient_penalty(critic, x, kind="dragan", engine=engine, generator=draws())
    expected = grads_of(plain, critic)
    with torch.autocast("cpu", dtype):
        leaf = x.clone().requires_grad_()
        if dtype == torch.float16:
            (slope,) = torch.autograd.grad(critic(leaf).sum(), leaf)
            assert not slope.isfinite().all(), "the critic is too tame for this test"
        penalty = gradient_penalty(critic, x, kind="dragan", engine=engine, generator=draws())
        assert torch.is_autocast_enabled("cpu")
    grads = grads_of(penalty, critic)
    assert penalty.dtype == torch.float32
    assert math.isfinite(penalty.item())
    # bfloat16 has 8 bits: each of six products and their sums rounds by up to 2^-9, the square doubles it.
    rtol = 1e-5 if dtype == torch.float16 else 12 * 2**-8
    torch.testing.assert_close(penalty, plain, rtol=rtol, atol=0)
    # Where SiLU is a line to the last digit, its second derivative is 0 or 1e-20.
    largest = max(float(exact.norm()) for exact in expected)
    for grad, exact in zip(grads, expected, strict=True):
        assert grad.isfinite().all()
        assert grad.dtype == torch.float32
        assert (grad - exact).norm() <= 2 * rtol * exact.norm() + 1e-12 * largest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler_steps(dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    critic = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    reference = copy.deepcopy(critic)
    x, y = samples(16, 8, dtype=torch.float32), samples(16, 8, seed=9, dtype=torch.float32)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = critic(y).mean() - critic(x).mean() + gradient_penalty(critic, x, y, generator=draws(k))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        reference.zero_grad()
        step(reference, x, y, draws(k)).backward()
        with torch.no_grad():
            for p in reference.parameters():
                p.sub_(0.1 * p.grad)
    assert scaler.get_scale() == 1024.0, "no step was skipped"
    moved = 0.0
    for ours, theirs in zip(critic.parameters(), reference.parameters(), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
        moved = max(moved, float((ours - theirs).detach().norm()))
    assert moved > 0, "autocast had no part in it"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_critic(dtype: torch.dtype, engine: str, autocast: bool) -> None:
    torch.manual_seed(8)
    critic = nn.Sequential(nn.Linear(8, 16), nn.Softplus(), nn.Linear(16, 1)).to(dtype)
    x = samples(16, 8, dtype=dtype)
    wide = copy.deepcopy(critic).double()
    truth = gradient_penalty(wide, x.double(), kind="r1", engine="autograd")
    with torch.autocast("cpu", dtype) if autocast else nullcontext():
        penalty = gradient_penalty(critic, x, kind="r1", engine=engine)
    assert penalty.dtype == torch.float32
    # Two products and one derivative round once each, their sums of 16 terms a few times: at most 16 roundings.
    eps = torch.finfo(dtype).eps
    assert abs(penalty.item() - truth.item()) <= 16 * eps * truth.item()
    exact = grads_of(truth, wide)
    for grad, e in zip(grads_of(penalty, critic), exact, strict=True):
        assert grad.dtype == dtype
        assert (grad.double() - e).norm() <= 16 * eps * e.norm() + eps**2
    # The factor of a GradScaler, which is no number of float16, scales gradients that stay within its range.
    small = gradient_penalty(critic, x, kind="r1", weight=1e-2, engine="fused")
    assert_same(
        [g.float() / 65536 for g in grads_of(small * 65536.0 / 8, critic)],
        [g.float() / 8 for g in grads_of(gradient_penalty(critic, x, kind="r1", weight=1e-2, engine="fused"), critic)],
        4 * eps,
    )


def test_half_arguments_and_half_critics_under_float16_autocast() -> None:
    critic = Conditional()
    labels, shared = torch.tensor([0, 1, 2, 1]), samples(6, dtype=torch.float16).requires_grad_()
    x = samples(4, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        penalty = gradient_penalty(critic, x, kind="r1", critic_args=(labels, shared), engine="fused")
    penalty.backward()
    assert shared.grad.dtype == torch.float16
    assert shared.grad.abs().max() > 0
    half = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).half()
    with torch.autocast("cpu", torch.float16):
        assert math.isfinite(gradient_penalty(half, x, kind="r1").item())


def test_float32_is_as_accurate_as_torch() -> None:
    critic = image_critic()
    truth = gradient_penalty(critic, REAL, FAKE, generator=draws(), engine="autograd")
    truths = [truth.detach(), *grads_of(truth, critic)]
    critic = critic.float()
    points = lipgan.interpolate(REAL, FAKE, generator=draws()).float()
    results = []
    for engine in ENGINES:
        penalty = gradient_penalty(critic, points, points, engine=engine)  # mixtures of a sample with itself
        results.append([penalty.detach(), *grads_of(penalty, critic)])
    for ours, theirs, exact in zip(*results, truths, strict=True):
        # The points are rounded, too: by one unit, which sums of 48 and 64 products carry to at most 32 in the result.
        assert_as_accurate(ours, theirs, exact, roundings=32)
