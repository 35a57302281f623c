"""The tape and the batch norm of ROCm, of which a CPU has a stand-in here."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipgan

pytestmark = pytest.mark.cpu


@pytest.fixture
def miopen() -> Iterator[list[bool]]:
    """A stand-in for ``aten.miopen_batch_norm``, which no CPU has: of each of its calls whether it was for training."""
    calls: list[bool] = []

    def batch_norm(*args: Any) -> Any:
        calls.append(args[5])
        return torch.ops.aten.native_batch_norm.default(*args)

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("miopen_batch_norm", batch_norm, "CPU")  # type: ignore[no-untyped-call]
    yield calls
    library._destroy()  # type: ignore[no-untyped-call]


class Miopen(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        arguments = self.weight, self.bias, self.running_mean, self.running_var, self.training, self.momentum, self.eps
        return torch.ops.aten.miopen_batch_norm.default(x, *arguments)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_rocm_runs_once(training: bool, miopen: list[bool]) -> None:
    # Without a rule the operation would run twice, and count the batch twice in its running statistics.
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    theirs, ours = (
        nn.Sequential(nn.Linear(4, 6), norm(6), nn.Tanh(), nn.Linear(6, 1)).double()
        for norm in (nn.BatchNorm1d, Miopen)
    )
    ours.load_state_dict(theirs.state_dict())
    grads = []
    for critic in (theirs.train(training), ours.train(training)):
        penalty = lipgan.gradient_penalty(critic, x, kind="r1", engine="fused")
        found = torch.autograd.grad(penalty, [*critic.parameters()], allow_unused=True)
        grads.append([penalty, *(g for g in found if g is not None), critic[1].running_mean, critic[1].running_var])
    assert miopen == [training]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_batch_norm_of_rocm_is_undone(miopen: list[bool]) -> None:
    # explain() runs the critic, and must leave no trace.
    critic = nn.Sequential(nn.Linear(4, 6), Miopen(6), nn.Tanh(), nn.Linear(6, 1)).double()
    assert lipgan.penalties.explain(critic, torch.randn(5, 4, dtype=torch.float64)) is None
    assert miopen
    assert not critic[1].running_mean.any()  # type: ignore[union-attr, operator]
