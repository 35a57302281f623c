"""lipgan.training.adam: the bits of torch.optim.Adam, whatever else happens to the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lipgan.training.adam import AdamStep


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 5), nn.Linear(5, 1)).to(dtype)


def adam(module: nn.Module, **options: object) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=0.01, betas=(0.3, 0.8), fused=True, **options)  # type: ignore[arg-type]


def give_gradients(module: nn.Module, seed: int, leave_out: int = 0) -> None:
    torch.manual_seed(seed)
    for p in list(module.parameters())[leave_out:]:
        p.grad = torch.randn_like(p)
    for p in list(module.parameters())[:leave_out]:
        p.grad = None


def assert_same(ours: torch.optim.Adam, theirs: torch.optim.Adam, steps: int) -> None:
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert all(torch.equal(value, theirs.state[q][name]) for name, value in ours.state[p].items())
    assert float(ours.state[ours.param_groups[0]["params"][-1]]["step"]) == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change",
    [
        lambda group: None,
        lambda group: group.update(lr=0.003),
        lambda group: group.update(weight_decay=0.1, eps=1e-3, maximize=True, betas=(0.9, 0.99)),
    ],
)
def test_the_bits_are_those_of_pytorch(dtype: torch.dtype, change: Callable[[dict[str, object]], None]) -> None:
    one, other = network(dtype), network(dtype)
    ours, theirs = adam(one), adam(other)
    step = AdamStep(ours)
    for k in range(4):
        if k == 2:
            change(ours.param_groups[0])
            change(theirs.param_groups[0])
        give_gradients(one, k)
        give_gradients(other, k)
        step()
        theirs.step()
    assert_same(ours, theirs, 4)


@pytest.mark.cpu
def test_the_kernel_is_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    optimizer = adam(module)
    step = AdamStep(optimizer)
    give_gradients(module, 0)
    step()
    monkeypatch.setattr(torch.optim.Adam, "step", None)
    step()
    assert float(optimizer.state[next(module.parameters())]["step"]) == 2


def test_parameters_without_a_gradient_and_a_loaded_state() -> None:
    one, other = network(), network()
    ours, theirs = adam(one), adam(other)
    step = AdamStep(ours)
    for k, leave_out in enumerate((0, 2, 0)):
        give_gradients(one, k, leave_out)
        give_gradients(other, k, leave_out)
        step()
        theirs.step()
        for optimizer in (ours, theirs):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert float(ours.state[next(one.parameters())]["step"]) == 2
    assert_same(ours, theirs, 3)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_whoever_watches_the_optimizer_sees_its_steps(amsgrad: bool) -> None:
    module = network()
    optimizer = adam(module, amsgrad=amsgrad)
    step = AdamStep(optimizer)
    give_gradients(module, 0)
    step()
    seen: list[str] = []
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        register_optimizer_step_post_hook(lambda *_: seen.append("any")),
    ]
    step()
    for hook in hooks:
        hook.remove()
    assert seen == ["before", "after", "any"]
    with torch.profiler.profile() as profile:
        step()
    assert any(event.key == "Optimizer.step#Adam.step" for event in profile.key_averages())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step()
    assert optimizer._opt_called  # type: ignore[attr-defined]
    assert ("max_exp_avg_sq" in optimizer.state[next(module.parameters())]) == amsgrad
    assert float(optimizer.state[next(module.parameters())]["step"]) == 4
