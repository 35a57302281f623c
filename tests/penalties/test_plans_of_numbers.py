"""Plans of critics that make tensors of lists: of Python's numbers, which are constants, or of what looks like them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from served_critics import agree, never, served
from torch import Tensor, nn

from lipgan.penalties.tape import Tape

# A plan stands for plain tensors; those of a device that is written in Python are of a class of their own.
pytestmark = pytest.mark.hardware

GAINS = [0.5, 1.0, 2.0, 1.5]


class Critic(nn.Module):
    """Scores that are bent by a factor for each feature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 1)
        self.gains, self.pair, self.order, self.rows = [0.5, 1.0, 2.0, 1.5], (3.0, 0.5), [1, 0, 3, 2], [[1.0, 2.0]]
        self.register_buffer("size", torch.tensor(2))
        self.register_buffer("scale", torch.tensor(2.0))

    def hidden(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def score(self, x: Tensor, factor: Tensor) -> Tensor:
        return self.last(self.hidden(x) * factor).sin()


# ---- Python's numbers ----


class ByALiteral(Critic):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=x.dtype))


class ByAnAttribute(Critic):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, torch.as_tensor(self.gains).to(x))


class ByATuple(Critic):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, x.new_tensor(data=(self.pair, [1.0, 2.0])).flatten())


class ByAGlobal(Critic):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, torch.asarray(GAINS, dtype=x.dtype))


class BySizes(Critic):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, torch.tensor([len(x), *x.shape, 2.0**3], dtype=x.dtype))


class ByAChangedTensor(Critic):
    """What is written into the tensor comes from a buffer, and follows it."""

    def forward(self, x: Tensor) -> Tensor:
        factor = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=x.dtype)
        factor[1] = self.scale
        return self.score(x, factor)


class ByABlur(Critic):
    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.tensor([[[1.0, 2.0, 1.0]]], dtype=x.dtype)
        h = F.pad(self.hidden(x)[:, None], [1, 1], mode="reflect")
        return self.last(F.conv1d(h, kernel / kernel.sum())[:, 0]).sin()


class ByAnIndex(Critic):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        h = torch.cat([h[:, self.order[:2]], h[:, [3, 2]]], 1) * h
        h[:, [0, 2]] = h[:, range(1, 3)] * 2.0
        return self.last(h).sin()


class ByShapes(Critic):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x).view([x.size(0), -1, 2]).permute([0, 2, 1]).flatten(1)
        return self.score(x, 1.0 + h.mean([1], keepdim=True) * torch.ones([1, 4], dtype=x.dtype))


def _literal(critic: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.score(x, torch.tensor([0.5, 1.0, 2.0, 2.5], dtype=x.dtype))  # type: ignore[no-any-return]

    patch.setattr(ByALiteral, "forward", forward)


def _entry(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.gains[2] = 3.0


def _tuple(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.pair = 3.0, 1.5


def _global(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "GAINS", [0.5, 7.0, 2.0, 1.5])


def _scale(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.scale.fill_(3.0)


def _order(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.order.reverse()


def _nothing(critic: Any, patch: pytest.MonkeyPatch) -> None:
    pass


SERVED = [(ByALiteral, _literal), (ByAnAttribute, _entry), (ByATuple, _tuple), (ByAGlobal, _global)]
SERVED += [(ByAChangedTensor, _scale), (ByAnIndex, _order), (BySizes, _nothing), (ByABlur, _nothing)]
SERVED += [(ByShapes, _nothing)]


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize(("critic_type", "change"), SERVED)
def test_lists_of_numbers_are_constants(
    critic_type: Any, change: Callable[..., None], check: str, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = critic_type().double()
    before = served(lambda: critic, critic, tapes)
    n = len(tapes)
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", check)
    change(critic, monkeypatch)
    for _ in range(3):
        after = agree(lambda: critic, critic)
    assert torch.equal(before, after) == (change is _nothing)
    if check == "0":  # the values of tensors are inputs
        assert (len(tapes) == n) == (change in (_nothing, _scale))


# ---- numbers of tensors ----


class Number:
    """Converts a tensor to a number, wherever one is asked for."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __float__(self) -> float:
        return float(self.tensor)

    def __index__(self) -> int:
        return int(self.tensor)


class Numbers:
    """A sequence of such numbers."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return 4

    def __getitem__(self, k: int) -> float:
        if k >= len(self):
            raise IndexError(k)
        return float(self.tensor)


class OfNumbers(list):  # type: ignore[type-arg]
    """A list whose entries are not what is read."""

    tensor: Tensor

    def __iter__(self) -> Iterator[float]:
        return iter([float(self.tensor)] * len(self))

    def __getitem__(self, k: Any) -> Any:
        return float(self.tensor)


class Hidden(Critic):
    def hold(self) -> None:
        """Hold the buffers in other things as well; they are those of the dtype that the critic has now."""
        self.number, self.place, self.numbers = Number(self.scale), Number(self.size), Numbers(self.scale)
        self.held, self.nested = [self.scale, 1.0, 2.0, 1.5], ([1.0, 2.0], (0.5, self.scale))
        self.own = OfNumbers([1.0] * 4)
        self.own.tensor = self.scale


HIDDEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "in a list": lambda self, x: torch.tensor([self.scale, 1.0, 2.0, 1.5]),
    "in a list by name": lambda self, x: x.new_tensor(data=[self.scale, 1.0, 2.0, 1.5]),
    "in a list that is held": lambda self, x: torch.as_tensor(self.held),
    "in a list of lists": lambda self, x: torch.tensor(self.nested).flatten(),
    "in a comprehension": lambda self, x: torch.tensor([self.scale * k for k in range(4)]),
    "computed": lambda self, x: torch.asarray([(self.scale + 1).sqrt(), 1.0, 2.0, 1.5]),
    "converted": lambda self, x: torch.tensor([float(self.scale), 1.0, 2.0, 1.5]),
    "as an object": lambda self, x: torch.tensor(self.number, dtype=x.dtype),
    "as an object in a list": lambda self, x: x.new_tensor([self.number, 1.0, 2.0, 1.5]),
    "in a sequence": lambda self, x: torch.tensor(self.numbers, dtype=x.dtype),
    "in a class of lists": lambda self, x: torch.tensor(self.own, dtype=x.dtype),
    "in a constructor": lambda self, x: torch.FloatTensor([self.scale, 1.0, 2.0, 1.5]),
    "in a tensor's constructor": lambda self, x: x.new([self.scale, 1.0, 2.0, 1.5]),
    "in an index": lambda self, x: torch.arange(10.0).view(2, 5)[:, [self.size, 0, 1, 2]][0],
    "as an object in an index": lambda self, x: torch.arange(5.0)[self.place] + 1,
    "in a string": lambda self, x: float(str(self.scale).partition("(")[2].partition(",")[0]),
    "in an array": lambda self, x: torch.tensor(self.scale.numpy()),
    "by a function of arrays": lambda self, x: float(np.sqrt(self.scale)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of PyTorch
@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("traced", [False, True], ids=["", "by a debugger"])
def test_numbers_of_tensors_are_no_constants(
    name: str, traced: bool, tapes: list[Tape], request: pytest.FixtureRequest
) -> None:
    factor = HIDDEN[name]
    if traced:  # which takes the place of what notes the lines
        before = sys.gettrace()
        request.addfinalizer(lambda: sys.settrace(before))
        sys.settrace(lambda *event: None)

    class Own(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            return self.score(x, factor(self, x))

    critic = Own().double()
    critic.hold()
    never(lambda: critic, critic, tapes)
    first = agree(lambda: critic, critic)
    critic.scale.fill_(3.0)
    critic.size.fill_(3)
    assert not torch.equal(first, agree(lambda: critic, critic)), "the change changes nothing"
