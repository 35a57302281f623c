"""Under torch.func, batched and forward-mode gradients: PyTorch's numbers, and those of backward mode."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils import parametrizations

import lipgan

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()


def model(kind: str, *, train: bool) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for layer in (network[0], network[2]):
        (parametrizations.spectral_norm if kind == "torch" else lipgan.spectral_norm)(layer)
    if kind == "group":
        lipgan.group_spectral_norm(network)
    return network.train(train)


def state(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return dict(network.named_parameters()), dict(network.named_buffers())


def tangents(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: torch.linspace(-1, 1, value.numel()).to(value).reshape(value.shape) for key, value in parameters.items()
    }


def loss(network: nn.Module, parameters: Any, buffers: Any, x: Tensor = X) -> Tensor:
    out: Tensor = functional_call(network, (parameters, buffers), (x,))
    return out.square().sum()


def vmap_of_jacrev(network: nn.Module) -> Any:
    return vmap(jacrev(network))(X)


def per_sample_gradients(network: nn.Module) -> Any:
    parameters, buffers = state(network)
    per_sample = grad(lambda p, x: loss(network, p, buffers, x[None]))
    return vmap(per_sample, in_dims=(None, 0))(parameters, X)


def ensemble_of(network: nn.Module) -> tuple[list[nn.Module], Any, Any]:
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.1)
    members = [network, other]
    return members, *stack_module_state(members)


def ensemble(network: nn.Module) -> Any:
    _, parameters, buffers = ensemble_of(network)
    return vmap(lambda p, b: functional_call(network, (p, b), (X,)))(parameters, buffers), buffers


def gradients_of_an_ensemble(network: nn.Module) -> Any:
    _, parameters, buffers = ensemble_of(network)
    return vmap(grad(lambda p, b: loss(network, p, b)))(parameters, buffers), buffers


def jvp_of_grad(network: nn.Module) -> Any:
    parameters, buffers = state(network)
    return jvp(grad(lambda p: loss(network, p, buffers)), (parameters,), (tangents(parameters),))


def jvp_in_the_parameters(network: nn.Module) -> Any:
    parameters, buffers = state(network)
    return jvp(lambda p: functional_call(network, (p, buffers), (X,)), (parameters,), (tangents(parameters),))


def jvp_in_the_input(network: nn.Module) -> Any:
    return jvp(network, (X,), (torch.ones_like(X),))


def grad_in_the_input(network: nn.Module) -> Any:
    return grad(lambda x: network(x).square().sum())(X)


def hessian_in_the_parameters(network: nn.Module) -> Any:
    parameters, buffers = state(network)
    return hessian(lambda p: loss(network, p, buffers))(parameters)


def dual_numbers(network: nn.Module) -> Any:
    parameters, buffers = state(network)
    along = tangents(parameters)
    with forward_ad.dual_level():
        dual = {key: forward_ad.make_dual(value.detach(), along[key]) for key, value in parameters.items()}
        return forward_ad.unpack_dual(functional_call(network, (dual, buffers), (X,))).tangent


def batched_gradients(network: nn.Module) -> Any:
    out = network(X).square().sum(0)
    return torch.autograd.grad(out, list(network.parameters()), torch.eye(3).double(), is_grads_batched=True)


def batched_gradients_of_gradients(network: nn.Module) -> Any:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    wanted = [parameter for parameter in network.parameters() if parameter.ndim == 2]
    return torch.autograd.grad(gradient.sum(0), wanted, torch.eye(4).double(), is_grads_batched=True)


PROGRAMS = [
    vmap_of_jacrev,
    per_sample_gradients,
    ensemble,
    gradients_of_an_ensemble,
    jvp_of_grad,
    jvp_in_the_parameters,
    jvp_in_the_input,
    grad_in_the_input,
    hessian_in_the_parameters,
    dual_numbers,
    batched_gradients,
    batched_gradients_of_gradients,
]
# Where PyTorch's own parametrization, whose power iteration writes into u and v, fails in training mode: the tests of
# ensembles and of forward mode below compare with other things.
NOT_IN_TRAINING = {
    ensemble,
    gradients_of_an_ensemble,
    jvp_of_grad,
    jvp_in_the_parameters,
    hessian_in_the_parameters,
    dual_numbers,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["single", "group"])
@pytest.mark.parametrize(
    ("program", "train"),
    [(program, train) for program in PROGRAMS for train in (False, True) if not (train and program in NOT_IN_TRAINING)],
)
def test_same_numbers_as_torch(program: Callable[[nn.Module], Any], train: bool, kind: str) -> None:
    ours, theirs = model(kind, train=train), model("torch", train=train)
    results = [
        torch.utils._pytree.tree_leaves(program(network)) + list(network.buffers()) for network in (ours, theirs)
    ]
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["single", "group"])
def test_ensemble_in_training_is_each_of_its_members(kind: str) -> None:
    network = model(kind, train=True)
    members, parameters, buffers = ensemble_of(network)
    alone = [copy.deepcopy(member) for member in members]
    grads, out = vmap(lambda p, b: (grad(lambda q: loss(network, q, b))(p), functional_call(network, (p, b), (X,))))(
        parameters, buffers
    )
    for index, member in enumerate(alone):
        member(X).square().sum().backward()
        for key, parameter in member.named_parameters():
            torch.testing.assert_close(grads[key][index], parameter.grad, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(out[index], member(X), rtol=1e-11, atol=1e-12)  # both at their second iteration
        for key, buffer in member.named_buffers():
            torch.testing.assert_close(buffers[key][index], buffer, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["single", "group"])
@pytest.mark.parametrize("program", [jvp_in_the_parameters, dual_numbers, jvp_of_grad, hessian_in_the_parameters])
def test_forward_mode_in_training_agrees_with_backward_mode(program: Callable[[nn.Module], Any], kind: str) -> None:
    """u and v are constants of both: <t, J s> = <J^T t, s>, and the Hessian is the one of two backwards."""
    network = model(kind, train=True)
    reference = copy.deepcopy(network)
    result = program(network)
    parameters, buffers = state(reference)
    along = tangents(parameters)
    if program in (jvp_in_the_parameters, dual_numbers):
        out, backward = vjp(lambda p: functional_call(reference, (p, buffers), (X,)), parameters)
        tangent = result[1] if program is jvp_in_the_parameters else result
        direction = torch.ones_like(out)
        (pulled,) = backward(direction)
        expected = sum((pulled[key] * along[key]).sum() for key in along)
        torch.testing.assert_close((direction * tangent).sum(), expected, rtol=1e-11, atol=1e-12)
        return
    leaves = [parameter for _, parameter in reference.named_parameters()]
    value = reference(X).square().sum()
    first = torch.autograd.grad(value, leaves, create_graph=True)
    inner = sum((g * along[key]).sum() for g, key in zip(first, along, strict=True))
    second = dict(zip(along, torch.autograd.grad(inner, leaves), strict=True))
    for key in along:
        if program is jvp_of_grad:
            ours = result[1][key]
        else:
            ours = sum(torch.tensordot(result[key][other], along[other], along[other].ndim) for other in along)
        torch.testing.assert_close(ours, second[key], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["single", "group"])
def test_one_u_for_weights_that_differ_is_refused_in_training(kind: str) -> None:
    network = model(kind, train=True)
    _, parameters, _ = ensemble_of(network)
    buffers = state(network)[1]
    with pytest.raises(RuntimeError, match="u and v cannot follow weights that differ"):
        vmap(lambda p: functional_call(network, (p, buffers), (X,)))(parameters)
    network.eval()
    assert vmap(lambda p: functional_call(network, (p, buffers), (X,)))(parameters).shape == (2, 6, 3)


@pytest.mark.parametrize("train", [False, True])
def test_gradcheck_of_every_kind(train: bool) -> None:
    layer = lipgan.spectral_norm(nn.Linear(4, 3).double()).train(train)
    for _ in range(200):  # with singular vectors for u and v, the gradient with constant ones is the true one
        layer(X)
    buffers = {key: value.clone() for key, value in layer.named_buffers()}
    weight = layer.parametrizations.weight.original.detach().clone().requires_grad_()

    def function(x: Tensor, w: Tensor) -> Tensor:
        fresh = {key: value.clone() for key, value in buffers.items()}
        out: Tensor = functional_call(layer, {"parametrizations.weight.original": w, **fresh}, (x,))
        return out

    inputs = (X.clone().requires_grad_(), weight)
    assert torch.autograd.gradcheck(
        function,
        inputs,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        atol=1e-5,
    )
    if not train:
        assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)
