"""Tables of the grouped kernels: a steady call copies nothing, none is stale, none that a graph reads is dropped."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from lipgan.kernels import aot, matrix_sqrt
from lipgan.kernels import spectral_norm as kernels
from lipgan.kernels.spectral_norm import backward, forward, tables
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from lipgan.ops.spectral_norm import backends

pytestmark = pytest.mark.interpreter

SHAPES = [(5, 7), (4, 3, 2, 2), (1, 9)]
EPS = 1e-12


def group(shapes: list[tuple[int, ...]] = SHAPES) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    weights = [torch.randn(shape) for shape in shapes]
    return weights, [torch.randn(w.shape[0]) for w in weights], [torch.randn(w[0].numel()) for w in weights]


def step(weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> list[Tensor]:
    ys, sigma, uv = kernels.spectral_norm_fwd(weights, us, vs, 1, EPS)
    return [*ys, sigma, uv, *kernels.spectral_norm_bwd(weights, None, ys, sigma, uv)]


def on_fresh_tables(*arguments: list[Tensor]) -> list[Tensor]:
    for plans in (forward.forward_plans, backward.backward_plans):
        plans.clear()
    tables.forget_addresses()
    return step(*arguments)


class Operations(TorchDispatchMode):
    """The names of the operations of PyTorch, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """The names of kernels that are launched; they do not run."""
    names: list[str] = []

    def record(kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
        names.append(kernel.fn.__name__)

    tables.forget_addresses()
    with mock.patch.object(InterpretedFunction, "run", record):
        yield names
    tables.forget_addresses()


@pytest.mark.parametrize("shapes", [SHAPES, [(3, 4)] * 9])
def test_a_steady_call_allocates_its_outputs_and_copies_nothing(
    launched: list[str], shapes: list[tuple[int, ...]]
) -> None:
    arguments = group(shapes)
    forward.forward_plans.clear()
    backward.backward_plans.clear()
    with Operations() as first:
        outputs = step(*arguments)
    assert "_to_copy.default" in first.names or "lift_fresh.default" in first.names, "the tables of the shapes"
    assert "fill_kernel" in launched
    launched.clear()
    ys, sigma, uv = outputs[: len(shapes)], outputs[len(shapes)], outputs[len(shapes) + 1]
    with Operations() as steady:
        kernels.spectral_norm_fwd(*arguments, 1, EPS)
        kernels.spectral_norm_bwd(arguments[0], None, ys, sigma, uv)
    # Y and dW of each layer; u with v, sigma and scratch; partial products. Tables of new addresses, and their parts.
    made = [name for name in steady.names if name != "slice.Tensor"]
    assert set(made) == {"empty.memory_format", "empty_like.default"}
    assert made.count("empty_like.default") == 2 * len(shapes)
    fills = launched.count("fill_kernel")
    assert made.count("empty.memory_format") <= 4 + 2
    assert [name for name in launched if name != "fill_kernel"] == [
        "spectral_norm_iterate_kernel",
        "spectral_norm_reduce_kernel",
        "spectral_norm_scale_kernel",
        "_spectral_norm_grad_dot_kernel",
        "_spectral_norm_grad_weight_kernel",
    ]
    assert fills <= -(-4 * len(shapes) // tables.FILLED) + -(-3 * len(shapes) // tables.FILLED)


def laid(shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """A weight whose dimensions lie in that order."""
    return torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


@pytest.mark.parametrize(
    ("shape", "order", "dim"),
    [
        ((4, 3, 2, 2), (0, 2, 3, 1), 0),
        ((4, 3, 2, 2), (0, 1, 2, 3), 1),
        ((4, 3, 2, 2), (0, 2, 3, 1), 1),
        ((4, 3, 2, 2, 2), (0, 2, 3, 4, 1), 0),
        ((4, 3), (1, 0), 0),
    ],
    ids=["channels last", "transposed convolution", "that channels last", "channels last 3d", "transposed matrix"],
)
def test_no_weight_is_copied_however_it_lies(
    launched: list[str], shape: tuple[int, ...], order: tuple[int, ...], dim: int
) -> None:
    weights, dims = [laid(shape, order), laid(shape, order)], [dim, dim]
    us = [torch.randn(shape[dim])] * 2
    vs = [torch.randn(weights[0].numel() // shape[dim])] * 2

    def call() -> list[list[Tensor]]:
        ys, sigma, uv = backends.fwd(weights, us, vs, 1, EPS, dims, "triton")
        grads = backends.bwd(weights, None, ys, sigma, uv, dims, "triton")
        return [ys, grads, *backends.double_bwd(weights, weights, ys, sigma, uv, dims, "triton")[:2]]

    call()  # makes the plans
    with Operations() as steady:
        results = call()
    assert {name.partition(".")[0] for name in steady.names} == {"empty", "empty_like", "unbind"}
    for group in results:
        assert [tensor.stride() for tensor in group] == [weight.stride() for weight in weights]
    other = [
        weight.contiguous() if order != (0, 1, 2, 3) else weight.movedim(0, 1).contiguous().movedim(1, 0)
        for weight in weights
    ]
    with Operations() as copying:
        backends.bwd(
            other, None, results[0], torch.ones(2), torch.ones(2 * (us[0].numel() + vs[0].numel())), dims, "triton"
        )
    assert [name for name in copying.names if "copy" in name] == ["copy_.default"] * 2, "gradients that lie otherwise"


def test_addresses_that_come_back_find_their_table(launched: list[str]) -> None:
    like = torch.zeros(3)
    table = tables.address_table([16, 32, 48], like)
    assert tables.address_table([16, 32, 48], like) is table
    assert tables.address_table([16, 32, 64], like) is not table
    assert launched == ["fill_kernel"] * 2
    with mock.patch.object(tables, "stream_of", return_value=7):  # whose launches nothing orders after ours
        assert tables.address_table([16, 32, 48], like) is not table


def test_a_table_holds_its_addresses() -> None:
    addresses = [2**40 + 8 * i for i in range(3 * tables.FILLED + 5)]
    addresses[:3] = [0, 1, 16]  # which Triton would take for constants
    table = tables.address_table(addresses, torch.zeros(1))
    assert table[: len(addresses)].tolist() == addresses


def test_few_tables_are_kept(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_KEPT_TABLES", 4)
    for i in range(9):
        tables.address_table([i], torch.zeros(1))
    assert [key[-1] for key in tables._tables] == [5, 6, 7, 8]


def test_groups_that_take_turns_and_memory_that_changes_hands() -> None:
    one, other = group(), group([(5, 7), (4, 12)])
    expected = [[x.clone() for x in on_fresh_tables(*arguments)] for arguments in (one, other)]
    for _ in range(2):
        for arguments, values in zip((one, other), expected, strict=True):
            assert all(map(torch.equal, step(*arguments), values))
    # The weights of one group take the memory of the other's, and its own goes to new ones.
    for mine, theirs in zip(one[0], other[0], strict=False):
        flat = theirs.view(-1)
        mine.data, theirs.data = flat[: mine.numel()].view(mine.shape).clone(), mine.view(-1)[:1].expand_as(theirs)
        theirs.data = torch.randn(theirs.shape)
    for arguments in (one, other, one):
        values = [x.clone() for x in step(*arguments)]
        assert all(map(torch.equal, values, on_fresh_tables(*arguments)))


def test_new_numbers_in_the_same_memory() -> None:
    """As between two replays of a graph: the table is the same, and what it points to is read again."""
    arguments = group()
    step(*arguments)
    for tensors in arguments:
        for tensor in tensors:
            tensor.normal_()
    values = [x.clone() for x in step(*arguments)]
    assert all(map(torch.equal, values, on_fresh_tables(*arguments)))


def test_a_graph_writes_tables_of_its_own(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(3)
    before = tables.address_table([16, 32], like)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "is_capturing", lambda like: True)
        captured = [tables.address_table([16, 32], like) for _ in range(2)]
    assert launched == ["fill_kernel"] * 3, "a launch that the graph replays, each time"
    assert len({id(table) for table in (before, *captured)}) == 3
    assert tables.address_table([16, 32], like) is before, "what was written in a graph is not known outside of it"


def test_plans_of_graphs_are_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = tables.Plans(lambda number: [number], size=4)
    like = torch.zeros(1)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "is_capturing", lambda like: True)
        held = plans.of((0,), like)
    for number in range(1, 20):
        plans.of((number,), like)
    assert plans.of((0,), like) is held
    assert len(plans.plans) <= 4
    # While a graph is captured nothing is waited for, and so nothing is dropped.
    patched = mock.patch.object(tables, "is_capturing", return_value=True)
    with patched, mock.patch.object(plans, "_drop") as drop:
        for number in range(30, 40):
            plans.of((number,), like)
    drop.assert_not_called()


def test_launches_that_were_only_recorded_leave_no_table() -> None:
    arguments = group()
    with aot.recorded():
        step(*arguments)
    assert not tables._tables


def test_coefficients_are_arguments_of_the_kernel(launched: list[str]) -> None:
    with Operations() as operations:
        matrix_sqrt.polar_iteration(torch.randn(6, 4), [(1.875, -1.25, 0.375)])
    assert launched == ["_matrix_sqrt_gram_kernel", "_matrix_sqrt_gram_kernel", "_matrix_sqrt_product_kernel"]
    assert not [name for name in operations.names if "copy" in name or "fresh" in name]
