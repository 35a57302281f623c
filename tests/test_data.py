"""lipgan.data: the digits, and the order of the batches."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from lipgan import data
from lipgan.data import BatchOrder, Dataset


@pytest.mark.parametrize("size", [8, 12, 16, 32])
def test_digits_have_the_documented_layout(size: int) -> None:
    digits = data.load("digits", size)
    assert digits.samples.shape == (1797, 1, size, size)
    assert digits.samples.dtype == torch.float32
    assert digits.samples.min() == -1
    assert digits.samples.max() == 1
    assert digits.shape == (1, size, size)
    assert len(digits) == 1797
    assert digits.labels is not None
    assert digits.labels.tolist() == load_digits().target.tolist()


def test_digits_at_their_own_size_are_the_original_levels() -> None:
    levels = (data.load("digits", 8).samples.squeeze(1) + 1) * 8
    assert torch.equal(levels.double(), torch.from_numpy(load_digits().images))


def test_scaling_up_keeps_the_picture() -> None:
    small, large = data.load("digits", 8).samples, data.load("digits", 32).samples
    back = F.avg_pool2d(large, 4)

    def error(other: torch.Tensor) -> float:
        return float((back - other).abs().mean())

    # The interpolation smooths a little; a grid that is shifted, mirrored or transposed is off by far more.
    others = [small.roll(1, 2), small.roll(-1, 2), small.roll(1, 3), small.roll(-1, 3)]
    others += [small.flip(2), small.flip(3), small.transpose(2, 3)]
    assert 3 * error(small) < min(map(error, others))


@pytest.mark.parametrize("size", [0, 7, -8])
def test_digits_refuse_a_size_below_their_own(size: int) -> None:
    with pytest.raises(ValueError, match=f"at least 8.*got {size}"):
        data.load("digits", size)


def test_unknown_name_tells_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'digit'; did you mean digits\?"):
        data.load("digit")


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        (torch.zeros(0, 2), None, "n >= 1"),
        (torch.zeros(3), None, "n >= 1"),
        (torch.zeros(3, 2, dtype=torch.int64), None, "floating point, got torch.int64"),
        (torch.full((3, 2), float("nan")), None, "NaN"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), r"labels must be \[3\]"),
    ],
)
def test_dataset_refuses(samples: torch.Tensor, labels: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset("mine", samples, labels)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 10), (7, 16), (1, 4)])
def test_every_epoch_visits_every_sample_once(n: int, batch_size: int) -> None:
    order = BatchOrder(n, seed=3)
    visited = torch.cat([order.next(batch_size) for _ in range(3 * n)])
    assert len(visited) == 3 * n * batch_size
    epochs = visited[: 3 * n].view(3, n)
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(n))


def test_order_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = BatchOrder(100, seed=5).next(100)
    torch.manual_seed(2)
    assert torch.equal(first, BatchOrder(100, seed=5).next(100))
    assert not torch.equal(first, BatchOrder(100, seed=6).next(100))


@pytest.mark.parametrize("batches", [0, 1, 4, 5])
def test_order_resumes_where_it_was_saved(batches: int) -> None:
    whole, first, second = (BatchOrder(10, seed=1), BatchOrder(10, seed=1), BatchOrder(10, seed=99))
    for _ in range(batches):
        assert torch.equal(whole.next(4), first.next(4))
    second.load_state_dict(first.state_dict())
    for _ in range(10):
        assert torch.equal(whole.next(4), second.next(4))


def test_order_refuses_the_state_of_another_data_set() -> None:
    with pytest.raises(ValueError, match="10 samples, the data set has 11"):
        BatchOrder(11, seed=0).load_state_dict(BatchOrder(10, seed=0).state_dict())
