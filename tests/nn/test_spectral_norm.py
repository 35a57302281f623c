"""The layers: parity with PyTorch's parametrization, and the pains that its users report."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
from processes import leave, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lipgan
from lipgan.nn import (
    SNConv1d,
    SNConv2d,
    SNConv3d,
    SNConvTranspose1d,
    SNConvTranspose2d,
    SNConvTranspose3d,
    SNEmbedding,
    SNLinear,
)

LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(6, 4),
    lambda: nn.Conv1d(3, 4, 3),
    lambda: nn.Conv2d(3, 4, 3),
    lambda: nn.Conv3d(2, 3, 2),
    lambda: nn.ConvTranspose1d(3, 4, 3),
    lambda: nn.ConvTranspose2d(3, 4, 3),
    lambda: nn.ConvTranspose3d(2, 3, 2),
    lambda: nn.Embedding(7, 3),
    lambda: nn.LayerNorm(5),  # a weight of one dimension
]


def critic() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(8, 6, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(6 * 64, 1),
    )


def normalized(apply: Callable[[nn.Module], object]) -> nn.Sequential:
    model = critic()
    torch.manual_seed(2)
    for layer in model:
        if hasattr(layer, "weight"):
            apply(layer)
    return model


def original(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original


X = torch.linspace(-1, 1, 4 * 3 * 16).reshape(4, 3, 4, 4).sin()


def assert_close(ours: Tensor, theirs: Tensor, amplification: float = 1.0) -> None:
    """Float32 results of sums that may cancel: relative to the largest entry, of which PyTorch's own error takes up to
    2e-6 here (measured against float64; lipgan's 5e-7)."""
    scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=4e-6 * (1 + scale) * amplification)


def amplification_of(layer: nn.Module) -> float:
    """How much of the roundings in u and v adds up: an iteration leaves ``(s_2 / s_1)^2`` of the one before."""
    weight = original(layer).detach()
    if weight.ndim < 2:
        return 1.0
    s = torch.linalg.svdvals(weight.movedim(layer.parametrizations.weight[0].dim, 0).flatten(1))
    return float(1 / (1 - (s[1] / s[0]) ** 2))


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_same_numbers_as_torch_for_one_seed(make: Callable[[], nn.Module], iterations: int) -> None:
    ours, theirs = make(), make()
    ours.load_state_dict(theirs.state_dict())
    for apply, layer in ((lipgan.spectral_norm, ours), (parametrizations.spectral_norm, theirs)):
        torch.manual_seed(3)
        assert apply(layer, n_power_iterations=iterations) is layer
    assert type(ours).__name__ == type(theirs).__name__
    amplification = amplification_of(ours)
    for step in range(5):
        if step == 3:
            ours.eval()
            theirs.eval()
        assert_close(ours.weight, theirs.weight, amplification)
        for weight, layer in ((ours.weight, ours), (theirs.weight, theirs)):
            weight.square().sum().backward()
            with torch.no_grad():
                # Small: a step that overshoots would magnify the last places of either side.
                original(layer).sub_(0.001 * original(layer).grad)
        assert_close(original(ours).grad, original(theirs).grad, amplification)
        for layer in (ours, theirs):
            layer.zero_grad()
        for (key, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert key == other
            assert_close(a, b, amplification)


def test_generator_is_left_where_torch_leaves_it() -> None:
    torch.manual_seed(0)
    lipgan.spectral_norm(nn.Linear(6, 4))
    ours = torch.rand(3)
    torch.manual_seed(0)
    parametrizations.spectral_norm(nn.Linear(6, 4))
    assert torch.equal(ours, torch.rand(3))


@pytest.mark.parametrize(("name", "dim"), [("weight", 0), ("weight", 1), ("weight", -1), ("bias", 0), ("bias", -1)])
def test_name_and_dim(name: str, dim: int) -> None:
    layer = lipgan.spectral_norm(nn.Linear(6, 4), name=name, dim=dim)
    value = getattr(layer, name)
    if name == "bias":
        assert abs(float(value.detach().norm()) - 1) < 1e-6
    else:
        assert layer.parametrizations.weight[0]._u.shape == ((4,) if dim == 0 else (6,))


def test_state_dicts_load_both_ways() -> None:
    ours, theirs = normalized(lipgan.spectral_norm), normalized(parametrizations.spectral_norm)
    theirs(X)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours.eval()(X), theirs.eval()(X))
    ours.train()(X)
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours.eval()(X), theirs.eval()(X))


@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_of_torchs_hook_loads(nested: bool) -> None:
    hooked = normalized(torch.nn.utils.spectral_norm)
    ours = normalized(lipgan.spectral_norm)
    hooked(X)
    if nested:
        hooked, ours = nn.ModuleDict({"critic": hooked}), nn.ModuleDict({"critic": ours})
    state = hooked.state_dict()
    keys = list(state)
    assert any(key.endswith("weight_orig") for key in keys)
    ours.load_state_dict(state)
    assert list(state) == keys, "the caller's dictionary was changed"
    ours, hooked = (model["critic"] if nested else model for model in (ours, hooked))
    assert_close(ours.eval()(X), hooked.eval()(X))


def test_remove_parametrizations_and_assignment() -> None:
    layer = lipgan.spectral_norm(nn.Linear(6, 4))
    value = torch.randn(4, 6)
    layer.weight = value
    assert torch.equal(original(layer), value)
    layer.eval()
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, weight)


def test_two_forwards_before_one_backward() -> None:
    """D(real) - D(fake): the second forward must not disturb what the first one saved."""
    grads = []
    for apply in (lipgan.spectral_norm, parametrizations.spectral_norm):
        model = normalized(apply)
        (model(X).mean() - model(-X).square().mean()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs)


def test_buffers_overwritten_between_forward_and_backward() -> None:
    """DDP broadcasts buffers before every forward."""
    model = normalized(lipgan.spectral_norm)
    reference = copy.deepcopy(model)
    reference(X).sum().backward()
    out = model(X)
    for buffer in model.buffers():
        buffer.fill_(7.0)
    out.sum().backward()
    for ours, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_optimizer_step_between_forward_and_backward_uses_the_weights_of_the_forward() -> None:
    layer = lipgan.spectral_norm(nn.Linear(6, 4).double())
    reference = copy.deepcopy(layer)
    weight = layer.weight
    with torch.no_grad():
        original(layer).mul_(3)
    weight.square().sum().backward()
    reference.weight.square().sum().backward()
    assert torch.equal(original(layer).grad, original(reference).grad)


@pytest.mark.parametrize("grouped", [False, True])
def test_eval_changes_nothing_and_works_before_any_training(grouped: bool) -> None:
    model = normalized(lipgan.spectral_norm).eval()
    if grouped:
        lipgan.group_spectral_norm(model)
    before = copy.deepcopy(model.state_dict())
    first, second = model(X), model(X)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("grouped", [False, True])
def test_deepcopy_is_independent(grouped: bool) -> None:
    model = normalized(lipgan.spectral_norm)
    if grouped:
        lipgan.group_spectral_norm(model)
    twin = copy.deepcopy(model)
    before = copy.deepcopy(twin.state_dict())
    for _ in range(3):
        model(X).sum().backward()
    for key, value in twin.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in twin.parameters())
    twin(X).sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


@pytest.mark.parametrize("grouped", [False, True])
def test_pickle(grouped: bool) -> None:
    model = normalized(lipgan.spectral_norm)
    if grouped:
        lipgan.group_spectral_norm(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(copy.deepcopy(twin)(X), copy.deepcopy(model)(X))
        parametrize.remove_parametrizations(twin[0], "weight")
        assert type(twin[0]) is nn.Conv2d
    assert parametrize.is_parametrized(model[0], "weight")


def test_half_types_with_an_eps_below_their_range() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        layer = lipgan.spectral_norm(nn.Linear(6, 4).to(dtype))
        with torch.no_grad():
            original(layer).zero_()
        assert not layer.weight.any()
        layer.weight.sum().backward()
        assert original(layer).grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_of_the_module(dtype: torch.dtype) -> None:
    layer = lipgan.spectral_norm(nn.Linear(6, 4)).to(dtype)
    assert layer.weight.dtype == dtype
    expected = layer.weight.double() @ torch.ones(6, dtype=torch.float64) + layer.bias.double()
    torch.testing.assert_close(layer.eval()(torch.ones(6, dtype=dtype)).double(), expected, rtol=0.05, atol=0.05)


def test_autocast_keeps_the_normalization_in_float32() -> None:
    layer = lipgan.spectral_norm(nn.Linear(6, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        layer(torch.randn(2, 6)).sum().backward()
    assert original(layer).grad.dtype == torch.float32


@pytest.mark.parametrize("way", ["reference", "torch.func"])
def test_autocast_does_not_touch_a_normalization_of_torchs_operations(way: str) -> None:
    layer = lipgan.spectral_norm(nn.Linear(60, 40)).eval()
    parametrization = layer.parametrizations.weight[0]
    weights = torch.randn(40, 60)

    def normalized_and_gradient() -> tuple[Tensor, Tensor]:
        if way == "torch.func":
            y, pull = torch.func.vjp(parametrization, original(layer))
            return y, *pull(weights)
        with lipgan.use_backend("reference"):
            y = parametrization(original(layer))
            (first,) = torch.autograd.grad(y, original(layer), weights, create_graph=True)
            return y, *torch.autograd.grad((first * weights).sum(), original(layer))

    expected = normalized_and_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        y, gradient = normalized_and_gradient()
    assert torch.equal(y, expected[0])
    # Of torch.func, the products of the gradient are PyTorch's own.
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=0.01 if way == "torch.func" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_compile_with_fullgraph_and_dynamic_batch(grouped: bool) -> None:
    torch._dynamo.reset()
    eager = normalized(lipgan.spectral_norm)
    if grouped:
        lipgan.group_spectral_norm(eager)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (4, 3, 2):
        for network in (eager, model):
            network.zero_grad()
        expected = eager(X[:batch])
        out = compiled(X[:batch])
        assert_close(out, expected)
        expected.square().sum().backward()
        out.square().sum().backward()
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad)
        for ours, theirs in zip(model.buffers(), eager.buffers(), strict=True):
            assert_close(ours, theirs)
    eager.eval()
    model.eval()
    assert_close(compiled(X), eager(X))


def _replica(rank: int, path: str, grouped: bool) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    model = normalized(lipgan.spectral_norm)
    if grouped:
        lipgan.group_spectral_norm(model)
    replica = nn.parallel.DistributedDataParallel(model, broadcast_buffers=True)
    for _ in range(3):
        replica.zero_grad()
        own = X[2 * rank : 2 * rank + 2]
        # Two forwards, each of which broadcasts the buffers, before one backward.
        (replica(own).mean() - replica(-own).square().mean()).backward()
    torch.save({"grads": [p.grad for p in model.parameters()], "state": model.state_dict()}, f"{path}/{rank}.pt")
    leave()


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_distributed_data_parallel_equals_one_process_on_the_joined_batch(grouped: bool, tmp_path: Path) -> None:
    run(_replica, str(tmp_path), grouped)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    single = normalized(lipgan.spectral_norm)
    for _ in range(3):
        single.zero_grad()
        (single(X).mean() - single(-X).square().mean()).backward()
    for parameter, *grads in zip(single.parameters(), *(rank["grads"] for rank in ranks), strict=True):
        for grad in grads:
            assert_close(grad, parameter.grad)
    for key, value in single.state_dict().items():
        for rank in ranks:
            assert_close(rank["state"][key], value)


# ---- the group ----


def test_group_equals_per_layer_and_counts_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    single = normalized(lipgan.spectral_norm)
    model = copy.deepcopy(single)
    group = lipgan.group_spectral_norm(model)
    assert len(group) == 3
    assert group.names == ["0", "2", "5"]
    calls = []
    import lipgan.nn.spectral_norm_group as module

    real = module.normalize
    monkeypatch.setattr(module, "normalize", lambda *args: calls.append(len(args[0])) or real(*args))
    for _ in range(3):
        for network in (single, model):
            network.zero_grad()
            (network(X).mean() - network(-X).square().mean()).backward()
        for (key, ours), (other, theirs) in zip(model.named_parameters(), single.named_parameters(), strict=True):
            assert key == other
            assert_close(ours.grad, theirs.grad)
    assert calls == [3] * 6
    for (key, ours), (other, theirs) in zip(model.state_dict().items(), single.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("apply", [parametrizations.spectral_norm, torch.nn.utils.spectral_norm])
def test_group_takes_over_from_torch_with_its_state_and_parameters(apply: Callable[[nn.Module], object]) -> None:
    theirs = normalized(lambda layer: apply(layer, n_power_iterations=2))
    with torch.no_grad():  # torch's hook leaves a weight that cannot be copied after a forward with gradients
        theirs(X)
    model = copy.deepcopy(theirs)
    weights = {id(parameter) for parameter in model.parameters()}
    generator = torch.get_rng_state()
    group = lipgan.group_spectral_norm(model)
    assert torch.equal(torch.get_rng_state(), generator), "taking over drew random numbers"
    assert {id(parameter) for parameter in model.parameters()} == weights, "an optimizer would lose its parameters"
    assert model[0].parametrizations.weight[0].n_power_iterations == 2
    assert_close(copy.deepcopy(model).eval()(X), copy.deepcopy(theirs).eval()(X))
    if apply is parametrizations.spectral_norm:  # the hook takes its half steps in the other order
        assert_close(model(X), theirs(X))
    assert len(group.sigmas()) == 3
    theirs(X)  # the model it was copied from still works


def test_group_normalizes_a_plain_model_and_can_be_removed() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Embedding(3, 4), SNLinear(5, 2))
    with pytest.raises(ValueError, match="has no Linear"):
        lipgan.group_spectral_norm(nn.ReLU())
    group = lipgan.group_spectral_norm(model)
    assert group.names == ["3"], "a model that is normalized in part is taken as it is"
    model = critic()
    group = lipgan.group_spectral_norm(model, n_power_iterations=3)
    with pytest.raises(ValueError, match="is in a SpectralNormGroup already"):
        lipgan.group_spectral_norm(model)
    group.step(200)
    for name, sigma in group.sigmas().items():
        layer = model[int(name)]
        matrix = original(layer).detach().movedim(1 if isinstance(layer, nn.ConvTranspose2d) else 0, 0).flatten(1)
        assert abs(sigma - float(torch.linalg.matrix_norm(matrix, 2))) < 1e-5 * sigma
    weight = original(model[0]).detach().clone()
    group.step()
    assert torch.equal(original(model[0]), weight)
    group.remove()
    assert not model._forward_pre_hooks
    model(X)


def test_group_forgets_when_a_forward_fails() -> None:
    model = critic()
    lipgan.group_spectral_norm(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 2, 4, 4))
    first = model[0].weight
    with torch.no_grad():
        original(model[0]).mul_(-1)
    assert not torch.equal(model[0].weight, first)


def test_group_of_mixed_dtypes_and_modes() -> None:
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 5).double(), nn.Linear(5, 6)])
    group = lipgan.group_spectral_norm(model)
    model[2].eval()
    before = model[2].parametrizations.weight[0]._u.clone()
    weights = group.normalize()
    assert [weight.dtype for weight in weights] == [torch.float32, torch.float64, torch.float32]
    assert torch.equal(model[2].parametrizations.weight[0]._u, before)
    assert list(group.sigmas()) == ["0", "1", "2"]


def test_penalty_through_normalized_weights() -> None:
    """A gradient penalty differentiates the normalization twice."""
    grads = []
    for apply in (lipgan.spectral_norm, parametrizations.spectral_norm):
        model = normalized(apply).double()
        x = X.double().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (gradient.flatten(1).norm(dim=1) - 1).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    for ours, theirs in zip(*grads, strict=True):
        # The double modules were converted from float32, so u and v agree to float32 only.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---- the SN layers ----


@pytest.mark.parametrize(
    ("cls", "base", "args", "shape"),
    [
        (SNLinear, nn.Linear, (6, 4), (2, 6)),
        (SNConv1d, nn.Conv1d, (3, 4, 3), (2, 3, 8)),
        (SNConv2d, nn.Conv2d, (3, 4, 3), (2, 3, 8, 8)),
        (SNConv3d, nn.Conv3d, (3, 4, 3), (2, 3, 4, 4, 4)),
        (SNConvTranspose1d, nn.ConvTranspose1d, (3, 4, 3), (2, 3, 8)),
        (SNConvTranspose2d, nn.ConvTranspose2d, (3, 4, 3), (2, 3, 8, 8)),
        (SNConvTranspose3d, nn.ConvTranspose3d, (3, 4, 3), (2, 3, 4, 4, 4)),
        (SNEmbedding, nn.Embedding, (7, 3), None),
    ],
)
def test_layer_classes(
    cls: type[nn.Module], base: type[nn.Module], args: tuple[int, ...], shape: tuple[int, ...] | None
) -> None:
    layer = cls(*args, n_power_iterations=30)
    assert isinstance(layer, base)
    assert isinstance(layer, cls)
    matrix = layer.weight.detach().movedim(1 if "Transpose" in base.__name__ else 0, 0).flatten(1)
    assert abs(float(torch.linalg.matrix_norm(matrix, 2)) - 1) < 1e-3
    x = torch.tensor([1, 2]) if shape is None else torch.randn(shape)
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(x), layer(x))
    assert isinstance(twin, cls)
    theirs = parametrizations.spectral_norm(base(*args))
    theirs.load_state_dict(layer.state_dict())
    layer.load_state_dict(theirs.state_dict())


# ---- bad input ----


def unnamed(**changes: object) -> Callable[[], object]:
    return lambda: lipgan.spectral_norm(nn.Linear(3, 2), **changes)  # type: ignore[arg-type]


def with_weight(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("weight", weight)
    return module


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (unnamed(name="wight"), ValueError, "Linear has no parameter or buffer named 'wight'"),
        (unnamed(n_power_iterations=0), ValueError, "n_power_iterations must be at least 1, got 0"),
        (unnamed(eps=0.0), ValueError, "eps must be positive, got 0.0"),
        (unnamed(eps="x"), TypeError, "eps must be a number, got 'x'"),
        (unnamed(dim=1.0), TypeError, "dim must be an int, got 1.0"),
        (lambda: lipgan.spectral_norm(nn.LazyLinear(3)), ValueError, "weight is not initialized yet"),
        (unnamed(dim=2), IndexError, r"dim must be in \[-2, 1\] .* got 2"),
        (lambda: lipgan.spectral_norm(with_weight(torch.ones(2, 2).int())), TypeError, "got torch.int32"),
        (
            lambda: lipgan.spectral_norm(with_weight(torch.ones(2, 2).to(torch.complex32))),
            TypeError,
            "got torch.complex32",
        ),
        (lambda: lipgan.spectral_norm(with_weight(torch.ones(0, 2))), ValueError, "must not be empty"),
        (lambda: lipgan.spectral_norm(with_weight(torch.tensor(1.0))), ValueError, "0-dim"),
        (lambda: lipgan.group_spectral_norm(critic(), eps=-1.0), ValueError, "eps must be positive, got -1.0"),
        (lambda: lipgan.group_spectral_norm(critic(), n_power_iterations=0), ValueError, "got 0"),
        (lambda: lipgan.group_spectral_norm(critic()).step(0), ValueError, "n_power_iterations must be at least 1"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_applying_it_to_a_hooked_layer_is_refused_and_changes_nothing() -> None:
    layer = torch.nn.utils.spectral_norm(nn.Linear(3, 2))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"'weight' of module .* is spectrally normalized already"):
        lipgan.spectral_norm(layer)
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_refused_module_is_unchanged() -> None:
    layer = nn.Linear(3, 2)
    model = nn.Sequential(layer, nn.Linear(0, 2))
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"1\.weight must not be empty"):
        lipgan.group_spectral_norm(model)
    with pytest.raises(ValueError, match="eps"):
        lipgan.spectral_norm(layer, eps=-1)
    assert type(layer) is nn.Linear
    assert not model._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["no_grad", "requires_grad"])
def test_without_a_graph_the_bits_are_the_same(frozen: str, training: bool) -> None:
    one, other = (normalized(lipgan.spectral_norm).train(training) for _ in range(2))
    if frozen == "requires_grad":
        other.requires_grad_(False)
    for _ in range(2):
        with torch.set_grad_enabled(frozen != "no_grad"):
            ours = [layer.weight for layer in other if hasattr(layer, "weight")]
        theirs = [layer.weight for layer in one if hasattr(layer, "weight")]
        assert all(not weight.requires_grad for weight in ours)
        assert all(weight.requires_grad for weight in theirs)
        assert all(map(torch.equal, ours, theirs))
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
