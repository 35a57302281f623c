"""The device without hardware refuses and counts what it says it does."""

import pytest
import torch
from emulated_device import DEVICE, crossings
from torch import Tensor, nn

X = torch.arange(6.0).reshape(2, 3)


def test_the_numbers_are_those_of_the_cpu() -> None:
    layer = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    on_device = layer.to(DEVICE)
    value = on_device(x.to(DEVICE)).square().sum()
    grads = torch.autograd.grad(value, list(on_device.parameters()))
    assert value.device == DEVICE
    for ours, theirs in zip(grads, expected, strict=True):
        assert ours.device == DEVICE
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("make", [torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn])
def test_factories(make: object) -> None:
    tensor = make(2, 3, device=DEVICE)  # type: ignore[operator]
    assert tensor.device == DEVICE
    assert tensor.cpu().shape == (2, 3)
    like = torch.zeros_like(tensor)
    assert like.device == DEVICE
    assert (like + tensor.new_ones(3)).cpu().tolist() == [[1.0] * 3] * 2
    assert torch.tensor([1.0, 2.0], device=DEVICE).tolist() == [1.0, 2.0]
    assert torch.eye(2, device=DEVICE).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_tensors_of_two_devices_do_not_mix() -> None:
    x = X.to(DEVICE)
    for other in (X, X.to("meta")):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            x + other
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        nn.Linear(3, 2)(x)
    with pytest.raises(RuntimeError, match="by indices on emulated"):
        X[torch.tensor([0]).to(DEVICE)]
    assert (x + torch.tensor(1.0)).tolist() == (X + 1).tolist(), "a number of the host is an argument"
    assert x[torch.tensor([1])].tolist() == X[1:].tolist(), "so are indices, which are copied"


def test_no_way_to_numpy_but_through_the_cpu() -> None:
    x = X.to(DEVICE)
    with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\) first"):
        x.numpy()
    with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\) first"):
        x.__array__()
    assert (x.numpy(force=True) == X.numpy()).all()


def test_random_numbers_of_another_device_are_refused() -> None:
    for draw in (torch.rand, torch.randn):
        with pytest.raises(RuntimeError, match="device type for generator but found 'cpu'"):
            draw(3, device=DEVICE, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="device type for generator but found 'cpu'"):
        X.to(DEVICE).normal_(generator=torch.Generator())


def seen(run: object) -> list[str]:
    with crossings() as records:
        run()  # type: ignore[operator]
    return records


def test_crossings() -> None:
    x = X.to(DEVICE)

    def write() -> None:
        x.copy_(X)

    assert seen(lambda: X.to(DEVICE)) == ["to device [2, 3]"]
    assert seen(lambda: X.to(DEVICE, non_blocking=True)) == ["to device, later [2, 3]"]
    assert seen(lambda: torch.tensor([1.0], device=DEVICE)) == ["to device [1]"]
    assert seen(write) == ["to device [2, 3]"]
    assert seen(lambda: x[torch.tensor([1])]) == ["to device [1]"]
    assert seen(lambda: x.cpu()) == ["to host [2, 3]"]
    assert seen(lambda: x.sum().item()) == ["number to host []"]
    assert seen(lambda: bool((x > 0).all())) == ["number to host []"]
    assert seen(lambda: x[x > 0]) == ["size to host [2, 3]"]
    assert seen(lambda: x.nonzero()) == ["size to host [2, 3]"]
    assert seen(lambda: (x.double() @ x.double().T).relu().sum()) == []
    assert seen(lambda: x.to(DEVICE)) == []


def test_what_a_test_makes_is_on_the_device(device: torch.device) -> None:
    """This folder does not follow the device; what follows is told by the file that calls."""
    assert device == DEVICE
    assert isinstance(X, Tensor)
    assert X.device.type == "cpu"
