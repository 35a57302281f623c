"""Plans of critics as they are written: functions, computed names, functions in dictionaries, hooks that make weights.

Each is changed in whatever its code reads: the numbers are those of the changed critic, with plans checked and without.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from penalty_critics import samples
from served_critics import X, agree, never, served
from torch import Tensor, nn

import lipgan
from lipgan.penalties.engines import UnsupportedCriticError
from lipgan.penalties.tape import Tape

# A plan stands for plain tensors; those of a device that is written in Python are of a class of their own.
pytestmark = pytest.mark.hardware

# ---- critics that a program may change ----

FACTOR = 1.5
BENT: dict[str, Any] = {"tanh": lambda h: torch.tanh(h), "sine": torch.sin, "scale": 2.0}


class Settings(dict):  # type: ignore[type-arg]
    """A dictionary that is read by attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


KINDS = {
    "smooth": Settings(bend=lambda h, gain: torch.tanh(h) * gain, gain=1.2),
    "other": Settings(bend=lambda h, **_: h.square(), gain=1.0),
}


def bent(h: Tensor, kind: str = "smooth", gain: float | None = None) -> Tensor:
    spec = KINDS[kind]
    return spec.bend(h, gain=float(gain if gain is not None else spec.gain))  # type: ignore[no-any-return]


class Scales:
    """Settings in a class."""

    last = 1.1


def halved(h: Tensor) -> Tensor:
    return h * halved.factor  # type: ignore[attr-defined, no-any-return]


halved.factor = 0.5  # type: ignore[attr-defined]


class Numbered(nn.Module):
    """Layers by computed names, an optional one, a list, a function in an attribute."""

    names = ("layer0", "layer1")
    power = 2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer0, self.layer1, self.spare = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.widths, self.flag, self.options = [0, 1], False, {"scale": 1.0, "kinds": ["smooth"]}
        self.settings = types.SimpleNamespace(gain=0.7, verbose=True)
        self.weights = torch.ones(5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        for k in self.widths:
            x = bent(getattr(self, f"layer{k}")(x), self.options["kinds"][0], self.settings.gain)
        for name in self.names:
            x = BENT["tanh"](getattr(self, name)(x))
        if hasattr(self, "extra"):
            x = self.extra(x)
        if self.flag:
            x = 2 * x
        x = x * getattr(self, "missing", 1.0) * FACTOR * self.options["scale"] * self.weights
        x = halved(x) * Scales.last
        return BENT["sine"](x).pow(self.power).sum(1) * BENT["scale"]


def _layer(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.layer1 = nn.Sequential(nn.Linear(5, 5), nn.Softplus()).double()


def _flag(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.flag = True


def _hook(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.layer1.register_forward_hook(lambda module, args, out: 3 * out)


def _global(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "FACTOR", 0.5)


def _entry(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(BENT, "sine", torch.exp)


def _entry_in_entry(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(KINDS["smooth"], "bend", lambda h, gain: h * gain)


def _dictionary(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "KINDS", {"smooth": KINDS["other"]})


def _code_of_an_entry(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BENT["tanh"], "__code__", (lambda h: torch.sigmoid(h)).__code__)


def _default(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bent, "__code__", (lambda h, kind="smooth", gain=None: h * (gain or 1.0)).__code__)


def _method_of_a_dictionary(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Settings, "__getattr__", lambda self, name: lambda h, gain: 2 * h)


def _item_of_an_attribute(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.options["scale"] = 3.0


def _item_of_an_item(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.options["kinds"][0] = "other"


def _list(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.widths.append(1)


def _object(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.settings.gain = 0.2


def _attribute_that_was_missing(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.missing = 4.0


def _attribute_of_the_class_that_was_missing(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Numbered, "missing", 4.0, raising=False)


def _module_that_was_missing(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.extra = nn.Tanh()


def _names(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Numbered, "names", ("layer1", "spare"))


def _names_of_one(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.names = ("spare",)


def _values(critic: Any, patch: pytest.MonkeyPatch) -> None:
    critic.weights.mul_(torch.arange(5))


def _attribute_of_a_function(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(halved, "factor", 0.7)


def _attribute_of_a_class(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scales, "last", 0.3)


def _shadow(critic: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "float", lambda number: 9.0)


CHANGES = [_layer, _flag, _hook, _global, _entry, _entry_in_entry, _dictionary, _code_of_an_entry, _default]
CHANGES += [_method_of_a_dictionary, _item_of_an_attribute, _item_of_an_item, _list, _object, _values, _shadow]
CHANGES += [_attribute_that_was_missing, _attribute_of_the_class_that_was_missing, _module_that_was_missing]
CHANGES += [_names, _names_of_one, _attribute_of_a_function, _attribute_of_a_class]


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_module_that_changes(
    change: Callable[..., None], check: str, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = Numbered().double()
    before = served(lambda: critic, critic, tapes)
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", check)
    change(critic, monkeypatch)
    for _ in range(3):
        after = agree(lambda: critic, critic)
    assert not torch.equal(before, after), "the change changes nothing"


# ---- functions ----


def plain() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


class Program:
    """A training program that holds its critic."""

    def __init__(self, critic: nn.Module) -> None:
        self.critic, self.scale, self.steps = critic, 1.0, 0

    def score(self, x: Tensor) -> Tensor:
        return self.critic(x).square().sum(1) * self.scale  # type: ignore[no-any-return]

    def __call__(self, x: Tensor) -> Tensor:
        return self.score(x)


class Called:
    """What a function critic is made of, each part of which can be replaced."""

    def __init__(self) -> None:
        self.critic, self.labels, self.scale, self.bend = plain(), samples(6, 4), 1.0, torch.tanh
        self.options = {"power": 2}
        self.program = Program(self.critic)


def _lambda(parts: Called) -> Any:
    critic, labels, scale, bend, options = parts.critic, parts.labels, parts.scale, parts.bend, parts.options
    return lambda x: (bend(critic(x)) * labels).pow(options["power"]).sum(1) * scale * FACTOR


def _with_defaults(parts: Called) -> Any:
    def score(
        x: Tensor,
        critic: Any = parts.critic,
        labels: Tensor = parts.labels,
        *,
        bend: Any = parts.bend,
        scale: float = parts.scale,
        power: int = parts.options["power"],
    ) -> Tensor:
        return (bend(critic(x)) * labels).pow(power).sum(1) * scale * FACTOR  # type: ignore[no-any-return]

    return score


def _judge(critic: Any, labels: Tensor, bend: Any, scale: float, options: dict[str, int], x: Tensor) -> Tensor:
    return (bend(critic(x)) * labels).pow(options["power"]).sum(1) * scale * FACTOR  # type: ignore[no-any-return]


def _partial(parts: Called) -> Any:
    return functools.partial(_judge, parts.critic, parts.labels, parts.bend, parts.scale, parts.options)


def _partial_by_name(parts: Called) -> Any:
    by_name = {"scale": parts.scale, "options": parts.options}
    return lambda x: functools.partial(_judge, parts.critic, parts.labels, parts.bend, **by_name)(x=x)


def _nested(parts: Called) -> Any:
    inner = _lambda(parts)

    def outer(x: Tensor) -> Tensor:
        return sum(inner(part) for part in (x,))  # type: ignore[no-any-return]

    return outer


FUNCTIONS = {
    "lambda": _lambda,
    "defaults": _with_defaults,
    "partial": _partial,
    "nested": _nested,
}


def _other_critic(parts: Called, patch: pytest.MonkeyPatch) -> None:
    parts.critic[1] = nn.SiLU()  # type: ignore[operator]


def _other_labels(parts: Called, patch: pytest.MonkeyPatch) -> None:
    parts.labels = parts.labels.flip(0) * 2


def _shape_of_labels(parts: Called, patch: pytest.MonkeyPatch) -> None:
    parts.labels = parts.labels[:1]


def _other_scale(parts: Called, patch: pytest.MonkeyPatch) -> None:
    parts.scale = 3.0


def _other_function(parts: Called, patch: pytest.MonkeyPatch) -> None:
    parts.bend = torch.sin


def _other_option(parts: Called, patch: pytest.MonkeyPatch) -> None:
    parts.options["power"] = 3


def _other_global(parts: Called, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "FACTOR", 0.25)


CHANGES_OF_PARTS = [_other_critic, _other_labels, _shape_of_labels, _other_scale, _other_function, _other_option]
CHANGES_OF_PARTS += [_other_global]


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize("change", CHANGES_OF_PARTS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_changes(
    name: str, change: Callable[..., None], check: str, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Called()
    before = served(lambda: FUNCTIONS[name](parts), parts.critic, tapes)
    run = len(tapes)
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", check)
    change(parts, monkeypatch)
    after = agree(lambda: FUNCTIONS[name](parts), parts.critic)
    assert not torch.equal(before, after), "the change changes nothing"
    if check == "0":  # values of tensors are inputs
        assert (len(tapes) == run) == (change is _other_labels)


@pytest.mark.parametrize(("kind", "loss"), [("wgan-gp", None), ("r1", "hinge"), ("r1+r2", "hinge")])
def test_a_function_with_a_loss(kind: str, loss: str | None, tapes: list[Tape]) -> None:
    parts = Called()
    if kind == "r1+r2":
        parts.labels = parts.labels[:1]  # as both halves are one batch
    served(lambda: _lambda(parts), parts.critic, tapes, kind=kind, loss=loss)


def test_methods_and_objects(tapes: list[Tape]) -> None:
    program = Program(plain())
    for critic in (lambda: program.score, lambda: program, lambda: lambda x: program.score(x)):
        program.scale = 1.0
        first = served(critic, program.critic, tapes)
        program.steps += 1  # which no critic reads
        run = len(tapes)
        agree(critic, program.critic)
        assert len(tapes) == run
        program.scale = 2.0
        assert not torch.equal(first, agree(critic, program.critic))
        program.critic = plain()
        program.critic[0].weight.data.mul_(2)  # type: ignore[index, union-attr, operator]
        assert not torch.equal(first, agree(critic, program.critic))


def test_a_method_of_a_module(tapes: list[Tape]) -> None:
    critic = Numbered().double()
    served(lambda: critic.forward, critic, tapes)
    critic.flag = True
    agree(lambda: critic.forward, critic)


def test_another_critic_in_the_same_function(tapes: list[Tape]) -> None:
    parts, other = Called(), Called()
    other.critic[0].weight.data.mul_(3)  # type: ignore[index, union-attr, operator]
    first = served(lambda: _lambda(parts), parts.critic, tapes)
    second = served(lambda: _lambda(other), other.critic, tapes)
    assert not torch.equal(first, second)
    assert torch.equal(first, agree(lambda: _lambda(parts), parts.critic))


def test_a_parameter_in_a_closure(tapes: list[Tape]) -> None:
    critic, scale = plain(), nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    together = nn.ModuleList([critic])
    together.scale = scale

    def make() -> Any:
        return lambda x: critic(x).square().sum(1) * scale

    served(make, together, tapes)
    frozen = scale.requires_grad_(False)
    assert not frozen.requires_grad
    for _ in range(3):
        value = lipgan.gradient_penalty(make(), X, kind="r1", engine="fused")
        value.backward()
        assert scale.grad is None


def test_the_same_tensor_in_two_places(tapes: list[Tape]) -> None:
    critic, one, other = plain(), samples(6, 4), samples(6, 4, seed=3)

    def penalty(first: Tensor, second: Tensor, third: Tensor, engine: str) -> Tensor:
        def score(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return (critic(x) * a + b.square()).sin().sum(1) * third.sum()  # type: ignore[no-any-return]

        return lipgan.gradient_penalty(score, X, kind="r1", engine=engine, critic_args=(first, second))

    others = [(one, other, one), (other, one, one), (one, one, other), (other, other, one)]
    for places in [(one, one, one)] * 3 + others:
        for _ in range(3):
            torch.testing.assert_close(penalty(*places, "fused"), penalty(*places, "autograd"), rtol=1e-10, atol=0.0)


def test_a_buffer_as_an_argument(tapes: list[Tape]) -> None:
    class Shifted(nn.Module):
        shift: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)
            self.register_buffer("shift", torch.ones(4))

        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return (self.layer(x) + self.shift - 2 * by).sin().sum(1)

    critic = Shifted().double()
    for by in [critic.shift] * 3 + [critic.shift + 1] * 3 + [critic.shift]:
        ours, theirs = (
            lipgan.gradient_penalty(critic, X, kind="r1", engine=engine, critic_args=(by,))
            for engine in ("fused", "autograd")
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0.0)


def test_compile_takes_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, *, options, **more: real(f, backend="aot_eager", **more))
    torch._dynamo.reset()
    parts = Called()
    for _ in range(2):
        ours = lipgan.gradient_penalty(_lambda(parts), X, kind="r1", compile=True)
        theirs = lipgan.gradient_penalty(_lambda(parts), X, kind="r1", engine="autograd")
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0.0)
    torch._dynamo.reset()
    with pytest.raises(UnsupportedCriticError, match="must be a module or a function of one"):
        lipgan.gradient_penalty(lambda x: x.square().sum(1), X, kind="r1", compile=True)


# ---- what is refused ----


class Counting(nn.Module):
    """Depends on how often it was called, in one of several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.kept = nn.Linear(5, 4), 0, {"count": 0, "last": None}
        self.seen: list[Tensor] = [torch.zeros(4, dtype=torch.float64)]

    def score(self, x: Tensor, factor: Any) -> Tensor:
        return (self.layer(x) * factor).sin().sum(1)


class InADictionary(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.kept["count"] += 1
        return self.score(x, self.kept["count"])


class InAList(Counting):
    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x) + self.seen[0]
        self.seen[0] = h.detach()[0]
        return h.sin().sum(1)


class InAnAttribute(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.score(x, self.calls)


class BySetattr(Counting):
    def forward(self, x: Tensor) -> Tensor:
        setattr(self, "calls", self.calls + 1)  # noqa: B010
        return self.score(x, self.calls)


class ByComputedMethod(Counting):
    def forward(self, x: Tensor) -> Tensor:
        getattr(self, "_".join(("", "", "setattr", "", "")))("calls", self.calls + 1)
        return self.score(x, self.calls)


class ByHandedGetattr(Counting):
    def forward(self, x: Tensor) -> Tensor:
        read = getattr
        return self.score(x, read(x.detach(), "numpy")().sum())


class ByNumpy(Counting):
    def forward(self, x: Tensor) -> Tensor:
        import numpy as np

        return self.score(x, float(np.sqrt(x.detach().square().sum())))


ENTERED = 0
ENTRIES = [0]


@contextlib.contextmanager
def _entered() -> Iterator[int]:
    global ENTERED
    ENTERED += 1
    yield ENTERED


@contextlib.contextmanager
def _entered_in_a_list() -> Iterator[int]:
    ENTRIES[0] += 1
    yield ENTRIES[0]


@contextlib.contextmanager
def _filters_left() -> Iterator[int]:
    entry = ("ignore", None, torch.jit.TracerWarning, None, -1)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    yield warnings.filters.count(entry)  # type: ignore[attr-defined]


class ByAGenerator(Counting):
    def forward(self, x: Tensor) -> Tensor:
        with _entered() as calls:
            return self.score(x, (calls + 1) // 2)  # the same for both critics of a pair


class ByAGeneratorsList(Counting):
    def forward(self, x: Tensor) -> Tensor:
        with _entered_in_a_list() as calls:
            return self.score(x, (calls + 1) // 2)


class ByFilters(Counting):
    def forward(self, x: Tensor) -> Tensor:
        with _filters_left() as filters:
            return self.score(x, (filters + 1) // 2)


@pytest.mark.parametrize(
    "critic_type",
    [
        *(InADictionary, InAList, InAnAttribute, BySetattr, ByComputedMethod, ByHandedGetattr, ByNumpy),
        *(ByAGenerator, ByAGeneratorsList, ByFilters),
    ],
    ids=lambda cls: cls.__name__,
)
def test_what_is_left_behind(critic_type: Any, tapes: list[Tape]) -> None:
    critics = [critic_type().double() for _ in range(2)]
    critics[1].load_state_dict(critics[0].state_dict())
    for k in range(1, 6):
        x = X + k
        ours, theirs = (
            lipgan.gradient_penalty(critic, x, kind="r1", engine=engine)
            for critic, engine in zip(critics, ("fused", "autograd"), strict=True)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0.0)
        assert len(tapes) == k, "a plan was run"
    assert critics[0].calls == critics[1].calls
    assert critics[0].kept == critics[1].kept


def test_a_branch_that_is_taken_later(tapes: list[Tape]) -> None:
    """Code that is refused does no harm where it does not run."""

    class Seldom(Counting):
        debug = False

        def forward(self, x: Tensor) -> Tensor:
            if self.debug:
                self.calls += 1
            return self.score(x, 1.0 + self.calls)

    critic = Seldom().double()
    first = served(lambda: critic, critic, tapes)
    critic.debug = True
    for k in range(3):
        value = lipgan.gradient_penalty(critic, X, kind="r1", engine="fused")
        assert critic.calls == k + 1
        assert not torch.equal(value, first)
    critic.debug = False
    agree(lambda: critic, critic)


# ---- hooks that make weights ----


def hooked(by: Callable[..., nn.Module]) -> nn.Module:
    critic = plain()
    for k in (0, 2):
        by(critic[k])  # type: ignore[index]
    return nn.Sequential(critic, nn.Sigmoid()).double()


def _eps(critic: Any) -> None:
    for hook in critic[0][0]._forward_pre_hooks.values():
        hook.eps = 5.0


def _iterations(critic: Any) -> None:
    for hook in critic[0][0]._forward_pre_hooks.values():
        hook.n_power_iterations = 3


def _evaluation(critic: Any) -> None:
    critic.eval()


@pytest.mark.parametrize("loss", [None, "hinge"])
@pytest.mark.parametrize("by", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda by: by.__name__)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_that_make_weights(by: Any, loss: str | None, tapes: list[Tape]) -> None:
    critic = hooked(by)
    served(lambda: critic, critic, tapes, loss=loss)
    for _ in range(3):  # with vectors, and weights, that change
        run = len(tapes)
        agree(lambda: critic, critic, loss=loss)
        assert len(tapes) == run
        with torch.no_grad():
            for p in critic.parameters():
                p.mul_(1.1)
    remove = nn.utils.remove_weight_norm if by is nn.utils.weight_norm else nn.utils.remove_spectral_norm
    remove(critic[0][0])  # type: ignore[index, arg-type]
    agree(lambda: critic, critic, loss=loss)


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize("change", [_eps, _iterations, _evaluation], ids=lambda change: change.__name__)
def test_a_hook_that_changes(
    change: Callable[[Any], None], check: str, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = hooked(nn.utils.spectral_norm)
    served(lambda: critic, critic, tapes)
    before = agree(lambda: critic, critic)
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", check)
    change(critic)
    for _ in range(3):
        after = agree(lambda: critic, critic)
        assert change is _evaluation or not torch.equal(before, after)


# ---- what is held ----


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_plan_goes_with_the_critic_of_a_function(name: str, tapes: list[Tape]) -> None:
    def run() -> list[Any]:
        parts = Called()
        served(lambda: FUNCTIONS[name](parts), parts.critic, tapes)
        return [weakref.ref(parts.critic), weakref.ref(parts.labels), *map(weakref.ref, parts.critic.parameters())]

    gone = run()
    tapes.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


def test_a_plan_goes_with_a_program(tapes: list[Tape]) -> None:
    def run() -> list[Any]:
        program = Program(plain())
        served(lambda: program.score, program.critic, tapes)
        return [weakref.ref(program), weakref.ref(program.critic)]

    gone = run()
    tapes.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


# ---- generators in `with` statements ----


@contextlib.contextmanager
def quiet(category: Any = UserWarning) -> Iterator[float]:
    entry = ("ignore", None, category, None, 0)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    yield GAIN
    warnings.filters.remove(entry)  # type: ignore[attr-defined]


@contextlib.contextmanager
def loud() -> Iterator[float]:
    yield 3.0


GAIN = 1.5


class Quiet(nn.Module):
    """Runs a part within a generator that changes the filters of warnings, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        with quiet() as gain:
            x = self.layer(x) * gain
        return x.sin().sum(1)


@pytest.fixture
def own_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters of the test's own."""
    monkeypatch.setattr(warnings, "filters", [*warnings.filters])  # type: ignore[attr-defined]


def _other_generator(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "quiet", loud)


def _other_cell(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quiet.__closure__[0], "cell_contents", loud.__wrapped__)  # type: ignore[attr-defined, index]


def _global_of_the_generator(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "GAIN", 0.5)


def _code_of_the_generator(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quiet.__wrapped__, "__code__", loud.__wrapped__.__code__)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("own_filters")
@pytest.mark.parametrize(
    "change",
    [_other_generator, _other_cell, _global_of_the_generator, _code_of_the_generator],
    ids=lambda change: change.__name__,
)
def test_a_generator_in_a_with_statement(
    change: Callable[[pytest.MonkeyPatch], None], tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = Quiet().double()
    before, filters = served(lambda: critic, critic, tapes), [*warnings.filters]  # type: ignore[attr-defined]
    change(monkeypatch)
    assert not torch.allclose(agree(lambda: critic, critic), before), "the change changes nothing"
    assert warnings.filters == filters  # type: ignore[attr-defined]


# ---- attributes that nothing reads ----


class Trained(nn.Module):
    """Holds what a trainer needs, and finds its factors by names that begin with a letter."""

    def __init__(self, prefix: str = "u") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.prefix = nn.Linear(5, 4), prefix
        self.register_buffer("u0", torch.tensor(0.5))
        self.lr = 1.5
        self.optim = torch.optim.Adam(self.parameters())
        self.log = logging.getLogger(__name__)


class ByLetter(Trained):
    def forward(self, x: Tensor) -> Tensor:
        factors = [getattr(self, "u%d" % i) for i in range(1)]  # noqa: UP031
        return (self.layer(x) * factors[0]).sin().sum(1)


class ByAnyName(Trained):
    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * getattr(self, self.prefix + "0")).sin().sum(1)


class ByOwnName(Trained):
    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.optim.param_groups[0]["lr"]).sin().sum(1)


class ByLetterOfOptim(Trained):
    def forward(self, x: Tensor) -> Tensor:
        optim = getattr(self, f"o{'ptim'}")
        return (self.layer(x) * optim.param_groups[0]["lr"]).sin().sum(1)


def test_attributes_that_nothing_reads(tapes: list[Tape]) -> None:
    critic = ByLetter().double()
    before = served(lambda: critic, critic, tapes)
    critic.optim = torch.optim.SGD(critic.parameters(), lr=0.1)  # type: ignore[assignment]
    n = len(tapes)
    agree(lambda: critic, critic)
    assert len(tapes) == n, "the plan was lost by an attribute that nothing reads"
    critic.u0 = 2 * critic.u0  # type: ignore[operator]
    assert not torch.allclose(agree(lambda: critic, critic), before)


@pytest.mark.parametrize("critic_type", [ByAnyName, ByOwnName, ByLetterOfOptim], ids=lambda cls: cls.__name__)
def test_attributes_that_are_read_after_all(critic_type: Any, tapes: list[Tape]) -> None:
    critic = critic_type().double()
    never(lambda: critic, critic, tapes)
    critic.optim.param_groups[0]["lr"] = 0.7
    agree(lambda: critic, critic)


# ---- sizes by tensors ----


class Grouped(nn.Module):
    """The deviation within groups of samples beside the features, as in StyleGAN2; the size of a group is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.score, self.group_size = nn.Linear(5, 4), nn.Linear(8, 1, bias=False), 4
        self.register_buffer("size", torch.tensor(3))

    def groups(self, x: Tensor) -> Any:
        return torch.min(torch.as_tensor(self.group_size - 1), torch.as_tensor(len(x)))

    def forward(self, x: Tensor) -> Tensor:
        size = self.groups(x)
        h = self.layer(x).sin()
        spread = h.reshape(size, -1, 4).var(dim=0, correction=0).add(1e-8).sqrt()
        return self.score(torch.cat([h, spread.repeat(size, 1)], 1))  # type: ignore[no-any-return]


class GroupedByFactories(Grouped):
    def groups(self, x: Tensor) -> Any:
        return int(torch.arange(self.group_size).sum() / torch.full((), 2))


class GroupedByABuffer(Grouped):
    def groups(self, x: Tensor) -> Any:
        return torch.min(self.size, torch.as_tensor(len(x)))


class GroupedBySamples(Grouped):
    def groups(self, x: Tensor) -> Any:
        return int((x.detach().abs().sum() > -1).long() + torch.as_tensor(self.group_size - 2))


class GroupedByAChangedTensor(Grouped):
    def groups(self, x: Tensor) -> Any:
        size = torch.as_tensor(self.group_size)
        size.view(1).copy_(self.size.view(1))
        return size


class GroupedByAList(Grouped):
    def groups(self, x: Tensor) -> Any:
        return torch.tensor([self.size, 0])[0]


class GroupedByChance(Grouped):
    def groups(self, x: Tensor) -> Any:
        return torch.bernoulli(torch.full((), 0.5)).long() + torch.as_tensor(self.group_size - 2)


class ScaledByAList(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * torch.tensor([self.size, 1])[0]).sin().sum(1)


@pytest.mark.parametrize("critic_type", [Grouped, GroupedByFactories], ids=lambda cls: cls.__name__)
def test_a_size_by_tensors_of_numbers(critic_type: Any, tapes: list[Tape]) -> None:
    critic = critic_type().double()
    before = served(lambda: critic, critic, tapes)
    critic.group_size = 3
    assert not torch.allclose(agree(lambda: critic, critic), before, equal_nan=True)


@pytest.mark.parametrize(
    "critic_type",
    [GroupedByABuffer, GroupedBySamples, GroupedByAChangedTensor, GroupedByAList, GroupedByChance, ScaledByAList],
    ids=lambda cls: cls.__name__,
)
def test_numbers_of_tensors_that_may_change(critic_type: Any, tapes: list[Tape]) -> None:
    critic = critic_type().double()
    never(lambda: critic, critic, tapes)
    critic.size.fill_(2)
    agree(lambda: critic, critic)
