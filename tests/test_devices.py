"""LIPGAN_TEST_DEVICE: which tensors of the tests lie on the device, and what the tests do on one without hardware."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import devices
import pytest
import torch

import lipgan

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:x", "CPU"])
def test_an_unknown_device_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"LIPGAN_TEST_DEVICE must be cpu, cuda, cuda:N or emulated, got '{name}'"):
        devices.chosen(name)


def test_a_gpu_that_is_not_there_is_named() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"LIPGAN_TEST_DEVICE is 'cuda:{count}', and torch finds {count} GPUs"):
        devices.chosen(f"cuda:{count}")


def test_the_cpu_needs_no_name(device: torch.device) -> None:
    assert devices.chosen("cpu").type == "cpu"
    assert device == devices.DEVICE


@pytest.fixture
def following_meta() -> Iterator[None]:
    functions = devices.follow(torch.device("meta"))
    yield
    for name, function in functions.items():
        setattr(torch, name, function)


def evaluated(code: str, filename: str) -> Any:
    """The value of an expression, as if it stood in a file of this repository."""
    return eval(
        compile(code, str(ROOT / filename), "eval"),
        {"torch": torch, "nn": torch.nn, "lipgan": lipgan, "__name__": "elsewhere"},
    )


FOLLOWING = ["tests/ops/test_spectral_norm.py", "tests/metrics/test_frechet.py", "tests/harness/penalty_critics.py"]
STAYING = [
    "lipgan/systems/base.py",
    "lipgan/nn/layers.py",
    "kernels/config.py",
    "tests/kernels/test_matrix_sqrt.py",
    "tests/training/test_trainer.py",
    "tests/metrics/test_inception.py",
    "tests/harness/fuzz.py",
]


@pytest.mark.cpu
@pytest.mark.usefixtures("following_meta")
@pytest.mark.parametrize("code", ["torch.randn(2, 3)", "torch.tensor([1.0])", "torch.eye(2)", "nn.Linear(2, 3).weight"])
def test_what_a_test_makes_follows_and_what_the_library_makes_does_not(code: str) -> None:
    for filename in FOLLOWING:
        assert evaluated(code, filename).device.type == "meta", filename
    for filename in STAYING:
        assert evaluated(code, filename).device.type == "cpu", filename


@pytest.mark.cpu
@pytest.mark.usefixtures("following_meta")
def test_a_layer_of_the_library_belongs_to_who_asked_for_it() -> None:
    for code in ("lipgan.nn.SNLinear(3, 2).bias", "nn.Sequential(lipgan.nn.SNConv2d(3, 2, 1))[0].bias"):
        assert evaluated(code, FOLLOWING[0]).device.type == "meta", code
        assert evaluated(code, "lipgan/systems/base.py").device.type == "cpu", code


@pytest.mark.cpu
@pytest.mark.usefixtures("following_meta")
def test_a_device_that_is_named_is_kept() -> None:
    for code in ("torch.zeros(2, device='cpu')", "torch.zeros(2, out=torch.zeros(2, device='cpu'))"):
        assert evaluated(code, FOLLOWING[0]).device.type == "cpu"
    leaf = evaluated("torch.ones(2, requires_grad=True)", FOLLOWING[0])
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert not evaluated("torch.ones(2)", FOLLOWING[0]).requires_grad


@pytest.mark.cpu
def test_the_numbers_are_those_of_the_cpu() -> None:
    """They are drawn there and moved, so that a test sees the same ones on every device."""
    torch.manual_seed(3)
    expected = torch.randn(4)
    functions = devices.follow(torch.device("cpu"))
    try:
        torch.manual_seed(3)
        assert torch.equal(evaluated("torch.randn(4)", FOLLOWING[0]), expected)
    finally:
        for name, function in functions.items():
            setattr(torch, name, function)


def run_on(device: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LIPGAN_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_wrong_name_ends_the_run_in_a_sentence() -> None:
    result = run_on("gpu", "tests/ops")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "LIPGAN_TEST_DEVICE must be cpu, cuda, cuda:N or emulated, got 'gpu'" in result.stdout + result.stderr


# What is about the device itself, training steps that never wait for it among it, and of the penalties and layers what
# is cheap and reaches most of their code. Whole folders run on it by hand.
ON_THE_EMULATED = [
    "tests/emulated",
    "tests/nn/test_gradient_normalization.py",
    "tests/nn/test_layers.py",
    "tests/penalties/test_parts.py",
    "tests/penalties/test_values.py",
]


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch knows no devices written in Python",
)
def test_on_the_emulated_device() -> None:
    result = run_on("emulated", *ON_THE_EMULATED, "-m", "not slow")
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
