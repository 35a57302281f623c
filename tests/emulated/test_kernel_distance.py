"""The kernel distance on a device: few waits, and few launches for a subset."""

import sys
from typing import Any

import pytest
import torch
from emulated_device import DEVICE, crossings
from torch.utils._python_dispatch import TorchDispatchMode

from lipgan.metrics import kernel_distance

module: Any = sys.modules["lipgan.metrics.kernel_distance"]

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize("options", [{"subsets": 20, "subset_size": 50}, {"subset_size": None}], ids=str)
@pytest.mark.parametrize(("kernel", "lengths"), [("polynomial", 0), ("rbf", 1)])
def test_the_host_waits_three_times_and_for_lengths(options: dict[str, Any], kernel: str, lengths: int) -> None:
    x, y = (torch.randn(300, 8, dtype=torch.float64) + shift for shift in (0.0, 0.5))
    with crossings() as records:
        value = kernel_distance(
            x.to(DEVICE), y.to(DEVICE), **options, kernel=kernel, generator=torch.Generator().manual_seed(0)
        )
    # Either side finite; the largest length; mean and deviation.
    assert [r for r in records[2:] if "host" in r] == ["number to host []"] * (2 + lengths) + ["to host [2]"]
    expected = kernel_distance(x, y, **options, kernel=kernel, generator=torch.Generator().manual_seed(0))
    assert value == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_what_is_not_finite_is_refused() -> None:
    x = torch.full((8, 4), 1e60, dtype=torch.float64).to(DEVICE)
    with pytest.raises(ValueError, match="small enough for their kernel"):
        kernel_distance(x, x, subset_size=None, degree=6)


class Launches(TorchDispatchMode):
    """Counts the operations on a device that are no views, each a launch at least."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += not function.is_view
        return function(*arguments, **(keywords or {}))


def test_a_subset_is_one_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subsets one by one: a number of launches that does not grow with the size of a subset up to a thousand."""
    monkeypatch.setitem(module._SUBSET_COLUMNS, torch.float64, float("inf"))
    x = torch.randn(1000, 2, dtype=torch.float64).to(DEVICE)
    counts = []
    for size in (100, 1000):
        with Launches() as launches:
            kernel_distance(x, x, 2, size)
        counts.append(launches.count)
    assert counts[0] == counts[1] < 130
