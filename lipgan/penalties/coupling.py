"""Whether a critic couples the samples of its batch: whether a score depends on other samples than its own.

`SampleTracker` follows the operations of one forward pass and knows of every intermediate tensor along which dimension
the samples lie. What it does not know counts as coupled, so that a wrong answer costs time and no digit. Batch norm in
training, the standard deviation of a minibatch, attention across the batch and packs of rows are coupled; convolutions,
layers, activations, other norms and attention within a sample are not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef

from lipgan.penalties.mode import Mode
from lipgan.penalties.undo import Undo, changed, is_random, mutated, mutates, tensors_of


class CoupledSamples(Exception):
    """The critic couples the samples of a batch."""


class Rows(NamedTuple):
    """Where the samples lie: index i of dimension ``dim`` belongs to sample ``(i // inner) % B``."""

    dim: int
    inner: int


_MIXED = Rows(-1, 0)  # depends on the samples, in no order that is known

_Result = Rows | None  # None: mixed
_Handler = Callable[["SampleTracker", Any, tuple[Any, ...], dict[str, Any], Any], _Result]


class Ancestry:
    """Which tensors autograd knows to depend on ``x``, a leaf."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        # Autograd numbers its nodes, but those of each thread on their own: that a number is lower says nothing.
        self._independent: set[Any] = set()

    def hiding(self, tensor: Tensor) -> Any:
        """None for a tensor that does not depend on x; else the function on the way that hides that it does."""
        pending = [(tensor.grad_fn, tensor.grad_fn)]
        while pending:
            function, hiding = pending.pop()
            if function is None or function in self._independent:
                continue
            self._independent.add(function)
            if isinstance(function, BackwardCFunction):
                hiding = function
            if getattr(function, "variable", None) is self._x:
                return hiding
            pending += [(following, hiding) for following, _ in function.next_functions]
        return None


class SampleTracker:
    """Where the samples lie in what a critic computes from ``x``.

    Args:
        x: ``[B, ...]``, a leaf that requires a gradient.
    """

    def __init__(self, x: Tensor) -> None:
        self._owner, self._batch = object(), x.shape[0]
        self._coupled = False
        self._ancestry = Ancestry(x)
        # Memory that holds samples -> whether they are mixed in it. The reference keeps the address taken.
        self._storages: dict[int, tuple[StorageWeakRef, bool]] = {}
        self._mark(x, Rows(0, 1))

    def apart(self, scores: Tensor, *, in_order: bool = False) -> bool:
        """Whether each of the scores depends on one sample only.

        Args:
            in_order: and whether the first half of the scores, along their first dimension, is that of the first half
                of the samples.
        """
        rows = self._rows(scores)
        if self._coupled or rows is None or rows is _MIXED:
            return False
        return not in_order or (rows.dim == 0 and len(scores) == self._batch * rows.inner)

    def uncoupled(self, rows: Rows) -> bool:
        """Whether a part of a tensor depends on one sample only, by its `Rows`, which `given` told."""
        return not self._coupled and rows is not _MIXED

    def is_batch(self, size: int) -> bool:
        """Whether it is the number of samples."""
        return size == self._batch

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note what an operation, which has run, made of the samples."""
        if self._coupled:
            return
        operands = tensors_of([*args, *kwargs.values()])
        found = [self._rows(tensor) for tensor in operands]
        name = func.overloadpacket.__name__
        if all(rows is None for rows in found):
            if name.startswith("unsafe_split"):  # parts that are changed apart from each other, as in a GRU
                for part in result:
                    part._lipgan_rows = self._owner, None
            return
        if name in _CONSTANTS:
            return
        outputs = tensors_of(result)
        if not outputs:  # a number or a decision
            self._coupled = True
            return
        rows: Rows | None = None
        if _MIXED not in found:
            handler = _handler(func)
            rows = None if handler is None else handler(self, func, args, kwargs, result)
        if name in _OF_SHAPE:
            self._mark(args[0], rows or _MIXED)
        elif mutates(func) and not ("batch_norm" in name and not _trains(func, args, kwargs)):
            for k, tensor in enumerate(mutated(func, args, kwargs)):
                self._write(tensor, rows if k == 0 else None)
        for output in outputs:
            if not any(output is tensor for tensor in operands):
                self._mark(output, rows or _MIXED)

    def _rows(self, tensor: Tensor) -> Rows | None:
        """Where the samples lie in a tensor, `_MIXED`, or None where it does not depend on them."""
        try:
            known = self._storages.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse, or another layout without memory of its own
            return _MIXED
        if known is None:
            if isinstance(tensor.grad_fn, BackwardCFunction) and self._ancestry.hiding(tensor) is not None:
                self._coupled = True
            return None
        if known[1]:
            return _MIXED
        owner, rows = getattr(tensor, "_lipgan_rows", (None, _MIXED))  # none on an alias such as .data
        return rows if owner is self._owner else _MIXED

    def _mark(self, tensor: Tensor, rows: Rows) -> None:
        size = 0 if rows is _MIXED or rows.dim >= tensor.ndim else tensor.shape[rows.dim]
        fits = size > 0 and size % (self._batch * rows.inner) == 0
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            self._coupled = True
            return
        known = self._storages.get(storage._cdata)
        reference = StorageWeakRef(storage) if known is None else known[0]  # type: ignore[no-untyped-call]
        self._storages[storage._cdata] = reference, not fits or (known is not None and known[1])
        tensor._lipgan_rows = self._owner, rows  # type: ignore[attr-defined]

    def _write(self, tensor: Tensor, rows: Rows | None) -> None:
        """Note a change in place."""
        before = self._rows(tensor)
        if before is None:
            # Where a part of the memory lies in the whole is not known.
            self._mark(tensor, _MIXED if rows is None or tensor._base is not None else rows)
        elif before != rows:
            self._mark(tensor, _MIXED)

    # ---- for the handlers ----

    def given(self, tensor: Any) -> Rows | None:
        """`_rows` of an operand, None for what is no tensor."""
        return self._rows(tensor) if isinstance(tensor, Tensor) else None

    def independent(self, *operands: Any) -> bool:
        """Whether none of the operands depends on the samples."""
        return all(self.given(operand) is None for operand in operands)

    def reshaped(self, rows: Rows, before: Iterable[int], after: Iterable[int]) -> _Result:
        """Where the samples lie in another shape of the same numbers in the same order."""
        step = rows.inner * math.prod([*before][rows.dim + 1 :])
        rest = 1
        shape = list(after)
        for dim in reversed(range(len(shape))):
            if step % rest == 0 and (rest * shape[dim]) % (step * self._batch) == 0:
                return Rows(dim, step // rest)
            rest *= shape[dim]
        return None


class Watched(Mode):  # type: ignore[no-untyped-call]
    """Tells after a critic has run in it whether it couples the samples of ``x``, and puts back what it has changed."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.samples, self.undo = SampleTracker(x), Undo(x)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_random(func):
            self.undo.keep_random_state(kwargs.get("generator"))
        for tensor in changed(func, args, kwargs):
            if tensor.grad_fn is None:  # an intermediate result is made again
                self.undo.keep(tensor)
        result = func(*args, **kwargs)
        self.samples.follow(func, args, kwargs, result)
        return result


# ---- what the operations do to the samples ----

_CONSTANTS = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "sym_size", "sym_stride", "sym_numel"),
}
# Changes of a tensor's shape in place, not of its content.
_OF_SHAPE = {"transpose_", "t_", "unsqueeze_", "squeeze_", "detach_"}

_HANDLERS: dict[str, _Handler] = {}


def _handles(*names: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


@functools.cache
def _handler(func: Any) -> _Handler | None:
    if func.namespace != "aten" or func._overloadname == "dtype":
        return None
    name = func.overloadpacket.__name__
    handler = _HANDLERS.get(name) or _HANDLERS.get(name.removesuffix("_"))
    return _elementwise if handler is None and torch.Tag.pointwise in func.tags else handler


def _argument(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument of an operation by name, as given or by default."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[place] if place < len(args) else kwargs.get(name, argument.default_value)
    return None


@_handles("copy", "_prelu_kernel", "_to_copy", "bernoulli", "log_sigmoid_forward", "hardswish", "masked_fill", "clone")
@_handles("native_dropout", "fill", "zero", "mish", "detach", "alias", "lift_fresh")
@_handles("leaky_relu", "elu")  # which torch 2.10 does not tag
def _elementwise(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    places = set()
    for tensor in tensors_of([*args, *kwargs.values()]):
        rows = t.given(tensor)
        if rows is not None:
            places.add((rows.dim - tensor.ndim, rows.inner, tensor.shape[rows.dim]))
    if len(places) != 1:
        return None
    ((from_last, inner, _),) = places
    return Rows(tensors_of(result)[0].ndim + from_last, inner)


@_handles("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")
def _shape(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    if mutates(func):  # the shape before is lost
        return None
    rows = t.given(args[0])
    assert rows is not None
    return t.reshaped(rows, args[0].shape, result.shape)


@_handles("transpose", "t", "permute", "expand")
def _order(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    rows = t.given(args[0])
    assert rows is not None
    n, name = args[0].ndim, func.overloadpacket.__name__.removesuffix("_")
    if name == "expand":
        return Rows(result.ndim - n + rows.dim, rows.inner)
    if name == "permute":
        order = [dim % n for dim in args[1]]
    else:
        order = list(range(n))
        one, other = (dim % n for dim in args[1:3]) if name == "transpose" else (0, n - 1)
        order[one], order[other] = order[other], order[one]
    return Rows(order.index(rows.dim), rows.inner)


@_handles("unfold")
@_handles("slice", "select", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind")
def _parts(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    a, rows, name = args[0], t.given(args[0]), func.overloadpacket.__name__
    assert rows is not None
    dim = _argument(func, "dimension" if name == "unfold" else "dim", args, kwargs) % a.ndim
    if dim == rows.dim:
        whole = name == "slice" and result.shape == a.shape
        return rows if whole else None
    lost = name in ("select", "unbind") and dim < rows.dim
    return Rows(rows.dim - lost, rows.inner)


@_handles("cat", "stack")
def _joined(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    dim = _argument(func, "dim", args, kwargs) % result.ndim
    found = {(rows, tensor.shape[rows.dim]) for tensor in args[0] if (rows := t.given(tensor)) is not None}
    if len(found) != 1:
        return None
    ((rows, _),) = found
    if func.overloadpacket.__name__ == "stack":
        return Rows(rows.dim + (dim <= rows.dim), rows.inner)
    return None if dim == rows.dim else rows


@_handles("sum", "nansum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "norm", "logsumexp")
@_handles("linalg_vector_norm", "any", "all", "argmax", "argmin", "max", "min", "median", "nanmedian", "mode")
@_handles("kthvalue", "topk", "sort", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "flip", "roll")
@_handles("_softmax", "_log_softmax", "_safe_softmax")
def _along(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    """Operations along some dimensions, by default or by an empty list along all of them."""
    a, rows = args[0], t.given(args[0])
    if rows is None:
        return None
    dims = _argument(func, "dim", args, kwargs)
    if dims is None:
        dims = _argument(func, "dims", args, kwargs)
    if dims is None or dims == []:
        return None
    dims = {dim % a.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    if rows.dim in dims:
        return None
    if tensors_of(result)[0].ndim == a.ndim:
        return rows
    return Rows(rows.dim - sum(dim < rows.dim for dim in dims), rows.inner)


@_handles("mm", "bmm", "mv")
def _product(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    """Of matrices or of stacks of them, whose dimensions are given without those of the stack."""
    a, b = args[:2]
    stack = func.overloadpacket.__name__ == "bmm"
    of_a, of_b = t.given(a), t.given(b)
    if stack and (of_a is None or of_a.dim == 0) and (of_b is None or of_b.dim == 0):
        return of_a if of_b is None or of_a == of_b else of_b if of_a is None else None
    if of_b is None and of_a is not None and of_a.dim == a.ndim - 2:
        return of_a
    if of_a is None and of_b is not None and b.ndim > 1 and of_b.dim == b.ndim - 1:
        return of_b
    return None


@_handles("addmm", "baddbmm", "addmv")
def _product_and_bias(
    t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> _Result:
    if not t.independent(args[0]):
        return None
    packet = {"addmm": "mm", "baddbmm": "bmm", "addmv": "mv"}[func.overloadpacket.__name__.removesuffix("_")]
    return _product(t, getattr(torch.ops.aten, packet).default, args[1:3], {}, result)


def _first_of(
    t: SampleTracker, args: tuple[Any, ...], kwargs: dict[str, Any], below: int, exactly: int | None = None
) -> _Result:
    """Those of the first operand, if no other depends on the samples, and they lie in its first dimensions."""
    rows = t.given(args[0])
    if rows is None or not t.independent(*tensors_of([*args[1:], *kwargs.values()])):
        return None
    return rows if (rows.dim < below if exactly is None else rows.dim == exactly) else None


@_handles("convolution", "native_group_norm", "grid_sampler_2d", "grid_sampler_3d")
def _batch_first(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    return _first_of(t, args, kwargs, 1)


@_handles("im2col", "col2im", "pixel_shuffle", "pixel_unshuffle")
def _channels(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    return _first_of(t, args, kwargs, args[0].ndim - (2 if func.overloadpacket.__name__ == "col2im" else 3))


@_handles("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    return _first_of(t, args, kwargs, args[0].ndim - len(args[1]))


@_handles(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit_no_training",
)
def _batch_norm(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    # In training every channel has statistics of its own: instance norm has one for every channel of every sample.
    return _first_of(t, args, kwargs, args[0].ndim, 1 if _trains(func, args, kwargs) else None)


def _trains(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of batch norm takes the statistics of the batch."""
    return bool(_argument(func, "training", args, kwargs) or _argument(func, "train", args, kwargs))


@_handles("linear")
def _linear(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    return _first_of(t, args, kwargs, args[0].ndim - 1)


_PLANAR = (
    *("max_pool{}d_with_indices", "avg_pool{}d", "adaptive_max_pool{}d", "_adaptive_avg_pool{}d"),
    *("upsample_nearest{}d", "_upsample_nearest_exact{}d", "reflection_pad{}d", "replication_pad{}d"),
)
_DIMENSIONS = {form.format(k): k for form in _PLANAR for k in (1, 2, 3)}
_DIMENSIONS |= {"upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3}
_DIMENSIONS |= {"_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2}


@_handles(*_DIMENSIONS)
def _planar(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    """Pooling, padding and resizing of the last dimensions, for each of the others alone."""
    return _first_of(t, args, kwargs, args[0].ndim - _DIMENSIONS[func.overloadpacket.__name__])


@_handles("constant_pad_nd")
def _pad(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    return _first_of(t, args, kwargs, args[0].ndim - len(args[1]) // 2)


@_handles("repeat")
def _repeat(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    rows = t.given(args[0])
    assert rows is not None
    return Rows(rows.dim + result.ndim - args[0].ndim, rows.inner)


@_handles("index_select", "gather")
def _chosen(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    a, dim, index = args[:3]
    rows, of_index = t.given(a), t.given(index)
    if func.overloadpacket.__name__ == "gather":
        if of_index is not None and of_index != rows:
            return None
    elif of_index is not None:
        return None
    if rows is None or dim % a.ndim == rows.dim or result.shape[rows.dim] != a.shape[rows.dim]:
        return None
    return rows


@_handles("index")
def _indexed(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    """By indices in dimensions behind the samples, side by side: otherwise they move the others."""
    a, indices = args[:2]
    rows = _first_of(t, (a, *tensors_of(indices)), {}, a.ndim)
    used = [k for k, index in enumerate(indices) if index is not None]
    if rows is None or not used or used[0] <= rows.dim or used != list(range(used[0], used[-1] + 1)):
        return None
    return rows


@_handles("embedding")
def _embedding(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    return t.given(args[1]) if t.independent(args[0]) else None


@_handles("mkldnn_rnn_layer")
def _recurrent(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    """Time, then batch; the result's state may lie otherwise, and counts as mixed by its shape."""
    return _first_of(t, args, kwargs, 3, 1)


@_handles("rrelu_with_noise")
def _with_noise(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    return t.given(args[0])


@_handles("_thnn_fused_gru_cell", "_thnn_fused_lstm_cell")
def _fused_cell(t: SampleTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Result:
    found = {rows for tensor in tensors_of([*args, *kwargs.values()]) if (rows := t.given(tensor)) is not None}
    return found.pop() if found == {Rows(0, 1)} else None
