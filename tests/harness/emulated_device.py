"""A device without hardware: its tensors are CPU tensors in a wrapper, and operations mix with no others.

What PyTorch refuses on a GPU is refused here, and what waits for a GPU is counted: an operation on tensors of two
devices is an error, `Tensor.numpy` is one, and a copy between the host and the device, or a number that Python reads
(`Tensor.item`), goes into the records of `crossings`.

The tensors are a subclass with the backend key that PyTorch keeps for third parties (`PrivateUse1`), through
`torch.utils.backend_registration`; factory functions and ``to(DEVICE)`` make them. Memory, streams and kernels of a GPU
are not emulated.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Module:
    """What PyTorch asks of ``torch.emulated``: one device, with the random numbers of the CPU."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("emulated", backend_module=_Module())
DEVICE = torch.device("emulated", 0)
CPU = torch.device("cpu")

aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
# A GPU takes the indices, too, from the host.
_INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
# The host waits for their sizes.
_OF_UNKNOWN_SIZE = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default)

_records: list[list[str]] = []


@contextlib.contextmanager
def crossings() -> Iterator[list[str]]:
    """Inside, what passes between host and device leaves a line each.

    A copy ("to device [8, 2]"; "to device, later [8, 2]" for one with ``non_blocking``), a number that Python reads
    ("number to host []"), a size that it waits for ("size to host [8]"), `torch.equal` ("comparison to host [8]").
    """
    records: list[str] = []
    _records.append(records)
    try:
        yield records
    finally:
        _records.remove(records)


def _record(what: str, tensor: Tensor) -> None:
    for records in _records:
        records.append(f"{what} {list(tensor.shape)}")


class DeviceTensor(Tensor):
    """A tensor on the emulated device; ``inner`` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "DeviceTensor":
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.inner!r} on {DEVICE}"

    # What `torch.nn.Module` and torch.compile ask of a wrapper.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> "DeviceTensor":
        return DeviceTensor(inner["inner"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceTensor":
        with torch.no_grad():
            copied = self.clone()
        copied.requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)  # what makes it an instance of torch.nn.Parameter
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.inner, self.requires_grad, getattr(self, "_is_param", False))

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        _record("number to host" if self.ndim == 0 else "to host", self)
        return self.inner.tolist()

    def __format__(self, spec: str) -> str:
        return format(self.tolist(), spec) if self.ndim == 0 else repr(self)

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")
        _record("to host", self)
        return self.inner.numpy(force=True)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _unpickled(inner: Tensor, requires_grad: bool, is_param: bool) -> DeviceTensor:
    tensor = DeviceTensor(inner).requires_grad_(requires_grad)
    tensor._is_param = is_param
    return tensor


torch.serialization.add_safe_globals([_unpickled])


def _inner(x: Any) -> Any:
    if isinstance(x, DeviceTensor):
        return x.inner
    return CPU if isinstance(x, torch.device) and x == DEVICE else x


def _wrapped(x: Any) -> Any:
    return DeviceTensor(x) if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) else x


# What runs operations on the numbers of tensors in the place of the operations: a capture of `emulated_graph`.
capture: Callable[[Any, Any, Any], Any] | None = None


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs) if capture is None else capture(func, args, kwargs)


def _check_generators(args: Any, kwargs: Any) -> None:
    if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'")


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    _check_generators(args, kwargs)
    foreign = [x for x in tensors if not isinstance(x, DeviceTensor)]
    to = kwargs.get("device")
    if func in _COPIES:
        source = args[0] if func is not aten.copy_.default else args[1]
        target = to if func is aten._to_copy.default else args[0 if func is aten.copy_.default else 1].device
        target = source.device if target is None else torch.device(target)
        if source.device != target:
            later = kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
            _record(("to host" if target == CPU else "to device") + (", later" if later else ""), source)
    elif func in _INDEXING:
        for index in foreign:
            if index.ndim:
                _record("to device", index)
        if not isinstance(args[0], DeviceTensor):
            raise RuntimeError(f"{func} of a tensor on {args[0].device} by indices on {DEVICE}")
        if any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1] or ()):
            _record("size to host", args[0])
    else:
        for x in foreign:
            # A number of the host is an argument of the kernel.
            if x.ndim or x.device != CPU:
                shapes = [(list(t.shape), str(t.device)) for t in tensors]
                raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {shapes}")
    if func is aten._local_scalar_dense.default:
        _record("number to host", args[0])
    elif func is aten.equal.default:
        _record("comparison to host", args[0])
    elif func in _OF_UNKNOWN_SIZE:
        _record("size to host", args[0])
    out = _call(func, tree_map(_inner, args), tree_map(_inner, kwargs))
    if func is aten._to_copy.default and to is not None and torch.device(to) != DEVICE:
        return out
    if func is aten.copy_.default and not isinstance(args[0], DeviceTensor):
        return args[0]
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrapped, out))


# ---- what makes tensors, and has none to be dispatched by ----

_MAKING = {
    "arange": ("arange", "arange.start", "arange.start_step"),
    "empty": ("empty.memory_format",),
    "empty_strided": ("empty_strided",),
    "eye": ("eye", "eye.m"),
    "full": ("full",),
    "linspace": ("linspace",),
    "logspace": ("logspace",),
    "ones": ("ones",),
    "rand": ("rand", "rand.generator"),
    "randint": ("randint", "randint.generator", "randint.low", "randint.low_generator"),
    "randn": ("randn", "randn.generator"),
    "randperm": ("randperm", "randperm.generator"),
    "scalar_tensor": ("scalar_tensor",),
    "tril_indices": ("tril_indices",),
    "triu_indices": ("triu_indices",),
    "zeros": ("zeros",),
}


def _making(operation: Any) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        _check_generators(args, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if value is not None and key != "pin_memory"}
        return DeviceTensor(_call(operation, args, {**kwargs, "device": CPU}))

    return make


def _copy_from(source: Tensor, target: DeviceTensor, non_blocking: bool = False) -> Tensor:
    _record("to device", source)
    target.inner.copy_(source)
    return target


_library = torch.library.Library("aten", "IMPL")
for _operation, _overloads in _MAKING.items():
    for _name in _overloads:
        _library.impl(_name, _making(getattr(aten, _operation)), "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("_efficientzerotensor", _making(aten.zeros), "PrivateUse1")  # operations would find no memory in one
