"""The group in other people's programs: other parametrizations, checkpoints, threads."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import lipgan
from lipgan.nn import _recomputation
from lipgan.ops.spectral_norm import autograd

X = torch.linspace(-1, 1, 6 * 8).reshape(6, 8).sin()


class Mask(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(weight.numel()).reshape(weight.shape) % 3 != 0).to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Mask(layer.weight))


def orthogonal(layer: nn.Module) -> None:
    parametrizations.orthogonal(layer)


def weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


PARAMETRIZATIONS: list[Callable[[nn.Module], object]] = [masked, orthogonal, lipgan.nn.orthogonal, weight_norm]


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


# ---- the vectors ----


def _contiguous(vector: Tensor) -> Tensor:
    return vector


def _with_gaps(vector: Tensor) -> Tensor:
    return torch.stack([vector, torch.zeros_like(vector)], 1)[:, 0]


@pytest.mark.parametrize("lay", [_contiguous, _with_gaps])
def test_vectors_move_on_however_they_lie(lay: Callable[[Tensor], Tensor]) -> None:
    single = two_layers()
    for layer in (single[0], single[2]):
        lipgan.spectral_norm(layer)
    model = copy.deepcopy(single)
    lipgan.group_spectral_norm(model)
    moved = [model[k].parametrizations.weight[0] for k in (0, 2)]  # type: ignore[index,union-attr]
    moved[1]._v = lay(moved[1]._v.clone())
    buffers = [buffer for module in moved for buffer in (module._u, module._v)]
    versions = [buffer._version for buffer in buffers]
    with lipgan.ops.use_backend("reference"):
        single(X)
    model(X)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, single.state_dict()[name], rtol=1e-5, atol=1e-6), name
    assert all(buffer._version > version for buffer, version in zip(buffers, versions, strict=True))


# ---- gradients in the memory of the normalized weights ----


def _once(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


def _two_forwards(model: nn.Module, x: Tensor) -> None:
    first, second = model(x), model(2 * x)
    first.sum().backward()
    second.pow(2).sum().backward()


def _loss_of_two_forwards(model: nn.Module, x: Tensor) -> None:
    (model(x).sum() + model(2 * x).pow(2).sum()).backward()


def _recomputed(model: nn.Module, x: Tensor) -> None:
    checkpoint(model, x.requires_grad_(), use_reentrant=True).sum().backward()


def _in_another_thread(model: nn.Module, x: Tensor) -> None:
    thread = threading.Thread(target=model(x).sum().backward)
    thread.start()
    thread.join()


def _with_a_penalty(model: nn.Module, x: Tensor) -> None:
    y = model(x.requires_grad_())
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (slope.pow(2).sum() + y.sum()).backward()


@pytest.mark.cpu
@pytest.mark.backend("native")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "train", [_once, _two_forwards, _loss_of_two_forwards, _recomputed, _in_another_thread, _with_a_penalty]
)
def test_group_holds_no_normalized_weight_that_its_gradient_could_take(
    train: Callable[[nn.Module, Tensor], None], tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[bool] = []

    def observed(ys: list[Tensor]) -> list[bool]:
        spent.extend(found(ys))
        return spent[-len(ys) :]

    found = autograd._spent
    monkeypatch.setattr(autograd, "_spent", observed)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3)]
    model = nn.Sequential(*layers).double().to(memory_format=torch.channels_last)
    if tied:
        model[4].weight = model[2].weight
    truth = copy.deepcopy(model)
    x = torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).reshape(2, 3, 8, 8).sin()
    for network, backend in ((truth, "reference"), (model, "native")):
        torch.manual_seed(1)  # for u and v
        lipgan.group_spectral_norm(network)
        with lipgan.ops.use_backend(backend):
            train(network, x.clone())
    for (name, parameter), expected in zip(model.named_parameters(), truth.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert torch.allclose(parameter.grad, expected.grad, rtol=1e-9, atol=1e-12), name
    assert spent
    assert all(spent)


# ---- weights with several parametrizations ----


@pytest.mark.parametrize("train", [False, True])
# All but a mask have to be the first of a list.
@pytest.mark.parametrize(("apply", "where"), [*((apply, "before") for apply in PARAMETRIZATIONS), (masked, "after")])
def test_group_normalizes_what_the_whole_list_would_give(
    apply: Callable[[nn.Module], object], where: str, train: bool
) -> None:
    single = two_layers()
    for layer in (single[0], single[2]):
        if where == "before":
            apply(layer)
        lipgan.spectral_norm(layer)
        if where == "after":
            apply(layer)
    model = copy.deepcopy(single)
    group = lipgan.group_spectral_norm(model)
    assert group.names == ["0", "2"]
    single.train(train)
    model.train(train)
    for _ in range(3):
        outputs = []
        for network in (single, model):
            network.zero_grad()
            outputs.append(network(X))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-6)
        for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
            assert ours.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(model.buffers(), single.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("apply", PARAMETRIZATIONS)
def test_group_of_a_model_that_is_parametrized_otherwise(apply: Callable[[nn.Module], object]) -> None:
    """As per layer: the numbers inside of a forward are those of ``layer.weight`` outside of it."""
    model = two_layers()
    for layer in (model[0], model[2]):
        apply(layer)
    single = copy.deepcopy(model)
    torch.manual_seed(1)
    for layer in (single[0], single[2]):
        lipgan.spectral_norm(layer)
    torch.manual_seed(1)
    lipgan.group_spectral_norm(model)
    torch.testing.assert_close(model(X), single(X), rtol=1e-6, atol=1e-6)
    model.eval()
    seen: list[Tensor] = []
    handle = model[2].register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.detach()))
    model(X)
    handle.remove()
    torch.testing.assert_close(seen[0], model[2].weight.detach(), rtol=1e-6, atol=1e-6)
    if apply is masked:
        assert not seen[0][model[2].parametrizations.weight[0].mask == 0].any()


def test_a_parametrization_that_comes_after_the_group() -> None:
    model = two_layers()
    lipgan.group_spectral_norm(model)
    single = copy.deepcopy(model)
    single._forward_pre_hooks.clear()
    single._forward_hooks.clear()
    for network in (single, model):
        masked(network[0])
        network.eval()
    torch.testing.assert_close(model(X), single(X), rtol=1e-6, atol=1e-6)


def test_the_members_of_a_list_run_once_per_forward() -> None:
    class Counting(Mask):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(weight)

    model = two_layers()
    counting = Counting(model[0].weight)
    parametrize.register_parametrization(model[0], "weight", counting)
    lipgan.group_spectral_norm(model)
    counting.calls = 0
    model(X)
    assert counting.calls == 1


@pytest.mark.parametrize(
    "by_hook",
    [lambda layer: torch.nn.utils.weight_norm(layer), lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3)],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_a_hook_makes_is_refused_and_nothing_changes(by_hook: Callable[[nn.Module], object]) -> None:
    model = two_layers()
    by_hook(model[2])
    keys = list(model.state_dict())
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"2\.weight is made by a hook of Linear"):
        lipgan.group_spectral_norm(model)
    assert list(model.state_dict()) == keys
    assert type(model[0]) is nn.Linear
    assert torch.equal(torch.get_rng_state(), generator)


# ---- torch.utils.checkpoint ----


class Blocks(nn.Module):
    """A model with parts that may be run again in the backward."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.first = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "plain":
            return self.last(self.second(self.first(x)))
        if self.mode == "parts":
            x = checkpoint(self.first, x, use_reentrant=False)
            return self.last(checkpoint(self.second, x, use_reentrant=False))
        if self.mode == "nested":
            return checkpoint(self._nested, x, use_reentrant=False)
        raise AssertionError(self.mode)

    def _nested(self, x: Tensor) -> Tensor:
        # What follows the inner part makes the outer one run it again too, not only its first layers.
        return self.last(checkpoint(self.second, self.first(x), use_reentrant=False))


def blocks(mode: str) -> Blocks:
    model = Blocks(mode)
    torch.manual_seed(1)
    lipgan.group_spectral_norm(model)
    return model


def gradients(model: nn.Module, loss: Tensor, x: Tensor) -> list[Tensor]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, [x, *wanted], materialize_grads=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_checkpoint_runs_again_with_the_weights_of_its_forward(train: bool, frozen: bool) -> None:
    """Two forwards before one backward: in training, each has weights of its own."""
    results = []
    for mode in ("plain", "parts"):
        model = blocks(mode).train(train).requires_grad_(not frozen)
        x = X.clone().requires_grad_()
        loss = model(x).mean() - model(-2 * x).square().mean()
        results.append([*gradients(model, loss, x), *model.buffers()])
    for ours, expected in zip(*reversed(results), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("train", [False, True])
def test_checkpoint_and_a_gradient_of_a_gradient(train: bool) -> None:
    results = []
    for mode in ("plain", "parts"):
        model = blocks(mode).train(train)
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        results.append(gradients(model, (gradient.norm(dim=1) - 1).square().mean(), x))
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("train", [False, True])
def test_checkpoint_within_a_checkpoint(train: bool) -> None:
    results = []
    for mode in ("plain", "nested"):
        model = blocks(mode).train(train)
        x = X.clone().requires_grad_()
        results.append([*gradients(model, model(x).mean(), x), *model.buffers()])
    for ours, expected in zip(*reversed(results), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.hardware  # an error of a hook, in the thread of a device that is written in Python, ends the process
def test_checkpoint_within_a_checkpoint_of_two_forwards_is_refused_where_the_weights_differ() -> None:
    model = blocks("nested")
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="cannot tell which of several forwards"):
        (model(x).mean() - model(-x).square().mean()).backward()


def test_checkpoint_around_the_whole_model() -> None:
    results = []
    for wrapped in (False, True):
        model = blocks("plain").eval()
        x = X.clone().requires_grad_()
        out = checkpoint(model, x, use_reentrant=False) if wrapped else model(x)
        results.append(gradients(model, out.mean(), x))
    for ours, expected in zip(*reversed(results), strict=True):
        assert torch.equal(ours, expected)


def test_nothing_is_kept_after_the_backward() -> None:
    model = blocks("parts")
    out = model(X.clone().requires_grad_())
    kept = [weakref.ref(weight) for weights in _recomputation._kept.values() for weight in weights.values()]
    assert len(kept) >= 3
    out.sum().backward()
    del out
    gc.collect()
    assert not any(reference() is not None for reference in kept)


# ---- threads and replicas ----


def test_threads_share_a_grouped_model() -> None:
    model = two_layers()
    lipgan.group_spectral_norm(model)
    model.eval()
    inputs = [X * (k + 1) for k in range(8)]
    alone = [model(x).square().sum() for x in inputs]
    expected = [torch.autograd.grad(loss, list(model.parameters())) for loss in alone]
    barrier = threading.Barrier(8)
    failures: list[BaseException] = []
    results: dict[int, list[tuple[Tensor, ...]]] = {k: [] for k in range(8)}

    def run(k: int) -> None:
        try:
            barrier.wait()
            for _ in range(20):
                loss = model(inputs[k]).square().sum()
                results[k].append(torch.autograd.grad(loss, list(model.parameters())))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    for k, grads in results.items():
        assert len(grads) == 20
        for row in grads:
            for ours, theirs in zip(row, expected[k], strict=True):
                assert torch.equal(ours, theirs)


def test_a_forward_in_another_thread_does_not_lend_its_weights() -> None:
    """While one thread is within a forward, ``layer.weight`` of another one is its own, with a graph of its own."""
    model = two_layers()
    lipgan.group_spectral_norm(model)
    model.eval()
    within, leave = threading.Event(), threading.Event()
    seen: list[Tensor] = []

    def pause(layer: nn.Module, args: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            seen.append(layer.weight)
            within.set()
            leave.wait(30)

    model[2].register_forward_pre_hook(pause)
    thread = threading.Thread(target=model, args=(X,))
    thread.start()
    assert within.wait(30)
    try:
        ours = model[2].weight
        assert ours is not seen[0]
        assert model(X).grad_fn is not None
        assert model[2].weight is not ours
    finally:
        leave.set()
        thread.join()


def test_replicas_of_data_parallel_normalize_their_own_weights() -> None:
    model = two_layers()
    lipgan.group_spectral_norm(model)
    model.eval()
    # What nn.parallel.replicate does to modules; the copies of the weights are double here, as if on another device.
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        copied = copy.deepcopy(child).double()
        replica._modules[name] = copied
        if parametrize.is_parametrized(copied):
            copied.parametrizations.weight.served = child.parametrizations.weight.served
    torch.testing.assert_close(replica(X.double()).float(), model(X), rtol=1e-6, atol=1e-6)
