"""docs/gpu-model.md: that it is what its script writes, and that the script knows every kernel."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = [pytest.mark.cpu, pytest.mark.backend("triton")]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_model", ROOT / "scripts" / "gpu_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_model"] = module
    spec.loader.exec_module(module)
    return module


def test_every_kernel_is_known(model: ModuleType) -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "kernels").glob("**/*.py"))
    kernels = set(re.findall(r"^def (\w+_kernel)\($", sources, re.MULTILINE))
    assert kernels - {"fill_kernel"} == set(model.LAUNCHES)


@pytest.mark.slow
def test_the_page_is_what_the_script_writes(model: ModuleType) -> None:
    written = model.without_host(model.PAGE.read_text())
    assert written == model.without_host(model.page(lambda row: None)), "make gpu-model"


def test_the_times_of_the_host_are_left_out(model: ModuleType) -> None:
    assert model.without_host("a | b\n| op | 1 | 20 |\n") == model.without_host("a | b\n| op | 1 | 30 |\n")
    assert model.without_host("| op | 1 | 20 |") != model.without_host("| op | 2 | 20 |")


def test_bytes_follow_from_the_tables(model: ModuleType) -> None:
    h, w = 64, 96
    forward, *backwards = model._spectral_rows("", [(h, w)] * 3, torch.float32)
    with model.recorded() as ours:
        forward.ours()
    assert len(ours.launches) == 3
    # W in the iteration and in the scaling, Y; all else is small beside them.
    least = 3 * 3 * h * w * 4
    assert least <= ours.read + ours.written <= 1.25 * least
    assert 3 * 5 * h * w <= ours.operations <= 1.25 * 3 * 6 * h * w
    # dY twice, Y, dW; and three matrices twice and two results.
    for backward, launches, arrays in zip(backwards, (2, 1, 2), (4, 4, 8), strict=True):
        with model.recorded() as ours:
            backward.ours()
        assert len(ours.launches) == launches
        least = 3 * arrays * h * w * 4
        assert least <= ours.read + ours.written <= 1.1 * least


def test_operations_of_torch_are_counted(model: ModuleType) -> None:
    a, b = torch.ones(8, 5), torch.ones(5)
    work = model.counted(lambda: (torch.mv(a, b) * 2).view(2, 4).t())
    assert work.launches == ["mv.default", "mul.Tensor"]
    assert (work.read, work.written, work.operations) == ((40 + 5 + 8) * 4, (8 + 8) * 4, 80 + 8)
    card = model.Card("card", 1e9, {torch.float32: 1e6, torch.float64: 1e6})
    assert work.seconds(card, torch.float16) == pytest.approx(88e-6)  # of the operations, the slower of the two
