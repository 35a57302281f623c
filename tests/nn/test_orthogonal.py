"""Orthogonal weights and GroupSort.

The error bounds are derived in docs/numerics/lipschitz.md.
"""

import copy
import math
import pickle
from typing import Any

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lipgan
from lipgan.nn import GroupSort, MaxMin, OrthogonalConv2d, OrthogonalLinear, orthogonal

pytestmark = pytest.mark.usefixtures("single_thread")


# layer, arguments, input size, the windows that one input position lies in
LAYERS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any], tuple[int, ...], int]] = [
    (nn.Linear, (1, 1), {}, (), 1),
    (nn.Linear, (7, 3), {}, (), 1),
    (nn.Linear, (3, 17), {}, (), 1),
    (nn.Conv1d, (3, 5, 3), {"stride": 3}, (9,), 1),
    (nn.Conv2d, (2, 8, 2), {"stride": 2}, (6, 4), 1),
    (nn.Conv2d, (2, 3, 2), {"stride": 2, "padding": 1}, (5, 7), 1),
    (nn.Conv2d, (4, 6, 1), {"groups": 2}, (3, 3), 1),
    (nn.Conv2d, (2, 3, 3), {"padding": 1}, (6, 5), 9),
    (nn.Conv2d, (2, 3, 4), {"stride": 2, "padding": 1}, (6, 6), 4),
    (nn.Conv2d, (2, 3, 3), {"stride": 2, "dilation": 2, "padding": 2}, (7, 7), 9),
    (nn.Conv2d, (2, 3, 3), {"stride": 3, "dilation": 2, "padding": 2}, (9, 9), 1),
    (nn.Conv3d, (1, 2, 2), {"stride": 2}, (4, 4, 2), 1),
    (nn.ConvTranspose2d, (8, 2, 2), {"stride": 2}, (3, 3), 1),
    (nn.ConvTranspose2d, (4, 6, 4), {"stride": 2, "padding": 1, "groups": 2}, (3, 4), 4),
]


def operator_norm(layer: nn.Module, input_shape: tuple[int, ...]) -> float:
    """The largest singular value of the layer without its bias, from its dense Jacobian."""
    layer = copy.deepcopy(layer)
    columns = torch.eye(math.prod(input_shape), dtype=torch.float64).unflatten(1, input_shape)
    with torch.no_grad():
        j = layer(columns) - layer(torch.zeros_like(columns))
    return float(scipy.linalg.svdvals(j.flatten(1).numpy(force=True))[0])


@pytest.mark.parametrize(("kind", "arguments", "options", "size", "windows"), LAYERS, ids=str)
def test_the_layer_is_1_lipschitz_and_no_less_where_windows_do_not_overlap(
    kind: type[nn.Module], arguments: tuple[int, ...], options: dict[str, Any], size: tuple[int, ...], windows: int
) -> None:
    layer = kind(*arguments, dtype=torch.float64, **options)
    assert orthogonal(layer) is layer
    # Far from the orthogonal weight that it starts with.
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_(0, 3)
    weight: Tensor = layer.weight
    groups = getattr(layer, "groups", 1)
    blocks = weight.detach().reshape(groups, weight.shape[0] // groups, -1) * math.sqrt(windows)
    gram = blocks @ blocks.mT if blocks.shape[1] <= blocks.shape[2] else blocks.mT @ blocks
    assert (gram - torch.eye(gram.shape[-1])).abs().max() < 1e-13
    norm = operator_norm(layer, (arguments[0], *size))
    assert norm <= 1 + 1e-13
    if windows == 1:
        assert norm >= 1 - 1e-13


def test_overlapping_windows_can_reach_the_bound_only_together() -> None:
    # Nine equal taps: the reshaped norm is 1, the operator's is 3 (1 + 2 cos(pi / 13))^2 / 9 without the factor.
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=torch.float64)
    nn.init.ones_(layer.weight)
    orthogonal(layer)
    expected = (1 + 2 * math.cos(math.pi / 13)) ** 2 / 9
    assert operator_norm(layer, (1, 12, 12)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_the_weight_is_the_nearest_orthogonal_one(shape: tuple[int, int]) -> None:
    layer = OrthogonalLinear(shape[1], shape[0], dtype=torch.float64)
    a = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(a)
    u, _ = scipy.linalg.polar(a.numpy(force=True), side="right" if shape[0] >= shape[1] else "left")
    torch.testing.assert_close(layer.weight.detach(), torch.as_tensor(u), rtol=0, atol=1e-13)


def test_the_weight_starts_orthogonal_and_near_what_it_was() -> None:
    layer = nn.Linear(6, 4)
    nn.init.orthogonal_(layer.weight)
    before = layer.weight.detach().clone()
    orthogonal(layer)
    for weight in (layer.weight, layer.parametrizations.weight.original):
        torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 3), (40, 17), (17, 40), (64, 64)])
def test_the_norm_misses_one_by_the_rounding_of_the_entries(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    layer = OrthogonalLinear(shape[1], shape[0], dtype=dtype)
    weight = layer.weight.detach()
    assert weight.dtype == dtype
    # Each entry is off by eps/2 of itself, so the matrix by eps/2 of its Frobenius norm, the root of the smaller side.
    bound = 0.5 * torch.finfo(dtype).eps * math.sqrt(min(shape)) + 1e-13
    values = torch.linalg.svdvals(weight.double())
    assert (values - 1).abs().max() <= bound


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("shape", [(4, 4), (4, 7), (7, 4)])
def test_a_weight_that_has_lost_rank_gives_an_orthogonal_one_and_finite_gradients(
    rank: int, shape: tuple[int, int]
) -> None:
    layer = OrthogonalLinear(shape[1], shape[0])
    with torch.no_grad():
        factors = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
        layer.parametrizations.weight.original.copy_(factors)
    layer(torch.randn(5, shape[1])).square().sum().backward()
    values = torch.linalg.svdvals(layer.weight.detach())
    assert (values - 1).abs().max() < 1e-6
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2)])
def test_derivatives_of_first_and_second_order(shape: tuple[int, int]) -> None:
    layer = OrthogonalLinear(shape[1], shape[0], bias=False, dtype=torch.float64)
    parametrization = layer.parametrizations.weight[0]
    a = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(parametrization, (a,))
    assert torch.autograd.gradgradcheck(parametrization, (a,))


def test_autocast_does_not_touch_the_factorization() -> None:
    layer = OrthogonalLinear(32, 32)
    exact = layer.weight.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, exact)
        layer.weight.square().mul(torch.arange(32.0)).sum().backward()
    within = layer.parametrizations.weight.original.grad
    layer.zero_grad()
    layer.weight.square().mul(torch.arange(32.0)).sum().backward()
    assert torch.equal(within, layer.parametrizations.weight.original.grad)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_compiled_and_exported_without_a_break(precision: torch.dtype | None) -> None:
    torch._dynamo.reset()
    layers = nn.Sequential(OrthogonalConv2d(2, 8, 2, stride=2), MaxMin(), nn.Flatten(), OrthogonalLinear(32, 3))
    copied, x = copy.deepcopy(layers), torch.randn(5, 2, 4, 4)
    compiled = torch.compile(copied, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        ours, eager = compiled(x), layers(x)
    torch.testing.assert_close(ours, eager)
    for y in (ours, eager):
        y.float().square().sum().backward()
    for p, q in zip(copied.parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(layers.eval(), (x,), dynamic_shapes=(batch,), strict=precision is None)
    torch.testing.assert_close(program.module()(x[:3]), layers(x[:3]))


def test_state_copies_pickles_and_removal() -> None:
    layer = OrthogonalConv2d(2, 8, 2, stride=2)
    x = torch.randn(3, 2, 6, 6)
    y = layer(x)
    assert set(layer.state_dict()) == {"bias", "parametrizations.weight.original"}
    other = OrthogonalConv2d(2, 8, 2, stride=2)
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), y)
    torch.testing.assert_close(y[:, :].sub(layer.bias[:, None, None]).norm(), x.norm())
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer(x), y)
    assert type(layer) is OrthogonalConv2d


def test_assignment_sets_the_nearest_orthogonal_weight() -> None:
    layer = OrthogonalLinear(2, 2)
    layer.weight = torch.tensor([[0.0, -2.0], [3.0, 0.0]])
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))


def test_one_factorization_serves_several_forwards_when_cached() -> None:
    layer = OrthogonalLinear(3, 3)
    with parametrize.cached():
        assert layer.weight is layer.weight


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.Embedding(3, 4), TypeError, "module must be a Linear, Conv or ConvTranspose layer, got Embedding"),
        (OrthogonalLinear(2, 2), ValueError, "'weight' of module .* is parametrized already"),
        (nn.LazyLinear(3), ValueError, "not initialized yet"),
        (nn.Linear(2, 0), ValueError, r"got shape \(0, 2\)"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), ValueError, "padding_mode must be 'zeros'"),
        (nn.Linear(2, 2, dtype=torch.complex64), TypeError, "complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_bad_modules_are_named(module: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        orthogonal(module)


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="no parameter or buffer named 'wight'"):
        orthogonal(nn.Linear(2, 2), "wight")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        orthogonal(nn.Linear(2, 3), "bias")


# ---- GroupSort ----


@pytest.mark.parametrize("group_size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_features_are_sorted_within_groups(group_size: int, dtype: torch.dtype) -> None:
    for x in (
        torch.randn(4, 30, dtype=dtype),
        torch.randn(3, 30, 5, 2, dtype=dtype).to(memory_format=torch.channels_last),
        torch.randn(2, 60, 3, dtype=dtype)[:, ::2],
        torch.randn(0, 30, dtype=dtype),
    ):
        y = GroupSort(group_size)(x)
        assert y.shape == x.shape
        assert y.dtype == dtype
        for start in range(0, 30, group_size):
            part = slice(start, start + group_size)
            assert torch.equal(y[:, part], x[:, part].sort(1, descending=True).values)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_groupsort_is_1_lipschitz_and_keeps_norms(batch: int, groups: int, group_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = GroupSort(group_size)
    x = torch.randn(batch, groups * group_size, dtype=torch.float64, requires_grad=True)
    z = torch.randn_like(x)
    y = layer(x)
    assert (layer(z) - y).norm() <= (z - x).norm() * (1 + 1e-14)
    d = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, d)
    # The entries of d in another order.
    assert torch.equal(gradient.sort(1).values, d.sort(1).values)


def test_maxmin_is_groupsort_by_twos_and_dim_counts() -> None:
    x = torch.randn(3, 4, 6)
    assert torch.equal(MaxMin()(x), GroupSort(2)(x))
    assert torch.equal(MaxMin(dim=-1)(x), MaxMin()(x.mT).mT)
    assert repr(MaxMin()) == "MaxMin(group_size=2)"


def test_groupsort_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"multiple of group_size = 2, got 5 in dimension 1 of shape \(3, 5\)"):
        MaxMin()(torch.randn(3, 5))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GroupSort(0)
    with pytest.raises(TypeError, match=r"must be an int, got 2\.0"):
        GroupSort(2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [2, 4])
def test_the_fused_gradient_penalty_knows_groupsort_and_orthogonal_layers(group_size: int) -> None:
    critic = nn.Sequential(
        OrthogonalConv2d(2, 8, 2, stride=2),
        GroupSort(group_size),
        nn.Flatten(),
        OrthogonalLinear(32, 16),
        GroupSort(group_size),
        nn.Linear(16, 1),
        nn.Flatten(0),
    ).double()
    real, fake = torch.randn(2, 5, 2, 4, 4, dtype=torch.float64)
    results = []
    for engine in ("fused", "autograd"):
        critic.zero_grad()
        generator = torch.Generator().manual_seed(3)
        penalty = lipgan.gradient_penalty(critic, real, fake, engine=engine, generator=generator)
        penalty.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in critic.parameters()]
        assert max(float(g.abs().max()) for g in gradients) > 0.1
        results.append([penalty.detach(), *gradients])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-12)
