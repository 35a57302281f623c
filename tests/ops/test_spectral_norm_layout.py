"""How weights lie in memory: the two integers, against the places of the elements themselves."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lipgan.ops.spectral_norm.layout import memory_order
from lipgan.reference.spectral_norm import to_matrix


def places(weight: Tensor, dim: int, inner: int, channels: int) -> Tensor:
    """[h, w]: where the elements of the matrix lie, by the description."""
    h = weight.shape[dim]
    w = weight.numel() // h
    m = torch.arange(w)
    offsets = torch.arange(h)[:, None] * inner + m // inner * h * inner + m % inner
    described = torch.empty(h, w, dtype=torch.int64)
    described[:, m % channels * (w // channels) + m // channels] = offsets
    return described


def in_memory(shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """A weight of that shape whose dimensions lie in that order, with the place of each element as its value."""
    values = torch.arange(math.prod(shape)).view([shape[d] for d in order])
    return values.permute([order.index(d) for d in range(len(shape))])


@pytest.mark.parametrize(
    "shape", [(3, 5), (1, 4), (4, 3, 5), (2, 3, 1), (4, 3, 2, 5), (2, 1, 3, 4), (3, 2, 1, 1), (1, 1, 1)]
)
def test_the_description_says_where_elements_lie(shape: tuple[int, ...]) -> None:
    for order in itertools.permutations(range(len(shape))):
        weight = in_memory(shape, order)
        for dim in range(len(shape)):
            found = memory_order(weight, dim)
            if found is None:
                continue
            w = weight.numel() // shape[dim]
            assert w in found
            assert torch.equal(places(weight, dim, *found), to_matrix(weight, dim))


@pytest.mark.parametrize(
    ("shape", "format", "dim", "expected"),
    [
        ((6, 5), torch.contiguous_format, 0, (5, 5)),
        ((6, 5), torch.contiguous_format, 1, (1, 6)),
        ((6, 5, 3, 2), torch.contiguous_format, 0, (30, 30)),
        ((6, 5, 3, 2), torch.channels_last, 0, (30, 5)),
        ((6, 5, 3, 2), torch.contiguous_format, 1, (6, 36)),
        ((6, 5, 3, 2), torch.channels_last, 1, (1, 36)),
        ((6, 5, 3, 2), torch.contiguous_format, 3, (1, 90)),
        ((6, 5, 3, 2), torch.channels_last, 2, None),
        ((6, 5, 3, 2, 2), torch.channels_last_3d, 0, (60, 5)),
        ((6, 5, 3, 2, 2), torch.channels_last_3d, 1, (1, 72)),
        # Sizes of 1: a kernel of one pixel, one channel, one row.
        ((6, 5, 1, 1), torch.channels_last, 0, (5, 5)),
        ((6, 5, 1, 1), torch.channels_last, 1, (1, 6)),
        ((6, 1, 3, 2), torch.channels_last, 0, (6, 6)),
        ((1, 5, 3, 2), torch.channels_last, 0, (30, 5)),
        ((6, 1, 3, 2), torch.channels_last, 1, (36, 36)),
        ((1, 5, 3, 2), torch.contiguous_format, 1, (6, 6)),
        # Empty ones.
        ((0, 5, 3, 2), torch.channels_last, 0, (30, 30)),
        ((6, 0), torch.contiguous_format, 0, (0, 0)),
        ((6, 0), torch.contiguous_format, 1, (6, 6)),
    ],
)
def test_the_layouts_of_layers(
    shape: tuple[int, ...], format: torch.memory_format, dim: int, expected: tuple[int, int] | None
) -> None:
    weight = torch.empty(shape).contiguous(memory_format=format)
    assert memory_order(weight, dim) == expected


def test_strides_of_sizes_of_one_say_nothing() -> None:
    weight = torch.empty(30).as_strided((6, 1, 5, 1), (5, 77, 1, 0))
    assert memory_order(weight, 0) == (5, 5)
    assert memory_order(weight, 1) == (30, 30)
    assert memory_order(weight, 2) == (1, 6)


@pytest.mark.parametrize(
    "weight",
    [
        torch.empty(6, 1).expand(6, 5),
        torch.empty(6, 10)[:, ::2],
        torch.empty(6, 10)[:, :5],
        torch.empty(30).as_strided((6, 5), (2, 1)),
        torch.empty(30).as_strided((2, 2), (1, 1)),
        torch.empty(4, 3, 2, 5).transpose(1, 2),
    ],
    ids=["expanded", "strided", "cut", "overlapping", "equal strides", "exchanged"],
)
def test_what_has_no_description(weight: Tensor) -> None:
    assert memory_order(weight, 0) is None
