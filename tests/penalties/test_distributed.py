"""`lipgan.gradient_penalty` under DistributedDataParallel."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from penalty_critics import ENGINES, FAKE, REAL, assert_same, draws, grads_of, image_critic
from processes import leave, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lipgan
from lipgan import gradient_penalty


class TwoHeads(nn.Module):
    """A critic with a head that the scores do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = image_critic()
        self.other = nn.Linear(8, 2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body[:5](x)
        return self.body[5](h), self.other(h)


def _scores(outcome: Any) -> Tensor:
    return outcome[0] if isinstance(outcome, tuple) else outcome


def _ddp_loss(critic: Any, module: Any, rows: slice, where: str, together: str, options: dict[str, Any]) -> Tensor:
    """Of one process's rows, or of all.

    Args:
        where: whether the penalty is given the critic or its module.
        together: whether there is a loss of the scores, too, taken before or after the penalty; "" for none.
    """
    real, fake = REAL[rows], FAKE[rows]
    output = {"output": _scores}

    def of_scores() -> Tensor:
        return _scores(critic(fake)).mean() - _scores(critic(real)).mean()

    before = of_scores() if together == "before" else 0
    loss = before + gradient_penalty(critic if where == "wrapper" else module, real, fake, **options, **output)
    return loss + of_scores() if together == "after" else loss


DDP_CASES = [
    (make, where, together, unused, engine)
    for make in (image_critic, TwoHeads)
    for where, together in (("wrapper", ""), ("wrapper", "before"), ("wrapper", "after"), ("module", "after"))
    for unused in (False, True)
    for engine in ("fused", "autograd")
    # What DistributedDataParallel does not serve itself: a forward pass whose outputs are not all in the loss, and,
    # where it does not look for them, parameters without a gradient.
    if make is image_critic or (unused and not together)
]


def _replica(rank: int, path: str) -> None:
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    rows = slice(3 * rank, 3 * rank + 3)
    results = []

    def run(make: Any, where: str, together: str, options: Callable[[], dict[str, Any]], **settings: Any) -> None:
        module = make()
        critic = DistributedDataParallel(module, **settings)
        for _ in range(2):  # the second step fails where the first did not prepare or reduce everything
            module.zero_grad()
            _ddp_loss(critic, module, rows, where, together, options()).backward()
        results.append([torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()])

    for make, where, together, unused, engine in DDP_CASES:
        options = {"kind": "r1+r2", "engine": engine}
        run(make, where, together, lambda options=options: options, find_unused_parameters=unused)

    def drawn() -> dict[str, Any]:
        generator = draws()
        torch.rand(3 * rank, generator=generator, dtype=torch.float64)  # those of the ranks before
        return {"engine": "fused", "generator": generator}

    run(image_critic, "wrapper", "after", drawn)
    run(image_critic, "wrapper", "after", drawn, static_graph=True)
    run(image_critic, "wrapper", "", drawn, static_graph=True)

    # Accumulation: the first half of a step without synchronization, the lazy penalty in the second.
    module = image_critic()
    critic = DistributedDataParallel(module)
    with critic.no_sync():
        (gradient_penalty(critic, REAL[rows], kind="r1", engine="fused") + critic(FAKE[rows]).mean()).backward()
    alone = [p.grad.clone() for p in module.parameters()]
    gradient_penalty(critic, FAKE[rows], kind="r1", engine="fused").backward()
    results.append([p.grad for p in module.parameters()])
    results.append(alone)
    assert critic.module is module
    torch.save(results, f"{path}/{rank}.pt")
    leave()


@pytest.mark.slow
def test_distributed_data_parallel_equals_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    run(_replica, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    def single(make: Any, together: str, **options: Any) -> list[Tensor]:
        module = make()
        loss = _ddp_loss(module, module, slice(6), "wrapper", together, {"engine": "autograd", **options})
        return grads_of(loss, module)

    expected = [single(make, together, kind="r1+r2") for make, _, together, _, _ in DDP_CASES]
    expected += [single(image_critic, together, generator=draws()) for together in ("after", "after", "")]
    module = image_critic()
    loss = gradient_penalty(module, REAL, kind="r1") + gradient_penalty(module, FAKE, kind="r1") + module(FAKE).mean()
    expected.append(grads_of(loss, module))
    for results in ranks:
        for case, ours, theirs in zip([*DDP_CASES, *range(4)], results[:-1], expected, strict=True):
            try:
                assert_same(ours, theirs)
            except AssertionError as error:
                raise AssertionError(f"case {case}") from error
    without_synchronization = zip(ranks[0][-1], ranks[1][-1], strict=True)
    assert not all(torch.equal(a, b) for a, b in without_synchronization)


def _normalized(normalize: Callable[[nn.Module], Any]) -> nn.Sequential:
    critic = image_critic()
    for layer in (critic[0], critic[3], critic[5]):
        normalize(layer)
    return critic


def _grouped() -> nn.Sequential:
    critic = image_critic()
    lipgan.group_spectral_norm(critic)
    return critic


def _batch_normalized() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 1)]
    return nn.Sequential(*layers).double()


# Critics whose buffers the wrapper broadcasts before each forward.
BUFFERED: dict[str, Callable[[], nn.Sequential]] = {
    "lipgan": lambda: _normalized(lipgan.spectral_norm),
    "torch": lambda: _normalized(nn.utils.parametrizations.spectral_norm),
    "torch's hook": lambda: _normalized(nn.utils.spectral_norm),
    "group": _grouped,
    "batch norm": _batch_normalized,
}


# What the wrapper is told, and whether each step is two halves, the first of them without synchronization.
SETTINGS: list[tuple[dict[str, Any], bool]] = [
    ({"static_graph": True}, False),
    ({"find_unused_parameters": True}, False),
    ({}, True),
]


def _halves(critic: nn.Module, module: nn.Module, rows: slice) -> list[Tensor]:
    """Gradients and buffers after two steps of two halves each; the wrapper averages in the second."""
    seen: list[Tensor] = []
    for step in range(2):
        module.zero_grad()
        for real, silent in ((REAL[rows] + step, True), (REAL[rows] - step, False)):
            with critic.no_sync() if silent and isinstance(critic, DistributedDataParallel) else nullcontext():
                loss = critic(FAKE[rows]).mean() - critic(real).mean()
                (loss + gradient_penalty(critic, real, FAKE[rows], kind="r1+r2", engine="fused")).backward()
        seen += [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return seen + [buffer.double() for buffer in module.buffers()]


def _buffered_steps(critic: nn.Module, module: nn.Module, rows: slice, engine: str) -> list[Tensor]:
    """Gradients and buffers after three steps of a whole critic loss."""
    seen: list[Tensor] = []
    for step in range(3):
        module.zero_grad()
        real, fake = REAL[rows] + step, FAKE[rows]
        loss = critic(fake).mean() - critic(real).mean() + gradient_penalty(critic, real, kind="r1", engine=engine)
        loss.backward()
        seen += [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return seen + [buffer.double() for buffer in module.buffers()]


def _buffered_replica(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, make in BUFFERED.items():
        for engine in ENGINES:
            module = make()
            critic = DistributedDataParallel(module)
            rows = slice(3 * rank, 3 * rank + 3)
            results[name, engine] = _buffered_steps(critic, module, rows, engine)
            assert critic.module is module
    for name in ("lipgan", "group"):
        for number, (settings, halves) in enumerate(SETTINGS):
            module = BUFFERED[name]()
            critic = DistributedDataParallel(module, **settings)
            steps = _halves(critic, module, rows) if halves else _buffered_steps(critic, module, rows, "fused")
            results[name, number] = steps
    torch.save(results, f"{path}/{rank}.pt")
    leave()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm|.*spectral_norm:FutureWarning")
def test_critics_with_buffers_under_distributed_data_parallel(tmp_path: Path) -> None:
    run(_buffered_replica, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, make in BUFFERED.items():
        module = make()
        expected = _buffered_steps(module, module, slice(6), "autograd")
        parameters = 3 * sum(p.requires_grad for p in module.parameters())
        for engine in ENGINES:
            ours, theirs = (results[name, engine] for results in ranks)
            assert_same(ours[:parameters], theirs[:parameters])  # averaged over the processes
            if name == "batch norm":
                # Each process has statistics of its own, which only its own rows decide.
                assert_same(ours[:parameters], ranks[0][name, "autograd"][:parameters])
            else:
                assert_same(ours, expected)
    for name in ("lipgan", "group"):
        for number, (_, halves) in enumerate(SETTINGS):
            module = BUFFERED[name]()
            steps = _halves(module, module, slice(6)) if halves else _buffered_steps(module, module, slice(6), "fused")
            for results in ranks:
                assert_same(results[name, number], steps)
