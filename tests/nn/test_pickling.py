"""Whole recurrent layers with normalized weights: pickled, saved, copied."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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
