"""The parametrization by the operator norm of a convolution.

The error bounds are derived in docs/numerics/conv_spectral_norm.md.
"""

import copy
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

from lipgan.nn.conv_spectral_norm import conv_spectral_norm

pytestmark = pytest.mark.usefixtures("single_thread")


# layer, arguments, input size
LAYERS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [
    (nn.Conv1d, (3, 4, 3), {"padding": 1}, (8,)),
    (nn.Conv2d, (2, 3, 3), {"padding": 1}, (5, 6)),
    (nn.Conv2d, (4, 2, 4), {"padding": 1, "stride": 2, "groups": 2}, (6, 6)),
    (nn.Conv2d, (2, 3, 3), {"padding": 2, "dilation": 2, "padding_mode": "circular"}, (5, 5)),
    (nn.Conv2d, (2, 3, 3), {"padding": "same", "padding_mode": "reflect"}, (4, 5)),
    (nn.Conv3d, (2, 2, 2), {"stride": 2, "padding": 1}, (3, 4, 3)),
    (nn.ConvTranspose1d, (3, 2, 4), {"stride": 2, "padding": 1}, (5,)),
    (nn.ConvTranspose2d, (2, 2, 3), {"stride": 2, "padding": 1, "output_padding": 1}, (3, 4)),
    (nn.ConvTranspose3d, (2, 1, 3), {"padding": 1}, (2, 3, 3)),
]


def jacobian_norm(layer: nn.Module, input_shape: tuple[int, ...]) -> float:
    """The largest singular value of the layer without its bias, from its dense Jacobian."""
    count = torch.Size(input_shape).numel()
    columns = torch.eye(count, dtype=torch.float64).unflatten(1, input_shape)
    with torch.no_grad():
        j = layer(columns) - layer(torch.zeros_like(columns))
    return float(scipy.linalg.svdvals(j.flatten(1).numpy(force=True))[0])


@pytest.mark.parametrize(("kind", "arguments", "options", "size"), LAYERS, ids=str)
def test_the_normalized_layer_has_operator_norm_one(
    kind: type[nn.Module], arguments: tuple[int, ...], options: dict[str, Any], size: tuple[int, ...]
) -> None:
    layer = kind(*arguments, dtype=torch.float64, **options)
    shape = (arguments[0], *size)
    assert conv_spectral_norm(layer, size, n_power_iterations=200) is layer
    x = torch.randn(2, *shape, dtype=torch.float64)
    layer(x)
    layer.eval()
    norm = jacobian_norm(layer, shape)
    # sigma is too small by the power iteration only, so the norm is at least 1 but for rounding.
    assert 1 - 1e-12 <= norm <= 1 + 5e-3
    assert layer.parametrizations.weight[0]._v.shape == shape
    assert layer.parametrizations.weight[0]._u.shape == layer(x).shape[1:]


def test_one_iteration_per_forward_converges() -> None:
    layer = conv_spectral_norm(nn.Conv2d(3, 8, 3, padding=1), (8, 8))
    x = torch.randn(1, 3, 8, 8)
    for _ in range(300):
        layer(x)
    layer.eval()
    # float32 rounding of sigma and of the weight: some eps, below 1e-5.
    assert 1 - 1e-5 <= jacobian_norm(layer.double(), (3, 8, 8)) <= 1 + 5e-3


def test_the_reshaped_kernel_norm_leaves_another_operator_norm() -> None:
    def ones() -> nn.Conv2d:
        layer = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)
        nn.init.ones_(layer.weight)
        return layer

    reshaped = torch_spectral_norm(ones(), n_power_iterations=50)
    ours = conv_spectral_norm(ones(), 12, n_power_iterations=300)
    for layer in (reshaped, ours):
        layer(torch.ones(1, 1, 12, 12, dtype=torch.float64))
        layer.eval()
    assert jacobian_norm(reshaped, (1, 12, 12)) > 2.8
    assert jacobian_norm(ours, (1, 12, 12)) == pytest.approx(1, rel=1e-10)


def test_the_gradient_is_the_derivative_with_u_and_v_constant() -> None:
    layer = conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1, stride=2, dtype=torch.float64), (5, 4))
    layer.eval()
    parametrization = layer.parametrizations.weight[0]
    weight = layer.parametrizations.weight.original
    assert torch.autograd.gradcheck(parametrization, weight)
    assert torch.autograd.gradgradcheck(parametrization, weight)

    # Against dY/dW = (dY - <dY, Y> d sigma) / sigma, with d sigma the weight gradient of the convolution.
    u, v = parametrization._u, parametrization._v
    y = layer.weight
    grad_y = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, weight, grad_y)
    outer = torch.nn.grad.conv2d_weight(v[None], weight.shape, u[None], stride=2, padding=1)
    sigma = (outer * weight).sum()
    torch.testing.assert_close(grad, (grad_y - (grad_y * y).sum() * outer) / sigma)


def test_the_gradient_at_convergence_is_that_of_the_dense_norm() -> None:
    layer = conv_spectral_norm(nn.Conv1d(2, 2, 3, padding=1, dtype=torch.float64), 5, n_power_iterations=500)
    weight = layer.parametrizations.weight.original
    target = torch.randn_like(weight)
    (grad,) = torch.autograd.grad((layer.weight * target).sum(), weight)

    def normalized(w: Tensor) -> Tensor:
        columns = torch.eye(10, dtype=torch.float64).unflatten(1, (2, 5))
        jacobian = nn.functional.conv1d(columns, w, padding=1).flatten(1)
        return (w / torch.linalg.matrix_norm(jacobian, 2) * target).sum()

    dense_weight = weight.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(normalized(dense_weight), dense_weight)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first_in_eval", [False, True])
def test_two_forwards_before_one_backward(first_in_eval: bool) -> None:
    layer = conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), 6)
    real, fake = torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6)
    first = layer.train(not first_in_eval)(real)
    second = layer.train()(fake)
    (first.mean() - second.mean()).backward()
    grad = layer.parametrizations.weight.original.grad
    assert grad is not None
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_training_updates_and_eval_does_not() -> None:
    layer = conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), 6)
    x = torch.randn(1, 2, 6, 6)
    nn.init.normal_(layer.parametrizations.weight.original)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    layer.train()
    layer(x)
    after = layer.state_dict()
    for key in ("parametrizations.weight.0._u", "parametrizations.weight.0._v"):
        assert not torch.equal(before[key], after[key])
    assert torch.equal(before["parametrizations.weight.original"], after["parametrizations.weight.original"])


def test_deepcopy_and_state_dict() -> None:
    layer = conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), 6)
    x = torch.randn(1, 2, 6, 6)
    layer(x)
    twin = copy.deepcopy(layer)
    loaded = conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), 6)
    loaded.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {
        "bias",
        "parametrizations.weight.original",
        "parametrizations.weight.0._u",
        "parametrizations.weight.0._v",
    }
    for _ in range(2):
        expected = layer(x)
        assert torch.equal(twin(x), expected)
        assert torch.equal(loaded(x), expected)
    twin.parametrizations.weight[0]._u.zero_()
    assert layer.parametrizations.weight[0]._u.abs().sum() > 0


@pytest.mark.parametrize("keep", [True, False])
def test_remove_parametrizations(keep: bool) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    original = layer.weight.detach().clone()
    conv_spectral_norm(layer, 6).eval()
    normalized = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=keep)
    assert not parametrize.is_parametrized(layer)
    assert torch.equal(layer.weight, normalized if keep else original)
    conv_spectral_norm(layer, 6)


def test_assignment_sets_the_original() -> None:
    layer = conv_spectral_norm(nn.Conv1d(2, 3, 3), 6)
    layer.weight = torch.full((3, 2, 3), 2.0)
    assert (layer.parametrizations.weight.original == 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_weight_gives_zeros_and_finite_gradients_and_recovers(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=dtype)
    nn.init.zeros_(layer.weight)
    conv_spectral_norm(layer, 6, n_power_iterations=200)
    weight = layer.weight
    assert (weight == 0).all()
    weight.float().sum().backward()
    original = layer.parametrizations.weight.original
    assert original.grad is not None
    assert original.grad.isfinite().all()
    nn.init.normal_(original)
    weight = layer.weight.detach()
    reference = nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    reference.weight.data.copy_(weight)
    # u and v are stored in dtype: the norm and direction of each have an error of eps, sigma about as much.
    slack = 4 * torch.finfo(dtype).eps
    assert 1 - slack <= jacobian_norm(reference, (2, 6, 6)) <= 1 + 5e-3 + slack


def test_non_finite_weights_propagate_and_leave_the_vectors() -> None:
    layer = conv_spectral_norm(nn.Conv1d(2, 3, 3), 6)
    original = layer.parametrizations.weight.original
    good = original.detach().clone()
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            original[0, 0, 0] = bad
        assert layer.weight.isnan().any()
        assert all(buffer.isfinite().all() for buffer in layer.buffers())
        with torch.no_grad():
            original.copy_(good)
        assert layer.weight.isfinite().all()


def test_autocast_does_not_reach_the_power_iteration() -> None:
    layer = conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), 6)
    twin = copy.deepcopy(layer)
    expected = layer.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(twin.weight, expected)


def test_moves_with_the_module() -> None:
    layer = conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), 6).double()
    assert layer.weight.dtype == torch.float64
    assert layer.parametrizations.weight[0]._u.dtype == torch.float64
    assert "input_size=(6, 6)" in repr(layer)


class _TwoKernels(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(2, 3, 3)
        self.other = nn.Parameter(torch.randn(3, 2, 3, 3))


def test_another_parameter_by_name() -> None:
    layer = conv_spectral_norm(_TwoKernels(), 6, name="other")
    assert parametrize.is_parametrized(layer, "other")
    assert not parametrize.is_parametrized(layer, "weight")


CONV = nn.Conv2d(2, 3, 3)


@pytest.mark.parametrize(
    ("module", "kwargs", "error", "message"),
    [
        (nn.Linear(3, 3), {}, TypeError, "module must be a Conv or ConvTranspose layer, got Linear"),
        (CONV, {"input_size": (6,)}, ValueError, r"input_size must have 2 entries, .* got \(6,\)"),
        (CONV, {"input_size": 2}, ValueError, r"input_size \(2, 2\) gives an output of size \(0, 0\)"),
        (CONV, {"input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
        (CONV, {"name": "kernel"}, ValueError, "Conv2d has no parameter or buffer named 'kernel'"),
        (CONV, {"name": "bias"}, ValueError, r"'bias' is no convolution weight, its shape is \(3,\)"),
        (CONV, {"n_power_iterations": 0}, ValueError, "n_power_iterations must be at least 1, got 0"),
        (CONV, {"n_power_iterations": 1.5}, TypeError, "n_power_iterations must be an int, got 1.5"),
        (CONV, {"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        (nn.LazyConv2d(3, 3), {}, ValueError, "'weight' is a parameter that is not initialized yet"),
        (nn.Conv2d(2, 3, 3, dtype=torch.cfloat), {}, TypeError, "weight must have a real .* torch.complex64"),
        (nn.Conv2d(2, 3, 3, padding=6, padding_mode="reflect"), {}, ValueError, "padding must be at most 5"),
    ],
)
def test_bad_input_changes_nothing(
    module: nn.Module, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = set(dict(module.named_parameters()))
    with pytest.raises(error, match=message):
        conv_spectral_norm(module, **{"input_size": 6, **kwargs})
    assert set(dict(module.named_parameters())) == before
    assert not parametrize.is_parametrized(module)


def test_applied_twice() -> None:
    layer = conv_spectral_norm(nn.Conv2d(2, 3, 3), 6)
    with pytest.raises(ValueError, match="'weight' of module ParametrizedConv2d is spectrally normalized already"):
        conv_spectral_norm(layer, 6)
    assert len(layer.parametrizations.weight) == 1
