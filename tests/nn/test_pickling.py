"""Whole layers with normalized weights: pickled, saved, copied."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lipgan

X = torch.linspace(-1, 1, 5 * 2 * 3).reshape(5, 2, 3).sin()


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: list[Callable[[nn.Module], nn.Module]] = [
    lambda module: pickle.loads(pickle.dumps(module)),
    through_torch_save,
    copy.deepcopy,
]


class Critic(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], names: tuple[str, ...], *, grouped: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrent = kind(3, 4, num_layers=2) if kind is not nn.RNN else kind(3, 4, num_layers=2, bias=False)
        for name in names:
            lipgan.spectral_norm(self.recurrent, name)
        if grouped:
            lipgan.group_spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.recurrent(x)[0]
        return out


@pytest.mark.hardware  # a recurrent layer keeps weak references, and torch does not exchange a wrapper that has one
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("forwards", [0, 2])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("names", [("weight_hh_l0", "weight_hh_l1"), ("weight_ih_l0",)])
def test_a_copy_of_a_recurrent_critic_goes_on_as_the_original(
    names: tuple[str, ...],
    kind: type[nn.RNNBase],
    forwards: int,
    grouped: bool,
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    critic = Critic(kind, names, grouped=grouped)
    for _ in range(forwards):
        critic(X).square().sum().backward()
        critic.zero_grad()
    twin = copied(critic)
    for _ in range(2):
        outputs = [network(X) for network in (critic, twin)]
        assert torch.equal(*outputs)
        for out in outputs:
            out.square().sum().backward()
    for ours, theirs in zip(twin.parameters(), critic.parameters(), strict=True):
        assert ours is not theirs
        assert torch.equal(ours.grad, theirs.grad)
    for key, value in critic.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])
    assert twin.double()(X.double()).dtype == torch.float64


def _linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "spectral_norm": lambda: lipgan.spectral_norm(_linear()),
    "two of them": lambda: lipgan.spectral_norm(lipgan.spectral_norm(_linear()), "bias"),
    "orthogonal": lambda: lipgan.nn.orthogonal(_linear()),
    "conv_spectral_norm": lambda: lipgan.nn.conv_spectral_norm(nn.Conv1d(2, 2, 3, padding=1), 3),
    "LSTM": lambda: lipgan.spectral_norm(nn.LSTM(3, 3), "weight_hh_l0"),
}


@pytest.mark.hardware
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_removed_from_a_copy_stays_in_the_original(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = LAYERS[name]().eval()
    x = torch.ones(2, 3)
    twin = copied(layer)
    names = list(layer.parametrizations)
    for parameter in names:
        expected = getattr(layer, parameter)
        parametrize.remove_parametrizations(twin, parameter)
        assert torch.equal(getattr(twin, parameter), expected)
        assert torch.equal(getattr(layer, parameter), expected)
    assert isinstance(twin, parametrize.type_before_parametrizations(layer))
    assert all(parametrize.is_parametrized(layer, parameter) for parameter in names)
    for ours, theirs in zip(_tensors(twin(x)), _tensors(layer(x)), strict=True):
        assert torch.equal(ours, theirs)


def _tensors(outcome: object) -> list[Tensor]:
    return [outcome] if isinstance(outcome, Tensor) else [outcome[0]]  # type: ignore[index]


class Slotted(nn.Linear):
    __slots__ = ("note",)


def test_a_copy_has_what_the_class_of_the_layer_keeps_in_slots() -> None:
    layer = Slotted(3, 2)
    layer.note = ["a"]
    lipgan.spectral_norm(layer)
    twin = copy.deepcopy(layer)
    assert twin.note == ["a"]
    assert twin.note is not layer.note


class OwnCopy(nn.Linear):
    def __deepcopy__(self, memo: dict[int, object]) -> str:
        return "of its own"


def test_a_class_with_a_copy_of_its_own_keeps_it() -> None:
    assert copy.deepcopy(lipgan.spectral_norm(OwnCopy(3, 2))) == "of its own"


@pytest.mark.parametrize("name", LAYERS)
def test_made_without_memory_and_loaded(name: str) -> None:
    layer, x = LAYERS[name]().eval(), torch.ones(2, 3)
    for assign in (True, False):
        with torch.device("meta"):
            other = LAYERS[name]().eval()
        if not assign:
            other.to_empty(device="cpu")
        other.load_state_dict(layer.state_dict(), assign=assign)
        for ours, theirs in zip(_tensors(other(x)), _tensors(layer(x)), strict=True):
            assert torch.equal(ours, theirs)
