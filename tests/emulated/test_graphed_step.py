"""`lipgan.graphed_critic_step` on the emulated device, whose graphs forbid and replay what CUDA graphs do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulated_device import DEVICE, DeviceTensor
from emulated_graph import EmulatedGraph
from penalty_critics import samples
from torch import Tensor, nn

import lipgan
from lipgan.penalties import UnsupportedCriticError, comparison, graphed_step, known, reader

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphed_step._GRAPHS, "emulated", EmulatedGraph)
    for module in (comparison, reader):
        monkeypatch.setattr(module, "TENSORS", {*known.TENSORS, DeviceTensor})
    EmulatedGraph.captures = EmulatedGraph.replays = 0


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def images() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.SiLU()),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 1)),
    )


def normalized() -> nn.Module:
    critic = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 1))
    for k in (0, 3):
        lipgan.spectral_norm(critic[k])
    return critic


CRITICS: dict[str, Callable[[], nn.Module]] = {"perceptron": perceptron, "images": images, "normalized": normalized}


def sgd(critic: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(critic.parameters(), 0.05, momentum=0.9)


# On a device Adam counts its steps in float32.
ADAM = 1e-7


def adam(critic: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(critic.parameters(), 1e-2, betas=(0.0, 0.9), capturable=True, foreach=False)


class Pair:
    """A critic on the device whose steps are graphs, and its double on the CPU whose steps are not."""

    def __init__(
        self,
        build: Callable[[], nn.Module] = perceptron,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
        loss: Any = "non-saturating",
        tolerance: float = 1e-11,
        **options: Any,
    ) -> None:
        self._tolerance = tolerance
        torch.manual_seed(0)
        theirs = build().double()
        ours = copy.deepcopy(theirs).to(DEVICE)
        self.critics = ours, theirs
        # The CPU has no form of capturable.
        self.optimizers = [optimizer(ours), optimizer(theirs)]
        for group in self.optimizers[1].param_groups:
            group.pop("capturable", None) and group.update(capturable=False)
        self.steps = [
            lipgan.graphed_critic_step(critic, owner, loss, **{"kind": "r1", **options})
            for critic, owner in zip(self.critics, self.optimizers, strict=True)
        ]
        self._calls = 0

    def step(self, batch: int = 4, **options: Any) -> list[Any]:
        """One step of both, which agree."""
        self._calls += 1
        real, fake = samples(batch, 3, 4, 4, seed=self._calls), samples(batch, 3, 4, 4, seed=100 + self._calls)
        outcomes = []
        for step, device in zip(self.steps, (DEVICE, "cpu"), strict=True):
            torch.manual_seed(self._calls)
            on = {name: [item.to(device) for item in items] for name, items in options.items()}
            outcomes.append(step(real.to(device), fake.to(device), **on))
        self.compare([[*outcome] for outcome in outcomes])
        self.compare([[*critic.state_dict().values()] for critic in self.critics])
        self.compare([[p.grad for p in critic.parameters() if p.grad is not None] for critic in self.critics])
        return outcomes

    def compare(self, both: list[list[Tensor]]) -> None:
        assert both[0]
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-9, atol=self._tolerance)

    def graphed(self) -> None:
        """To where steps are replayed."""
        for _ in range(5):
            self.step()
        assert (EmulatedGraph.captures, EmulatedGraph.replays) == (1, 2)


@pytest.mark.parametrize("kind", [None, "r1", "wgan-gp", "r1+r2", "dragan"])
@pytest.mark.parametrize("name", CRITICS)
def test_a_graph_is_the_step(name: str, kind: str | None) -> None:
    pair = Pair(CRITICS[name], loss="hinge" if kind == "r1" else "non-saturating", kind=kind)
    pair.graphed()


def test_adam_and_a_learning_rate_that_is_a_tensor() -> None:
    rates: list[Tensor] = []

    def optimizer(critic: nn.Module) -> torch.optim.Optimizer:
        rates.append(torch.tensor(1e-2, dtype=torch.float64).to(next(critic.parameters()).device))
        return torch.optim.Adam(critic.parameters(), rates[-1], betas=(0.0, 0.9), capturable=True, foreach=False)

    pair = Pair(optimizer=optimizer, tolerance=ADAM)
    pair.graphed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for rate in rates:
                rate.mul_(0.5)
            pair.step()
    assert EmulatedGraph.captures == 1


def test_a_learning_rate_that_is_a_number() -> None:
    pair = Pair(optimizer=adam, tolerance=ADAM)
    pair.graphed()
    for optimizer in pair.optimizers:
        optimizer.param_groups[0]["lr"] = 3e-3
    for _ in range(3):
        pair.step()
    with pytest.warns(UserWarning, match="settings have changed.*learning rate that is a tensor"):
        pair.step()
    pair.step()
    assert (EmulatedGraph.captures, EmulatedGraph.replays) == (2, 4)


def test_samples_of_other_shapes_and_arguments() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.embedding = nn.Linear(48, 3), nn.Embedding(5, 3)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return (F.silu(self.body(x.flatten(1))) * self.embedding(labels)).sum(1)

    pair = Pair(Conditional)
    for k in range(12):
        batch = 4 if k % 2 else 6
        pair.step(batch, critic_args=[torch.arange(batch) * (k + 1) % 5])
    assert EmulatedGraph.captures == 2


def test_what_a_step_returns_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    pair.graphed()
    (first, theirs), _ = pair.step(), pair.step()
    torch.testing.assert_close(first.total.cpu(), theirs.total)
    assert not first.total.requires_grad
    assert first.real_scores.shape == (4, 1)


def test_weights_that_are_changed_in_place_are_read() -> None:
    pair = Pair(normalized)
    pair.graphed()
    states = [copy.deepcopy(critic.state_dict()) for critic in pair.critics]
    pair.step()
    for critic, state in zip(pair.critics, states, strict=True):
        critic.load_state_dict(state)
    pair.step()
    assert EmulatedGraph.captures == 1


def _eval(critic: Any, optimizer: Any) -> None:
    critic.eval()


def _layer(critic: Any, optimizer: Any) -> None:
    critic[1] = nn.Tanh()


def _moved(critic: Any, optimizer: Any) -> None:
    weight = critic[3].parametrizations.weight.original
    if isinstance(weight, DeviceTensor):
        weight.inner = weight.inner.clone()


def _state(critic: Any, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _frozen(critic: Any, optimizer: Any) -> None:
    critic[0].bias.requires_grad_(False)


@pytest.mark.parametrize("change", [_eval, _layer, _moved, _state, _frozen])
def test_another_step_is_captured_anew(change: Callable[[Any, Any], None]) -> None:
    pair = Pair(normalized)
    pair.graphed()
    for critic, optimizer in zip(pair.critics, pair.optimizers, strict=True):
        change(critic, optimizer)
    for _ in range(5):
        pair.step()
    assert (EmulatedGraph.captures, EmulatedGraph.replays) == (2, 4)


def test_a_group_of_spectral_norms_tells_its_norms() -> None:
    def grouped() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.SiLU(), nn.Linear(8, 1))

    groups = []
    pair = Pair(grouped)
    for critic in pair.critics:
        torch.manual_seed(2)
        groups.append(lipgan.group_spectral_norm(critic))
    # On the device the vectors were drawn there.
    pair.critics[0].load_state_dict({name: t.to(DEVICE) for name, t in pair.critics[1].state_dict().items()})
    for k, critic in enumerate(pair.critics):
        pair.optimizers[k] = sgd(critic)
        pair.steps[k] = lipgan.graphed_critic_step(critic, pair.optimizers[k], "hinge", kind="r1")
    pair.graphed()
    pair.step()
    ours, theirs = (group.sigmas() for group in groups)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_autograd_knows_that_weights_have_changed() -> None:
    pair = Pair()
    pair.graphed()
    scores = pair.critics[0](samples(4, 3, 4, 4).to(DEVICE).requires_grad_())
    pair.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_only_a_few_graphs_are_kept() -> None:
    pair = Pair(warmup=1)
    for batch in (2, 3, 4, 5, 6):
        for _ in range(3):
            pair.step(batch)
    assert EmulatedGraph.captures == 5
    assert len(pair.steps[0]._captured) == 4
    pair.step(6)
    assert EmulatedGraph.captures == 5


# ---- what a graph would do once, and never again ----


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x.flatten(1))
        return h * 2 if h.sum().item() > 0 else h


class Copying(Asking):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x + x.detach().to("cpu").to(x.device)).flatten(1))


def test_critics_and_losses_that_may_do_otherwise() -> None:
    count = [0]

    def counting(real: Tensor, fake: Tensor) -> Tensor:
        count[0] += 1
        return (fake - real).mean() * count[0]

    for options, reason in (({"build": Asking}, "reads item"), ({"loss": counting}, "count in .* may be changed")):
        pair = Pair(**options)  # type: ignore[arg-type]
        count[0] = 0
        x = samples(4, 3, 4, 4).to(DEVICE)
        for _ in range(3):
            pair.steps[0](x, x + 1)
        with pytest.raises(UnsupportedCriticError, match=f"the step cannot be captured: .*{reason}; call critic_loss"):
            pair.steps[0](x, x + 1)


def test_a_loss_that_is_a_function() -> None:
    def logistic(real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    Pair(loss=logistic).graphed()


def test_a_copy_from_the_host_is_refused_and_the_critic_stays_as_it_was() -> None:
    pair = Pair(Copying)
    for _ in range(3):
        pair.step()
    before = [p.detach().clone() for p in pair.critics[0].parameters()]
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        pair.step()
    for p, old in zip(pair.critics[0].parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None


def test_optimizers_and_generators() -> None:
    x = samples(4, 3, 4, 4).to(DEVICE)
    critic = perceptron().double().to(DEVICE)
    parameters = [*critic.parameters()]

    def refused(message: str, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            lipgan.graphed_critic_step(critic, optimizer, "hinge", **options)(x, x)

    refused(r"capturable on a GPU, got Adam that is not; use Adam\(..., capt", torch.optim.Adam(parameters))
    refused("capturable on a GPU, got Adagrad that is not; use one that", torch.optim.Adagrad(parameters))
    optimizer = sgd(critic)
    refused("generator must be on emulated, as the samples are, got cpu", optimizer, generator=torch.Generator())
    handle = optimizer.register_step_post_hook(lambda *_: None)
    refused("optimizer must have no hooks, .* got SGD with hooks", optimizer)
    handle.remove()
    parameters[0].register_post_accumulate_grad_hook(lambda _: None)
    refused("parameters without hooks", optimizer)


def test_bad_arguments() -> None:
    critic = perceptron()
    optimizer = sgd(critic)

    def refused(error: type[Exception], message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=message):
            lipgan.graphed_critic_step(*args, **options)

    refused(TypeError, "critic must be a module .*, got function", lambda x: x, optimizer, "hinge")
    refused(TypeError, "optimizer must be a torch.optim.Optimizer, got list", critic, [], "hinge")
    refused(TypeError, "loss must be a name .*, got 3", critic, optimizer, 3)
    refused(TypeError, "compile must be a bool, got 'cudagraph'", critic, optimizer, "hinge", compile="cudagraph")
    refused(ValueError, "warmup must be at least 1, got 0", critic, optimizer, "hinge", warmup=0)
    step = lipgan.graphed_critic_step(critic, optimizer, "hinge", kind="r3")
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'r3'"):
        step(samples(2, 48), samples(2, 48))
    step = lipgan.graphed_critic_step(critic, optimizer, "hinge")
    with pytest.raises(TypeError, match="real must be a tensor, got str"):
        step("x", samples(2, 48))  # type: ignore[arg-type]
