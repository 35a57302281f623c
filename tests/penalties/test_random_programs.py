"""Critics that are random programs: which couple samples, and their penalties, while samples and weights change."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from random_programs import Critic, Program, all_of, dependence
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lipgan
from lipgan.penalties.conditions import EagerMathAttention
from lipgan.penalties.coupling import Watched


def seeds(*bounds: int) -> list[object]:
    """Runs of seeds between some bounds; the last one is long."""
    runs = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
    return [*runs[:-1], pytest.param(runs[-1], marks=pytest.mark.slow)]


@pytest.mark.cpu  # which is the same everywhere
@pytest.mark.parametrize("seeds", seeds(0, 500, 5000))
def test_what_counts_as_apart_is_apart(seeds: range) -> None:
    counts = {False: 0, True: 0}
    for program, x in all_of(seeds):
        leaf = x.clone().requires_grad_()
        watched = Watched(leaf)
        with EagerMathAttention(), watched:
            scores = program(leaf.view_as(leaf), program.parameters())
        depends, half = dependence(program, x), len(x) // 2
        apart = watched.samples.apart(scores)
        counts[apart] += 1
        if apart:
            assert int(depends.sum(0).max()) <= 1, program
        if watched.samples.apart(scores, in_order=True):
            assert apart
            first, second = depends.tensor_split([len(scores) // 2], 1)
            assert not first[half:].any(), program
            assert not second[:half].any(), program
    assert min(counts.values()) > len(seeds) / 20  # both are seen


def knows_the_batch(program: Program, x: Tensor) -> bool:
    """Whether scores that are those of one sample each are others in a batch of twice as many, as no critic's are."""
    leaf = torch.cat([x, 2 * x]).requires_grad_()
    watched, parameters = Watched(leaf), program.parameters()
    try:
        with EagerMathAttention(), watched:
            scores = program(leaf.view_as(leaf), parameters)
        if not watched.samples.apart(scores, in_order=True):
            return False
    except (RuntimeError, IndexError, ValueError):
        return False
    alone = torch.cat([program(part, parameters) for part in (x, 2 * x)])
    return alone.shape != scores.shape or not torch.allclose(alone, scores.detach(), rtol=1e-8)


def loss(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def textbook(critic: Critic, real: Tensor, fake: Tensor, kind: str, seed: int) -> tuple[Tensor, ...]:
    """Loss with a penalty of weight 2, real and fake samples one after the other: the total, the scores."""
    scores = critic(real), critic(fake)
    total = loss(*scores)
    if kind == "wgan-gp":
        eps = torch.rand(len(real), dtype=real.dtype, generator=torch.Generator().manual_seed(seed))
        eps = eps.view(-1, *[1] * (real.ndim - 1))
        x = (eps * real + (1 - eps) * fake).requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return total + 2 * (g.flatten(1).norm(dim=1) - 1).square().mean(), *scores
    for points in {"r1": [real], "r1+r2": [real, fake]}[kind]:
        x = points.clone().requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        total = total + g.flatten(1).square().sum(1).mean()
    return total, *scores


@pytest.mark.parametrize("engine", ["fused", pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seeds", seeds(5000, 5100, 5300))
@pytest.mark.parametrize("kind", ["r1", "r1+r2", "wgan-gp"])
def test_penalties(kind: str, seeds: range, engine: str) -> None:
    """At the first call, and at later ones with other samples and weights, which plans serve."""
    compared = 0
    for program, x in all_of(seeds):
        if kind == "r1+r2" and knows_the_batch(program, x):
            continue
        critic, other = Critic(program), Critic(program)
        generator = torch.Generator().manual_seed(program.seed)
        for call in range(4):
            real, fake = torch.randn(2, *x.shape, dtype=x.dtype, generator=generator)
            with torch.no_grad():
                for ours, theirs in zip(critic.parameters(), other.parameters(), strict=True):
                    change = 0.3 * torch.randn(ours.shape, dtype=ours.dtype, generator=generator)
                    ours.add_(change)
                    theirs.add_(change)
            with sdpa_kernel(SDPBackend.MATH):  # the only one that can be differentiated twice
                total, *scores = textbook(other, real, fake, kind, call)
            expected = [total.detach(), *scores, *_gradients(total, other)]
            if not all(bool(tensor.isfinite().all()) for tensor in expected):
                break
            step = lipgan.critic_loss(
                *(critic, real, fake, loss),
                **{"kind": kind, "weight": 2.0, "engine": engine, "generator": torch.Generator().manual_seed(call)},
            )
            found = [step.total.detach(), step.real_scores, step.fake_scores, *_gradients(step.total, critic)]
            largest = max(float(tensor.abs().max()) for tensor in expected)
            for a, b in zip(found, expected, strict=True):
                assert float((a - b).abs().max()) <= 1e-9 * largest, (program, call)
            compared += 1
    assert compared > len(seeds) / 2


def _gradients(total: Tensor, critic: Critic) -> list[Tensor]:
    parameters = list(critic.parameters())
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
