"""Critics that change where a comparison may not look: the numbers are those of the changed critic.

Each change here has once been answered by the plan of the critic as it was.
"""

from __future__ import annotations

import builtins
import enum
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from served_critics import X, agree, never, served
from torch import Tensor, nn

import lipgan
from lipgan.penalties.engines import UnsupportedCriticError
from lipgan.penalties.tape import Tape

# A plan stands for plain tensors; those of a device that is written in Python are of a class of their own.
pytestmark = pytest.mark.hardware


class Scored(nn.Module):
    """Scores that bend, for critics that do something with them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 1)

    def score(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh()).sin()


# ---- what a class's own functions depend on: they are made anew, since a test may change them ----


def closure() -> tuple[nn.Module, Callable[[Any], Any]]:
    settings = [1.0, [2.0]]

    class Critic(Scored):
        def forward(self, x: Tensor) -> Tensor:
            return self.score(x) * settings[0]  # type: ignore[operator]

    return Critic(), lambda critic: settings.__setitem__(0, 3.0)


def default() -> tuple[nn.Module, Callable[[Any], Any]]:
    gains = [1.0]

    class Critic(Scored):
        def forward(self, x: Tensor, by: list[float] = gains) -> Tensor:
            return self.score(x) * by[0]

    return Critic(), lambda critic: gains.__setitem__(0, 3.0)


def default_by_name() -> tuple[nn.Module, Callable[[Any], Any]]:
    class Critic(Scored):
        def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
            return self.score(x) * gain

    return Critic(), lambda critic: Critic.forward.__kwdefaults__.update(gain=3.0)


def code() -> tuple[nn.Module, Callable[[Any], Any]]:
    class Critic(Scored):
        def forward(self, x: Tensor) -> Tensor:
            return self.score(x)

    def other(self: Any, x: Tensor) -> Tensor:
        return self.score(x) * 3

    return Critic(), lambda critic: setattr(Critic.forward, "__code__", other.__code__)


def class_between() -> tuple[nn.Module, Callable[[Any], Any]]:
    class Base(Scored):
        def bent(self, h: Tensor) -> Tensor:
            return h.square()

    class Between(Base):
        pass

    class Critic(Between):
        def forward(self, x: Tensor) -> Tensor:
            return self.bent(self.score(x))

    return Critic(), lambda critic: setattr(Between, "bent", lambda self, h: h.exp())


def class_that_had_none() -> tuple[nn.Module, Callable[[Any], Any]]:
    class Base(Scored):
        pass

    class Critic(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.score(x) * getattr(self, "gain", 1.0)

    return Critic(), lambda critic: setattr(Base, "gain", 3.0)


def bases() -> tuple[nn.Module, Callable[[Any], Any]]:
    class One(Scored):
        def bent(self, h: Tensor) -> Tensor:
            return h.square()

    class Other(Scored):
        def bent(self, h: Tensor) -> Tensor:
            return h.exp()

    class Critic(One):
        def forward(self, x: Tensor) -> Tensor:
            return self.bent(self.score(x))

    return Critic(), lambda critic: setattr(Critic, "__bases__", (Other,))


# ---- what is in the place of something else, so that there is as much as before ----


def attribute_for_another() -> tuple[nn.Module, Callable[[Any], Any]]:
    class Critic(Scored):
        def __init__(self) -> None:
            super().__init__()
            self.unused = 0

        def bent(self, h: Tensor) -> Tensor:
            return h.square()

        def forward(self, x: Tensor) -> Tensor:
            return self.bent(self.score(x))

    def change(critic: Any) -> None:
        del critic.unused
        critic.bent = torch.exp

    return Critic(), change


def attribute_of_an_object_for_another() -> tuple[nn.Module, Callable[[Any], Any]]:
    class Settings:
        gain = 1.0

        def __init__(self) -> None:
            self.unused = 0

    class Critic(Scored):
        def __init__(self) -> None:
            super().__init__()
            self.settings = Settings()

        def forward(self, x: Tensor) -> Tensor:
            return self.score(x) * self.settings.gain

    def change(critic: Any) -> None:
        del critic.settings.unused
        critic.settings.gain = 3.0

    return Critic(), change


def attribute_of_a_function() -> tuple[nn.Module, Callable[[Any], Any]]:
    def bent(h: Tensor) -> Tensor:
        try:
            return h * bent.gain  # type: ignore[attr-defined, no-any-return]
        except AttributeError:
            return h

    class Critic(Scored):
        def forward(self, x: Tensor) -> Tensor:
            return bent(self.score(x))

    return Critic(), lambda critic: setattr(bent, "gain", 3.0)


class Optional(Scored):
    """Something that may be there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.score(x))


class Inner(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return getattr(self, "bend", torch.cos)(h) * getattr(self, "gain", 1.0)


def first_buffer() -> tuple[nn.Module, Callable[[Any], Any]]:
    return Optional(), lambda critic: critic.inner.register_buffer("gain", torch.full((1,), 3.0))


def first_parameter() -> tuple[nn.Module, Callable[[Any], Any]]:
    gain = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))
    return Optional(), lambda critic: critic.inner.register_parameter("gain", gain)


def first_layer() -> tuple[nn.Module, Callable[[Any], Any]]:
    return Optional(), lambda critic: critic.inner.add_module("bend", nn.Softplus())


def attribute_of_a_tensor() -> tuple[nn.Module, Callable[[Any], Any]]:
    class Critic(Scored):
        def forward(self, x: Tensor) -> Tensor:
            return self.score(x) * getattr(self.first.weight, "gain", 1.0)

    return Critic(), lambda critic: setattr(critic.first.weight, "gain", 3.0)


def order_of_layers() -> tuple[nn.Module, Callable[[Any], Any]]:
    def change(critic: Any) -> None:
        critic._modules["1"] = critic._modules.pop("1")

    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Softplus(), nn.Linear(5, 5), nn.Sigmoid()), change


def order_of_parameters() -> tuple[nn.Module, Callable[[Any], Any]]:
    class Critic(Scored):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.Parameter(torch.full((1,), value)) for value in (2.0, 3.0))

        def forward(self, x: Tensor) -> Tensor:
            scores = self.score(x)
            for parameter in self.parameters(recurse=False):
                scores = (scores * parameter).sin()
            return scores

    def change(critic: Any) -> None:
        critic._parameters["one"] = critic._parameters.pop("one")

    return Critic(), change


class Held(Scored):
    """Something in an attribute, read in a way that depends on more than what is equal."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def hold(self, held: Any) -> None:
        self.held = held


class Signed(Held):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) * (2 + math.copysign(1.0, self.held))


class InOrder(Held):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(x)
        for number in self.held:
            scores = (scores * (number + 1)).sin()
        return scores


class ByKeys(Held):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(x)
        for key in self.held:
            scores = scores * (3 if isinstance(key, bool) else 2)
        return scores


def zero_of_another_sign() -> tuple[nn.Module, Callable[[Any], Any]]:
    return Signed(0.0), lambda critic: critic.hold(-0.0)


def order_of_a_set() -> tuple[nn.Module, Callable[[Any], Any]]:
    assert [*{8, 0}] != [*{0, 8}]
    return InOrder({8, 0}), lambda critic: critic.hold({0, 8})


def class_of_a_key() -> tuple[nn.Module, Callable[[Any], Any]]:
    return ByKeys({1: None}), lambda critic: critic.hold({True: None})


# ---- what is known not to change ----


class ByBuiltins(Scored):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) * pow(2.0, 1.0)


def builtin() -> tuple[nn.Module, Callable[[Any], Any]]:
    return ByBuiltins(), lambda critic: setattr(builtins, "pow", lambda *numbers: 3.0)


def name_of_a_class() -> tuple[nn.Module, Callable[[Any], Any]]:
    class Critic(Scored):
        def forward(self, x: Tensor) -> Tensor:
            return self.score(x) * len(type(self).__name__)

    return Critic(), lambda critic: setattr(Critic, "__name__", "Renamed")


def function_of_a_layer() -> tuple[nn.Module, Callable[[Any], Any]]:
    layers = nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 1), nn.Softplus()
    return nn.Sequential(*layers), lambda critic: setattr(F, "softplus", lambda h, *_: torch.exp(h))


CHANGES = [closure, default, default_by_name, code, class_between, class_that_had_none, bases, attribute_for_another]
CHANGES += [attribute_of_an_object_for_another, order_of_layers, order_of_parameters]
CHANGES += [first_buffer, first_parameter, first_layer, builtin, name_of_a_class]
CHANGES += [
    attribute_of_a_tensor,
    attribute_of_a_function,
    zero_of_another_sign,
    order_of_a_set,
    class_of_a_key,
    function_of_a_layer,
]


@pytest.mark.parametrize("made", CHANGES, ids=lambda made: made.__name__)
def test_a_change_that_is_hard_to_see(
    made: Callable[[], tuple[nn.Module, Callable[[Any], Any]]], tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    for space, name in ((F, "softplus"), (builtins, "pow")):  # they are put back afterwards
        monkeypatch.setattr(space, name, getattr(space, name))
    torch.manual_seed(0)
    critic, change = made()
    critic.double()
    before = served(lambda: critic, critic, tapes)
    change(critic)
    for _ in range(3):
        after = agree(lambda: critic, critic)
    assert not torch.equal(before, after), "the change changes nothing"


# ---- what is read unseen ----


class Kinds(enum.Enum):
    ONE = 1.0
    TWO = 2.0


class Plain(enum.Enum):
    ONE = 1.0


Kinds.ONE.gain = 1.0  # type: ignore[attr-defined]


class ByAnEnumeration(Held):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) * self.held.gain


class ByItsValue(Held):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) * self.held.value


class ByPlace(Scored):
    """A place at which to split, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.place: Tensor
        self.register_buffer("place", torch.tensor([2]))

    def split(self, x: Tensor) -> Any:
        return x.tensor_split(self.place, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) * self.split(x)[0].sum(1, keepdim=True)


split = torch.tensor_split


class ByPlaceOfAFunction(ByPlace):
    def split(self, x: Tensor) -> Any:
        return torch.tensor_split(x, self.place, 1)


class ByPlaceOfAGlobal(ByPlace):
    def split(self, x: Tensor) -> Any:
        return split(x, self.place, 1)


class ByDimensions(ByPlace):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("dims", torch.tensor([[1, 2], [0, 1]]))
        self.register_buffer("other", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h).sin() * torch.tensordot(h[:, :, None] * h[:, None] ** 2, self.other, self.dims)[:, None]


class ByOffset(Scored):
    """Where a tensor begins in its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(36.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) * (1 + self.table.storage_offset())


def _gain(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Kinds.ONE, "gain", 3.0)


def _value(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plain.ONE, "_value_", 3.0)


def _place(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.place.fill_(3)


def _dims(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.dims.copy_(torch.tensor([[2, 1], [0, 1]]))


def _offset(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.table = torch.arange(38.0)[2:]


@pytest.mark.parametrize(
    ("made", "change"),
    [
        *((lambda: ByAnEnumeration(Kinds.ONE), _gain), (ByPlace, _place), (ByPlaceOfAFunction, _place)),
        *((ByPlaceOfAGlobal, _place), (ByDimensions, _dims), (ByOffset, _offset)),
    ],
)
def test_what_is_read_unseen(
    made: Callable[[], nn.Module], change: Any, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = made().double()
    never(lambda: critic, critic, tapes)
    change(critic, monkeypatch)
    never(lambda: critic, critic, tapes)


def test_the_value_of_a_member(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    critic = ByItsValue(Plain.ONE).double()
    before = served(lambda: critic, critic, tapes)
    _value(critic, monkeypatch)
    assert not torch.equal(before, agree(lambda: critic, critic))


def test_what_another_thread_computes() -> None:
    """Autograd numbers the nodes of each thread on their own."""

    class Critic(Scored):
        def forward(self, x: Tensor) -> Tensor:
            found: list[Tensor] = []
            thread = threading.Thread(target=lambda: found.append(self.first(x).sum(1, keepdim=True)))
            thread.start()
            thread.join()
            return self.score(x) * found[0]

    critic = Critic().double()
    with pytest.raises(UnsupportedCriticError, match="hides what it computes"):
        lipgan.gradient_penalty(critic, X, kind="r1", engine="fused")
    values = [lipgan.gradient_penalty(critic, X, kind="r1", engine=engine).detach() for engine in ("auto", "autograd")]
    torch.testing.assert_close(*values, rtol=1e-10, atol=0.0)


# ---- random numbers that are no dropout ----


def test_noise_that_is_not_scaled() -> None:
    class Critic(Scored):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).tanh()
            return self.last(h * torch.empty_like(h).bernoulli_(0.5))

    critic = Critic().double()
    for _ in range(4):
        values = []
        for engine in ("fused", "autograd"):
            torch.manual_seed(0)
            values.append(lipgan.gradient_penalty(critic, X, kind="r1", engine=engine).detach())
        torch.testing.assert_close(*values, rtol=1e-10, atol=0.0)


def test_a_critic_of_one_batch_size() -> None:
    """A look for the closed form of a loss, at real and fake samples in one batch, fails alone."""

    class Critic(Scored):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.view(6, 5)).tanh())

    critic = Critic().double()
    values = [
        lipgan.critic_loss(critic, X, X + 1, "non-saturating", kind="r1", engine=engine).total.detach()
        for engine in ("fused", "autograd")
    ]
    torch.testing.assert_close(*values, rtol=1e-10, atol=0.0)


def test_tied_weights_are_no_difference(checked_plans: None) -> None:
    critic = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    critic[2].weight = critic[0].weight
    agree(lambda: critic, nn.Sequential(critic[0], critic[2]))
