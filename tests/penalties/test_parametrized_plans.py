"""Plans of critics whose weights are computed: spectral normalization, single or in a group, weight normalization."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from penalty_critics import draws, grads_of, samples
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lipgan
from lipgan.nn.spectral_norm import SpectralNorm
from lipgan.penalties.engines import UnsupportedCriticError
from lipgan.penalties.tape import Tape

# A plan stands for plain tensors; those of a device that is written in Python are of a class of their own.
pytestmark = pytest.mark.hardware

REAL, FAKE = samples(4, 3, 8, 8), samples(4, 3, 8, 8, seed=7)


def plain(activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        activation(),
        nn.ConvTranspose2d(4, 2, 3),
        activation(),
        nn.Flatten(),
        nn.Linear(72, 1),
    ).double()


def normalized(by: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(activation: type[nn.Module] = nn.SiLU) -> nn.Module:
        critic = plain(activation)
        for k in (0, 2, 5):
            by(critic[k])
        return critic

    return build


def grouped(activation: type[nn.Module] = nn.SiLU) -> nn.Module:
    critic = plain(activation)
    lipgan.group_spectral_norm(critic)
    return critic


def partly_grouped(activation: type[nn.Module] = nn.SiLU) -> nn.Module:
    """With a normalization in the order of the hook, a second parametrization, and a layer that is not in use."""
    critic = plain(activation)
    lipgan.spectral_norm(critic[0], hook_order=True)
    parametrizations.weight_norm(critic[5])
    lipgan.spectral_norm(critic[5])
    lipgan.group_spectral_norm(critic)
    return critic


CRITICS: dict[str, Callable[..., nn.Module]] = {
    "lipgan": normalized(lipgan.spectral_norm),
    "torch": normalized(parametrizations.spectral_norm),
    "weight norm": normalized(parametrizations.weight_norm),
    "group": grouped,
    "partly grouped": partly_grouped,
}


def group_of(critic: nn.Module) -> Any:
    return next((hook.__self__ for hook in critic._forward_pre_hooks.values()), None)  # type: ignore[attr-defined]


def step(critic: nn.Module, engine: str, kind: str, loss: str | None, **options: Any) -> list[Tensor]:
    """Value, gradients, buffers and spectral norms after one call."""
    if loss is None:
        value = lipgan.gradient_penalty(critic, REAL, FAKE, kind=kind, engine=engine, generator=draws(), **options)
    else:
        result = lipgan.critic_loss(critic, REAL, FAKE, loss, kind=kind, engine=engine, generator=draws(), **options)
        value = result.total
    grads = grads_of(value, critic)
    group = group_of(critic)
    sigmas = [] if group is None else [torch.tensor([*group.sigmas().values()])]
    return [value.detach(), *grads, *(buffer.clone() for buffer in critic.buffers()), *sigmas]


def agree(critic: nn.Module, other: nn.Module, kind: str = "r1", loss: str | None = None, **options: Any) -> None:
    for a, b in zip(step(critic, "fused", kind, loss, **options), step(other, "autograd", kind, loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "loss"), [("r1", None), ("wgan-gp", None), ("r1", "hinge"), ("r1+r2", "non-saturating")]
)
@pytest.mark.parametrize("name", CRITICS)
def test_a_plan_computes_what_autograd_does(name: str, kind: str, loss: str | None, tapes: list[Tape]) -> None:
    activation = nn.LeakyReLU if loss == "hinge" else nn.SiLU
    critic, other = CRITICS[name](activation), CRITICS[name](activation)
    for _ in range(5):
        agree(critic, other, kind, loss)
        with torch.no_grad():  # an optimizer's step
            for p, q in zip(critic.parameters(), other.parameters(), strict=True):
                p.mul_(1.1)
                q.mul_(1.1)
    assert len(tapes) == 2


def test_the_mode_and_a_loaded_state(tapes: list[Tape]) -> None:
    critic, other = grouped(), grouped()
    for module in (critic, other):
        module.eval()
    for _ in range(3):
        agree(critic, other)
    assert len(tapes) == 2
    for module in (critic, other):
        module.train()
    agree(critic, other)
    state = {name: tensor * 0.5 for name, tensor in other.state_dict().items()}
    for module in (critic, other):
        module.load_state_dict(state)
        module.eval()
    before = len(tapes)
    agree(critic, other)
    assert len(tapes) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda critic: pickle.loads(pickle.dumps(critic))])
def test_a_copy_has_plans_of_its_own(duplicate: Callable[[nn.Module], nn.Module], tapes: list[Tape]) -> None:
    critic, other = CRITICS["lipgan"](), CRITICS["lipgan"]()
    for _ in range(3):
        agree(critic, other)
    again, another = duplicate(critic), duplicate(other)
    for _ in range(3):
        agree(again, another)
    agree(critic, other)


def _iterations(critic: Any) -> None:
    critic[0].parametrizations.weight[0].n_power_iterations = 3


def _eps(critic: Any) -> None:
    critic[0].parametrizations.weight[0].eps = 10.0


def _removed(critic: Any) -> None:
    parametrize.remove_parametrizations(critic[0], "weight")


def _one_more(critic: Any) -> None:
    lipgan.spectral_norm(critic[0], n_power_iterations=2)


def _of_another_kind(critic: Any) -> None:
    parametrize.register_parametrization(critic[0], "weight", Doubled())


def _replaced(critic: Any) -> None:
    old = critic[0].parametrizations.weight[0]
    vectors = old._v.new_ones(4) / 2, old._v.clone()
    critic[0].parametrizations.weight[0] = SpectralNorm(critic[0].parametrizations.weight.original, vectors=vectors)


def _ungrouped(critic: Any) -> None:
    group = group_of(critic)
    if group is not None:
        group.remove()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("change", [_iterations, _eps, _removed, _one_more, _of_another_kind, _replaced, _ungrouped])
@pytest.mark.parametrize("name", ["lipgan", "group"])
def test_a_critic_that_changes(name: str, change: Callable[[Any], None], tapes: list[Tape]) -> None:
    critic, other = CRITICS[name](), CRITICS[name]()
    for _ in range(3):
        agree(critic, other)
    before = step(copy.deepcopy(critic), "autograd", "r1", None)[0]
    for module in (critic, other):
        if change is _removed and group_of(module) is not None:
            group_of(module).remove()
        torch.manual_seed(5)
        change(module)
    for _ in range(3):
        agree(critic, other)
    if change is not _ungrouped:
        assert not torch.equal(step(other, "autograd", "r1", None)[0], before), "the change changes nothing"


def test_weights_that_are_kept(tapes: list[Tape]) -> None:
    critic, other = CRITICS["lipgan"](), CRITICS["lipgan"]()
    for _ in range(3):
        agree(critic, other)
    with parametrize.cached():
        first = critic[0].weight  # type: ignore[index]
        penalty = lipgan.gradient_penalty(critic, REAL, kind="r1", engine="fused")
        assert critic[0].weight is first, "the program's own: normalized once"  # type: ignore[index]
    with parametrize.cached():
        other[0].weight  # type: ignore[index]  # noqa: B018
        theirs = lipgan.gradient_penalty(other, REAL, kind="r1", engine="autograd")
    torch.testing.assert_close(penalty, theirs, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("name", ["weight norm", "lipgan"])
def test_a_perceptron_of_computed_weights(name: str, tapes: list[Tape]) -> None:
    critics = []
    for _ in range(2):
        torch.manual_seed(4)
        critic = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).double()
        for k in (1, 3):
            (parametrizations.weight_norm if name == "weight norm" else lipgan.spectral_norm)(critic[k])
        critics.append(critic)
    for loss in (None, "hinge"):
        tapes.clear()
        for _ in range(4):
            agree(*critics, "r1", loss)
        assert len(tapes) == 2


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, *, options, **more: real(f, backend="aot_eager", **more))
    torch._dynamo.reset()
    critic, other = grouped(), grouped()
    for _ in range(3):
        agree(critic, other, "r1", "hinge", compile=True)
    torch._dynamo.reset()


def test_what_keeps_a_critic_from_being_compiled_is_said() -> None:
    critic = CRITICS["lipgan"]()
    _of_another_kind(critic)
    with pytest.raises(UnsupportedCriticError, match="cannot be compiled: weight is made by Doubled"):
        lipgan.gradient_penalty(critic, REAL, kind="r1", compile=True)
    hooked = plain()
    hooked[0].register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(UnsupportedCriticError, match="cannot be compiled: Conv2d has hooks"):
        lipgan.gradient_penalty(hooked, REAL, kind="r1", compile=True)
