"""The device that the tests run on: ``LIPGAN_TEST_DEVICE``, by default the CPU.

Where it is another one, what a test file makes (`FOLLOWING`) lies there: what `torch.randn` and its like return when a
test or this folder calls them without a ``device``, and the modules of `torch.nn` and `lipgan.nn`. It is made on the
CPU, with its random numbers, and moved: a test sees the same numbers on every device. What the library makes stays
where the library puts it, so that a ``device=`` which the library forgets is an error, as it is for its users;
`torch.set_default_device` would hide it.

"emulated" is a device without hardware (`emulated_device`), on which the same rules hold as on a GPU.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._device import _device_constructors

VARIABLE = "LIPGAN_TEST_DEVICE"
TESTS = Path(__file__).resolve().parents[1]
#: Folders of tests that follow the device.
FOLLOWING = ("linalg", "metrics", "nn", "ops", "penalties")
#: Files of theirs that do not: what they test is on the CPU.
_STAYING = ("metrics/test_inception.py",)
#: Files of this folder that make tensors for them.
_SHARED = ("penalty_critics.py", "tape_critics.py", "tolerance.py")


def chosen(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", or "emulated".

    Raises:
        ValueError: no such device, or none that is there.
    """
    if name == "emulated":
        import emulated_device

        return emulated_device.DEVICE
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{VARIABLE} must be cpu, cuda, cuda:N or emulated, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{VARIABLE} is {name!r}, and torch finds {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


@functools.cache
def follows(filename: str) -> bool:
    """Whether what the code of a file makes lies on the device."""
    path = Path(filename)
    if not path.is_relative_to(TESTS):
        return False
    folder, *rest = path.relative_to(TESTS).parts
    if path.relative_to(TESTS).as_posix() in _STAYING:
        return False
    return folder in FOLLOWING or (folder == "harness" and rest[0] in _SHARED)


def _of_a_module(frame: FrameType) -> bool:
    """Whether a frame belongs to a module of torch.nn, or makes one of lipgan.nn."""
    name = frame.f_globals.get("__name__", "")
    if name.startswith("lipgan.nn."):
        if frame.f_code.co_name in ("<genexpr>", "<listcomp>", "<dictcomp>"):  # of what asks for its items
            return True
        return frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), torch.nn.Module)
    return name.startswith("torch.nn.")


def _asked_by_a_test() -> bool:
    # A module of torch.nn belongs to the one who asked for it; a parameter that waits for its shape is no tensor yet.
    frame = sys._getframe(2)
    if frame.f_globals.get("__name__") == "torch.nn.parameter":
        return False
    while _of_a_module(frame) and frame.f_back is not None:
        frame = frame.f_back
    return follows(frame.f_code.co_filename)


def _on(device: torch.device, make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None or kwargs.get("out") is not None or not _asked_by_a_test():
            return make(*args, **kwargs)
        differentiable = kwargs.pop("requires_grad", False)
        tensor = make(*args, **kwargs).to(device)
        return tensor.requires_grad_() if differentiable else tensor

    return made


def follow(device: torch.device) -> dict[str, Callable[..., Any]]:
    """From now on, what tests make lies on ``device``: what stands in the namespace of torch instead, by name."""
    functions = {f.__name__: f for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
    replaced = {name: _on(device, make) for name, make in functions.items()}
    for name, function in replaced.items():
        setattr(torch, name, function)
    return functions


def serve_as_cpu(device: torch.device) -> None:
    """Let every backend serve ``device`` that serves the CPU: the emulated device hands on what it is asked."""
    from lipgan.ops import _backend

    missing: Any = _backend._missing
    orders: Any = _backend._ORDER
    _backend._missing = lambda backend, kind: missing(backend, "cpu" if kind == device.type else kind)
    orders[device.type] = orders["cpu"]


def as_on_cpu(value: float) -> Any:
    """What a result must equal that was computed on the CPU, of one on the device: the same but for rounding."""
    import pytest

    return value if DEVICE.type == "cpu" else pytest.approx(value, rel=1e-9)


DEVICE = chosen(os.environ.get(VARIABLE) or "cpu")
