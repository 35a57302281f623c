"""Plans: when they are made, when they hold, and that they compute what a fresh recording computes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from penalty_critics import Conditional, draws, grads_of, samples
from torch import Tensor, nn

import lipgan
from lipgan.penalties import plans
from lipgan.penalties.critic_call import CriticCall
from lipgan.penalties.perceptron import recognize
from lipgan.penalties.tape import Tape

# A plan stands for plain tensors; those of a device that is written in Python are of a class of their own.
pytestmark = pytest.mark.hardware

FLAT, IMAGES = samples(6, 5), samples(6, 3, 8, 8)


class Wrapped(nn.Module):
    """A critic with a constant among its attributes, and a method of its own."""

    def __init__(self, *layers: nn.Module, slope: float = 0.3) -> None:
        super().__init__()
        self.body, self.slope = nn.Sequential(*layers), slope

    def bent(self, h: Tensor) -> Tensor:
        return F.leaky_relu(h, self.slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.bent(self.body(x)).square().flatten(1).sum(1)


def smooth() -> nn.Module:
    torch.manual_seed(1)
    return Wrapped(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def step(critic: nn.Module, x: Tensor, engine: str, *, seed: int = 0, **options: Any) -> list[Tensor]:
    """Penalty, gradients, buffers and random state of one call."""
    torch.manual_seed(seed)
    penalty = lipgan.gradient_penalty(critic, x, engine=engine, **{"kind": "r1", **options})
    grads = grads_of(penalty, critic)
    return [penalty.detach(), *grads, *(buffer.clone() for buffer in critic.buffers()), torch.get_rng_state()]


def agree(critic: nn.Module, x: Tensor, *, seed: int = 0, **options: Any) -> None:
    """The fused engine and a copy of the critic by autograd."""
    other = copy.deepcopy(critic)
    ours, theirs = step(critic, x, "fused", seed=seed, **options), step(other, x, "autograd", seed=seed, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def planned(critic: nn.Module, x: Tensor, tapes: list[Tape], **options: Any) -> None:
    """Bring a critic to where a plan serves it: after two calls."""
    for seed in range(2):
        agree(critic, x, seed=seed, **options)
    before = len(tapes)
    agree(critic, x, seed=2, **options)
    assert len(tapes) == before, "the tape was run, where a plan was expected"


class Curved(nn.Module):
    """Operations that only autograd differentiates, views that are written to, and a tensor of Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sin() * torch.tensor(1.5, dtype=x.dtype)
        h[:, 0] = h[:, 1] * 2
        return self.last(h.softmax(1) + torch.cat([h[:, 3:], h[:, :3]], 1))


def attention() -> nn.Module:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
    return Wrapped(nn.Unflatten(1, (5, 8)), layer, nn.Flatten(), nn.Linear(40, 2))


CRITICS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "smooth": (smooth, FLAT),
    "curved": (Curved, FLAT),
    "attention": (attention, samples(4, 40)),
    "batch norm": (
        lambda: Wrapped(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 2, 4)),
        IMAGES,
    ),
    "group norm": (lambda: Wrapped(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 6)), IMAGES),
    "dropout": (lambda: Wrapped(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 4)), FLAT),
    "in place": (
        lambda: Wrapped(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 1, 3)),
        IMAGES,
    ),
    "shared": (lambda: Wrapped(*[nn.Linear(5, 5), nn.Tanh()] * 2), FLAT),
}


@pytest.mark.parametrize("kind", ["r1", "wgan-gp", "r1+r2"])
@pytest.mark.parametrize("name", CRITICS)
def test_a_plan_computes_what_autograd_does(name: str, kind: str, tapes: list[Tape]) -> None:
    build, x = CRITICS[name]
    torch.manual_seed(3)
    critic = build().double()
    options: dict[str, Any] = {"kind": kind}
    if kind != "r1":
        options["fake"] = x.flip(0) + 1
    if kind == "wgan-gp":
        for seed in range(5):
            other = copy.deepcopy(critic)
            ours = step(critic, x, "fused", seed=seed, generator=draws(), **options)
            theirs = step(other, x, "autograd", seed=seed, generator=draws(), **options)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert len(tapes) == 2
    elif kind == "r1+r2" and name == "batch norm":  # coupled: two batches of one key
        for seed in range(4):
            agree(critic, x, seed=seed, **options)
        assert len(tapes) == 3  # the first of which found that they are coupled
    else:
        planned(critic, x, tapes, **options)


@pytest.mark.cpu
@pytest.mark.parametrize("name", CRITICS)
def test_a_plan_has_the_bits_of_the_tape(name: str, tapes: list[Tape]) -> None:
    build, x = CRITICS[name]
    torch.manual_seed(3)
    critic = build().float().eval()  # buffers stay
    runs = [step(critic, x.float(), "fused") for _ in range(3)]
    assert len(tapes) == 2
    for ours, tapes_own in zip(runs[2], runs[0], strict=True):
        assert torch.equal(ours, tapes_own)


@pytest.mark.parametrize("kind", [None, "r1", "r2", "r1+r2", "wgan-gp"])
def test_a_loss_comes_along(kind: str | None, tapes: list[Tape]) -> None:
    critic = smooth()
    for seed in range(4):
        other = copy.deepcopy(critic)
        outcomes = []
        for module, engine in ((critic, "fused"), (other, "autograd")):
            result = lipgan.critic_loss(
                *(module, FLAT, FLAT.flip(1), "non-saturating"), kind=kind, engine=engine, generator=draws(seed)
            )
            outcomes.append([*map(Tensor.detach, result), *grads_of(result.total, module)])
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert len(tapes) == (0 if kind is None else 2)


def test_arguments_of_the_critic(tapes: list[Tape]) -> None:
    critic = Conditional().double()
    labels, shared = torch.tensor([0, 1, 2, 0, 1, 2]), samples(6)
    planned(critic, FLAT, tapes, critic_args=(labels, shared, 0.5))
    before = len(tapes)
    agree(critic, FLAT, critic_args=(labels.flip(0), shared + 1, 0.5))
    assert len(tapes) == before
    agree(critic, FLAT, critic_args=(labels, shared, 0.25))
    assert len(tapes) == before + 1


def test_values_alone(tapes: list[Tape]) -> None:
    critic = smooth()
    for _ in range(4):
        with torch.no_grad():
            value = lipgan.gradient_penalty(critic, FLAT, kind="r1", engine="fused")
        assert not value.requires_grad
        torch.testing.assert_close(value, lipgan.gradient_penalty(critic, FLAT, kind="r1", engine="autograd").detach())
    assert len(tapes) == 2


# ---- a critic that changes ----


def _swap(critic: Any) -> None:
    critic.body[1] = nn.Sigmoid()


def _constant(critic: Any) -> None:
    critic.slope = 0.7


def _layers_constant(critic: Any) -> None:
    critic.body[1] = nn.Softplus(beta=2.0).double()


def _hook(critic: Any) -> None:
    critic.body[0].register_forward_hook(lambda module, args, out: out * 3)


def _global_hook(critic: Any) -> None:
    critic.body[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _parametrization(critic: Any) -> None:
    nn.utils.parametrizations.weight_norm(critic.body[0])


def _forward(critic: Any) -> None:
    critic.body[1].forward = torch.cos


def _method(critic: Any) -> None:
    critic.bent = lambda h: h * 3


def _freeze(critic: Any) -> None:
    critic.body[0].weight.requires_grad_(False)


def _replaced(critic: Any) -> None:
    critic.body[0].weight = nn.Parameter(critic.body[0].weight.detach() * 2)


def _wider(critic: Any) -> None:
    critic.body[0], critic.body[2] = nn.Linear(5, 7).double(), nn.Linear(7, 4).double()


def _in_place(critic: Any) -> None:
    with torch.no_grad():
        critic.body[0].weight.mul_(0.5)


def _tied(critic: Any) -> None:
    critic.body[2] = nn.Linear(6, 6).double()
    critic.body.append(critic.body[2])


def _strides(critic: Any) -> None:
    critic.body[0].weight.data = critic.body[0].weight.detach().t().contiguous().t()


def _no_bias(critic: Any) -> None:
    critic.body[2].bias = None


CHANGES = [_swap, _constant, _layers_constant, _hook, _global_hook, _parametrization, _forward, _method, _freeze]
CHANGES += [_replaced, _wider, _in_place, _tied, _strides, _no_bias]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_critic_that_changes_gets_new_numbers(change: Callable[[Any], None], tapes: list[Tape]) -> None:
    critic = smooth()
    planned(critic, FLAT, tapes)
    before = step(critic, FLAT, "fused")[0]
    change(critic)
    for seed in range(5):
        agree(critic, FLAT, seed=seed)
    assert not torch.equal(before, step(critic, FLAT, "fused")[0]) or change in (
        _freeze,
        _no_bias,
        _strides,
        _parametrization,
    )


def test_another_dtype_mode_and_batch(tapes: list[Tape]) -> None:
    torch.manual_seed(4)
    critic = Wrapped(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4)).double()
    planned(critic, FLAT, tapes)
    critic.eval()
    for _ in range(4):
        agree(critic, FLAT)
    critic.train()
    agree(critic, FLAT)
    agree(critic, FLAT[:4])
    agree(critic, FLAT.t().contiguous().t())
    critic.float()
    single = step(critic, FLAT.float(), "fused")[0]
    assert single.dtype == torch.float32
    agree(critic.double(), FLAT)


@pytest.mark.parametrize("kind", ["r1", "r2"])
def test_the_form_of_the_penalty(kind: str, tapes: list[Tape]) -> None:
    critic = smooth()
    planned(critic, FLAT, tapes, fake=FLAT, kind=kind, weight=2.0)
    agree(critic, FLAT, fake=FLAT, kind=kind, weight=3.0)
    agree(critic, FLAT, fake=FLAT + 1, kind=kind, weight=2.0)


def test_autocast_and_the_default_dtype(tapes: list[Tape]) -> None:
    critic = smooth().float()
    x = FLAT.float()
    for _ in range(3):
        plain = step(critic, x, "fused")[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = step(critic, x, "fused")[0]
        theirs = step(critic, x, "autograd")[0]
    assert not torch.equal(plain, half)
    torch.testing.assert_close(half, theirs, rtol=0.05, atol=0.0)
    assert torch.equal(step(critic, x, "fused")[0], plain)


@pytest.mark.cpu
@pytest.mark.parametrize("name", CRITICS)
def test_under_autocast_a_plan_has_the_bits_of_the_tape(name: str, tapes: list[Tape]) -> None:
    build, x = CRITICS[name]
    torch.manual_seed(3)
    critic = build().float().eval()
    plain = step(critic, x.float(), "fused")
    for k in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            critic(x.float())  # which leaves its casts of the weights behind
            tapes.clear()
            ours = step(critic, x.float(), "fused")
            assert len(tapes) == (k < 2)
            tapes_own = step(copy.deepcopy(critic), x.float(), "fused")
        for one, other in zip(ours, tapes_own, strict=True):
            assert torch.equal(one, other)
        if k == 0:
            assert not torch.equal(ours[0], plain[0])
        with torch.no_grad():
            for p in critic.parameters():
                p.mul_(2.0)


@pytest.mark.parametrize("kind", ["r1", "r1+r2", "wgan-gp"])
def test_a_loss_under_autocast(kind: str, tapes: list[Tape]) -> None:
    critic, x = smooth().float(), FLAT.float()

    def run(critic: nn.Module) -> list[Tensor]:
        seen = []

        def loss(real: Tensor, fake: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return F.softplus(-real).mean() + F.softplus(fake).mean()

        with torch.autocast("cpu", torch.bfloat16):
            result = lipgan.critic_loss(critic, x, x.flip(1), loss, kind=kind, engine="fused", generator=draws())
        assert seen == [True] * len(seen), "the loss runs where the program has put it"
        return [*map(Tensor.detach, result), *grads_of(result.total, critic)]

    runs = [run(critic) for _ in range(4)]
    assert len(tapes) == 2
    for ours, tapes_own in zip(runs[3], runs[0], strict=True):
        assert torch.equal(ours, tapes_own)


def test_autocast_of_another_dtype_has_another_plan(tapes: list[Tape]) -> None:
    critic, x = smooth().float(), FLAT.float()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            step(critic, x, "fused")
    assert len(tapes) == 2
    with torch.autocast("cpu", torch.float16):  # runs in float32
        torch.testing.assert_close(step(critic, x, "fused")[0], step(critic, x, "autograd")[0])
    assert len(tapes) == 3


# ---- critics whose code may do otherwise at another call ----

COUNT = 0
SCALES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
FACTOR = 1.0


class Refused(nn.Module):
    """A critic of which no plan may be made, or only one that holds for a while."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer, self.calls, self.seen = nn.Linear(5, 3), 0, []  # type: ignore[var-annotated]

    def score(self, x: Tensor, factor: Any = 1.0) -> Tensor:
        return (self.layer(x) * factor).sin().sum(1)


class Counting(Refused):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.score(x, self.calls)


class Appending(Refused):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape)
        return self.score(x, len(self.seen))


class ByValue(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, 1.0) if x.sum() > 0 else self.score(x, -2.0).square()


class ByItem(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, x.detach().abs().max().item())


class ByNumpy(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, float(x.detach().numpy().sum()))


class ByGlobal(Refused):
    def forward(self, x: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return self.score(x, COUNT)


class ByList(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, SCALES.pop())


class ByMask(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, x[x > 0].sum())


class ByData(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, x.data.sum())


def counter() -> Callable[[], int]:
    count = 0

    def call() -> int:
        nonlocal count
        count += 1
        return count

    return call


class ByClosure(Refused):
    def __init__(self) -> None:
        super().__init__()
        self.count = counter()

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, self.count())


class Shrinking(Refused):
    """Changes its weight in place, of which a second run would make another one."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight[0].mul_(0.9)
        return self.score(x)


class ShrinkingLater(Refused):
    """The same, after an operation that refuses the recording by itself."""

    def forward(self, x: Tensor) -> Tensor:
        factor = 1.0 if x.is_same_size(x) else 2.0
        with torch.no_grad():
            self.layer.weight[0].mul_(0.9)
        return self.score(x, factor)


@pytest.mark.parametrize("critic_type", [Shrinking, ShrinkingLater])
def test_weights_that_the_critic_changes_are_changed_once_a_call(critic_type: Any, tapes: list[Tape]) -> None:
    critic = critic_type().double()
    other = copy.deepcopy(critic)
    for k in range(1, 6):
        ours, theirs = step(critic, FLAT, "fused"), step(other, FLAT, "autograd")
        for a, b in zip((*ours, critic.layer.weight), (*theirs, other.layer.weight), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert len(tapes) == k


def within() -> Callable[[Tensor], Tensor]:
    import torch as module

    return lambda x: module.Tensor(x) if module.is_warn_always_enabled() else x.sin()


class ByModuleInClosure(Refused):
    def __init__(self) -> None:
        super().__init__()
        self.bent = within()

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.bent(x))


class BySettingOfTheProcess(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, torch.get_num_threads())


class ByConstantInGlobals(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, FACTOR)


REFUSED = [Counting, Appending, ByValue, ByItem, ByNumpy, ByGlobal, ByList, ByMask, ByData, ByClosure]
REFUSED += [ByModuleInClosure, BySettingOfTheProcess]


@pytest.mark.parametrize("critic_type", REFUSED, ids=lambda cls: cls.__name__)
def test_code_that_may_do_otherwise_is_run_every_time(critic_type: Any, tapes: list[Tape]) -> None:
    SCALES[:] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    critic = critic_type().double()
    for k in range(1, 6):
        x = FLAT * (-1) ** k + k  # another value, sign and mask
        penalty = lipgan.gradient_penalty(critic, x, kind="r1", engine="fused")
        assert len(tapes) == k
        assert penalty.requires_grad


def test_a_constant_of_the_module_is_compared(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    critic = ByConstantInGlobals().double()
    planned(critic, FLAT, tapes)
    before = len(tapes)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    agree(critic, FLAT)
    assert len(tapes) == before + 1


class ByClass(Refused):
    power = 2

    @property
    def sign(self) -> int:
        return -1

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * self.score(x).pow(self.power)


def _power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByClass, "power", 3)


def _inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Refused, "score", lambda self, x: self.layer(x).cos().sum(1))


def _property(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByClass, "sign", property(lambda self: 2))


def _of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByClass, "forward", lambda self, x: F.silu(self.layer(x)).sum(1))


@pytest.mark.parametrize("change", [_power, _inherited, _property, _of_torch], ids=lambda change: change.__name__)
def test_what_a_class_has_is_compared(
    change: Callable[[pytest.MonkeyPatch], None], tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = ByClass().double()
    planned(critic, FLAT, tapes)
    before = len(tapes)
    change(monkeypatch)
    agree(critic, FLAT)
    assert len(tapes) == before + 1


def test_a_function_of_torch_that_is_replaced(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    critic = smooth()
    planned(critic, FLAT, tapes)
    monkeypatch.setattr(F, "leaky_relu", lambda h, slope: h.exp())
    agree(critic, FLAT)


def test_a_class_that_changes(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    critic = smooth()
    planned(critic, FLAT, tapes)
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: torch.sin(x))
    agree(critic, FLAT)


# ---- perceptrons ----


class Pack(nn.Module):
    """As CTGAN's discriminator, which judges packs of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(30, 8), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x.view(-1, 30))  # type: ignore[no-any-return]


class Functional(nn.Module):
    """A perceptron without modules for what has no weights."""

    def __init__(self, slope: float = 0.1, factor: float | None = None, skip: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 1)
        self.slope, self.factor, self.skip = slope, factor, skip

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.a(x), self.slope)
        h = F.relu(self.b(h)) + (h if self.skip else 0) if self.skip else F.relu(self.b(h), inplace=True)
        h = F.dropout(h, 0.25, self.training)
        scores = self.c(h).squeeze(1)
        return scores if self.factor is None else scores * self.factor


def chain(*activations: nn.Module) -> nn.Module:
    """Linear layers with activations, and other modules, between them."""
    return nn.Sequential(nn.Linear(5, 6), *[m for a in activations for m in (a, nn.Linear(6, 6))], nn.Linear(6, 1))


class FusedDropout(nn.Module):
    """Dropout as a GPU has it, one operation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, 0.3, self.training)[0]


def frozen() -> nn.Module:
    critic = chain(nn.Tanh(), nn.ReLU())
    critic[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    critic[2].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    return critic


PERCEPTRONS: dict[str, tuple[Callable[[], nn.Module], Tensor, bool]] = {
    "in a module": (lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 3), nn.ReLU()), nn.Linear(3, 1)), FLAT, True),
    "packs": (Pack, samples(4, 3, 10), True),
    "functional": (Functional, FLAT, True),
    "of lipgan.models": (lambda: lipgan.models.MLPCritic((2,), width=8), samples(6, 2), True),
    "linear": (lambda: nn.Linear(5, 1), FLAT, True),
    "a factor": (lambda: Functional(factor=2.0), FLAT, False),
    "a skip": (lambda: Functional(skip=True), FLAT, False),
    "a slope below zero": (lambda: Functional(slope=-0.5), FLAT, False),
    "an activation at the end": (lambda: nn.Sequential(nn.Linear(5, 1), nn.ReLU()), FLAT, False),
    "several scores": (lambda: nn.Linear(5, 2), FLAT, False),
    "rows": (lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)), FLAT, False),
    "smooth": (smooth, FLAT, False),
    "tanh and sigmoid": (lambda: chain(nn.Tanh(), nn.LeakyReLU(0.1), nn.Sigmoid()), FLAT, True),
    "softplus and dropout": (lambda: chain(nn.Softplus(2.0, 3.0), nn.Dropout(0.5), nn.Softplus()), FLAT, True),
    "fused dropout": (lambda: chain(nn.Sequential(nn.ReLU(), FusedDropout()), nn.Tanh(), FusedDropout()), FLAT, True),
    "silu and gelu": (lambda: chain(nn.SiLU(inplace=True), nn.GELU(), nn.GELU("tanh")), FLAT, True),
    "elu and its like": (lambda: chain(nn.ELU(0.7), nn.SELU(), nn.CELU(0.5)), FLAT, True),
    "smooth, partly frozen": (frozen, FLAT, True),
    "softplus with a factor below zero": (lambda: chain(nn.Softplus(-1.0)), FLAT, False),
    "mish": (lambda: chain(nn.Mish()), FLAT, False),
    "weights twice": (lambda: nn.Sequential(*[nn.Linear(5, 5), nn.ReLU()] * 2, nn.Linear(5, 1)), FLAT, True),
}


@pytest.mark.parametrize("name", PERCEPTRONS)
def test_perceptrons_are_recognized(name: str, tapes: list[Tape]) -> None:
    build, x, expected = PERCEPTRONS[name]
    torch.manual_seed(6)
    critic = build().double()
    for seed in range(3):
        agree(critic, x, seed=seed)
    assert (len(tapes) == 0) == expected
    recognized = recognize(CriticCall(critic, (), None), x)
    assert (recognized is not None) == expected


def test_a_perceptron_that_is_one_no_more(tapes: list[Tape]) -> None:
    critic = Functional().double()
    agree(critic, FLAT)
    critic.skip = True
    agree(critic, FLAT)
    assert len(tapes) == 1
    critic.skip, critic.slope = False, 0.7
    agree(critic, FLAT)
    critic.eval()
    agree(critic, FLAT)
    critic.train()
    critic.a.register_forward_hook(lambda module, args, out: out * 2)
    agree(critic, FLAT)


# ---- what is held ----


def test_a_plan_goes_with_its_critic(tapes: list[Tape]) -> None:
    critic = smooth()
    planned(critic, FLAT, tapes)
    gone = [weakref.ref(critic), *map(weakref.ref, critic.parameters())]
    del critic
    tapes.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


def test_a_plan_holds_no_tensors(tapes: list[Tape]) -> None:
    critic = smooth()
    lipgan.gradient_penalty(critic, FLAT, kind="r1", engine="fused")
    tapes.clear()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    before = tensors()
    for _ in range(3):
        lipgan.gradient_penalty(critic, FLAT, kind="r1", engine="fused")
        tapes.clear()
        assert tensors() == before


# ---- the comparison with the tape ----


def test_a_wrong_plan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    critic = smooth()
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", "1")
    agree(critic, FLAT)
    real = plans.Plan.run

    def wrong(self: Any, *args: Any) -> Any:
        value, penalty, parameters, grads = real(self, *args)
        return value, penalty, parameters, [grads[0] * 1.001, *grads[1:]]

    monkeypatch.setattr(plans.Plan, "run", wrong)
    with pytest.raises(RuntimeError, match="gradient of the parameter of shape"):
        step(critic, FLAT, "fused")
