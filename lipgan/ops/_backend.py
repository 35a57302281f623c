"""Which backend serves an op on a device, and why.

``LIPGAN_BACKEND`` or :func:`use_backend` may name one: a choice that cannot be met is an error. Without a choice the
first available of the device's order serves. `FORMS` is the one table of what there is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor
from torch.nn import Parameter

from lipgan._checks import check_choice
from lipgan._registry import lookup

BACKENDS = ("reference", "native", "triton", "cuda")

PASSES = ("forward", "backward", "second order")

# What is tried on a device, best first. Triton before CUDA, which moves as many bytes: it serves more ops, and takes no
# barrier across the grid. `PREFERRED` says where CUDA comes first, having a launch less.
_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "cuda", "reference")}

#: Op -> the calls for which a GPU is asked for CUDA first, in words. The modules of these ops decide.
PREFERRED: Mapping[str, str] = MappingProxyType(
    {
        "spectral_norm": "the backward of groups of up to 32 MiB",
        "gradient_penalty": 'gradients of up to 32 MiB for the kind "max", or whose rows are longer than 64 KiB',
    }
)

#: The bytes of `PREFERRED`: a GPU moves a few times as many in less time than the host takes for a call, so that one
#: launch less counts (docs/numerics/spectral_norm.md, gradient_penalty.md).
BYTES_OF_ONE_LAUNCH = 32 << 20


def _each(*names: str) -> Mapping[str, str]:
    return {name: name for name in names}


def _by_reference(*names: str) -> Mapping[str, str]:
    return dict.fromkeys(names, "reference")


_ALL, _GP = ("reference", "native", "triton", "cuda"), ("reference", "native", "triton")

#: Op -> pass -> chosen backend -> the backend that computes that pass, or the reference where it is missing, by
#: `serving`. A backend not among the forward's has no form of the op; a pass that is not there does not exist.
FORMS: Mapping[str, Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "spectral_norm": {
            "forward": _each(*_ALL),
            "backward": _each(*_ALL),
            "second order": {**_each("reference", "native", "triton"), "cuda": "triton"},
        },
        "gradient_penalty": {"forward": _each(*_ALL), "backward": _each(*_ALL), "second order": _by_reference(*_ALL)},
        "interpolate": {
            "forward": _each(*_ALL),
            "backward": _by_reference(*_ALL),
            "second order": _by_reference(*_ALL),
        },
        # The gradients of the weights come with the value; there is no second order.
        "mlp_gradient_penalty": {"forward": _each(*_GP), "backward": _each(*_GP)},
        "matrix_sqrt": {
            "forward": _each(*_GP),
            "backward": _by_reference(*_GP),
            "second order": _by_reference(*_GP),
        },
        # The trace that the Frechet distance needs, by products of matrices; the value alone.
        "polar_trace": {"forward": _each("reference", "triton")},
        # Orthogonal weights. The second order is by Lyapunov equations.
        "polar_factor": {
            "forward": _each("reference", "native"),
            "backward": _each("reference", "native"),
            "second order": _by_reference("reference", "native"),
        },
        # Covariances as they are given.
        "symmetrize": {"forward": _each("reference", "native")},
        "nearest_neighbours": {"forward": _each("reference", "native", "triton")},
        "ball_counts": {"forward": _each("reference", "native", "triton")},
    }
)


class UnavailableError(RuntimeError):
    """The backend that was asked for cannot serve here."""


@functools.cache
def native() -> ModuleType | None:
    """The module ``lipgan._C``, or None where it was not built or does not find what it needs in torch."""
    module = _import("lipgan._C")
    if module is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None
    module.use_dlpack(torch.Tensor)
    return module


_poisons = False


def serving_native() -> Any:
    """The module ``lipgan._C`` for one call, which fills its outputs with NaN first where PyTorch does so with its own:
    after ``torch.use_deterministic_algorithms(True)``, unless ``torch.utils.deterministic.fill_uninitialized_memory``
    has been set to False.
    """
    global _poisons
    module: Any = native()
    asked = torch.are_deterministic_algorithms_enabled()
    if asked:
        asked = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if asked is not _poisons:
        module.poison_outputs(asked)
        _poisons = asked
    return module


@functools.cache
def cuda() -> ModuleType | None:
    """The module ``lipgan._cuda``, or None where it was not built."""
    return _import("lipgan._cuda")


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def explain(op: str, backend: str, device: str) -> str | None:
    """None if ``backend`` can serve ``op`` on ``device``; otherwise the reason why not.

    Args:
        op: a key of `FORMS`.
        backend: one of `BACKENDS`.
        device: a device type, such as "cpu" or "cuda".

    Raises:
        ValueError: no op or no backend has that name.
    """
    forms = lookup(FORMS, op, "op")["forward"]
    check_choice("backend", backend, BACKENDS)
    if backend not in forms:
        return f"there is no {backend} form of {op}, only {' and '.join(forms)}"
    return _missing(backend, device)


def _missing(backend: str, device: str) -> str | None:
    """What is missing here for a backend to serve any op on ``device``, or None."""
    if backend == "native":
        if native() is None:
            if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
                return f"torch {torch.__version__} has no DLPack exchange table, which lipgan._C needs"
            return "lipgan._C was not built (no C++ compiler at installation, or LIPGAN_NATIVE=off)"
        return None if device == "cpu" else f"the C++ kernels serve CPU tensors, not {device}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device == "cuda" or (device == "cpu" and interpreted()):
            return None
        if device == "cpu":
            return "Triton serves CPU tensors only in its interpreter (set TRITON_INTERPRET=1 before importing triton)"
        return f"the Triton kernels serve CUDA tensors, not {device}"
    if backend == "cuda":
        if cuda() is None:
            return "lipgan._cuda was not built (no nvcc at installation, or LIPGAN_CUDA=off)"
        return _gpu_missing() if device == "cuda" else f"the CUDA kernels serve CUDA tensors, not {device}"
    return None  # the reference serves everywhere


# Of the GPUs that lipgan._cuda is built for: CMakeLists.txt.
_OLDEST_GPU = (8, 0)


def _gpu_missing() -> str | None:
    """Why lipgan._cuda cannot run on the GPUs that are there, or None. Without one it is not asked for."""
    if torch.version.hip is not None:
        return "the CUDA kernels serve NVIDIA's GPUs, and this torch is built for ROCm"
    if torch.cuda.is_available():
        found = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        if found < _OLDEST_GPU:
            oldest, here = (".".join(map(str, capability)) for capability in (_OLDEST_GPU, found))
            return f"lipgan._cuda is built for GPUs of compute capability {oldest} and later, and one here has {here}"
    return None


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the dispatcher would do nothing but call the implementation, which is then called without it.

    The way through the dispatcher and back into Python takes as long as the rest of a call of a small layer. A tracer,
    a mode, a tensor subclass or the profiler needs it.
    """
    # In this order: a tracer cannot ask for the profiler.
    return is_unobserved(tensors) and not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


def is_unobserved(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are PyTorch's own and have values, and neither a tracer nor a mode looks at what is done."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() != 0:
        return False
    # all() of a generator takes three times as long.
    for tensor in tensors:
        if (type(tensor) is not Tensor and type(tensor) is not Parameter) or tensor.is_meta:
            return False
    return True


_chosen: str | None = os.environ.get("LIPGAN_BACKEND") or None


@functools.lru_cache(maxsize=256)
def _resolve(op: str, backend: str | None, device: str, first: str | None) -> str:
    if backend is not None:
        reason = explain(op, backend, device)
        if reason is not None:
            raise UnavailableError(f"backend {backend!r} cannot serve {op} on {device}: {reason}")
        return backend
    order = _ORDER.get(device, ("reference",))
    candidates: tuple[str, ...] = order if first is None else (first, *order)
    for candidate in candidates:
        if explain(op, candidate, device) is None:
            return candidate
    raise AssertionError("the reference serves everywhere")


def resolve(op: str, backend: str | None, device: str, first: str | None = None) -> str:
    """The backend that serves the forward of ``op`` on ``device``; :data:`FORMS` reports which serve its derivatives.

    Args:
        op: a key of `FORMS`.
        backend: one of :data:`BACKENDS`, or None for the choice of :func:`use_backend` or ``LIPGAN_BACKEND``, and
            without such a choice for the best available.
        device: a device type, such as ``"cpu"``.
        first: what is tried before the others where none was chosen: the best for the sizes at hand.

    Raises:
        ValueError: no op or no backend has that name.
        UnavailableError: the backend that was chosen cannot serve the op, or not on the device.
    """
    if backend is None and _chosen is not None:
        check_choice("LIPGAN_BACKEND", _chosen, BACKENDS)
    return _resolve(op, backend if backend is not None else _chosen, device, first)


def serving(op: str, name: str, chosen: str, device: str) -> str:
    """The backend that computes the pass ``name`` of ``op`` where ``chosen`` serves the forward."""
    backend = FORMS[op][name][chosen]
    return backend if backend == chosen else _standing_in(backend, device)


@functools.lru_cache(maxsize=16)
def _standing_in(backend: str, device: str) -> str:
    return backend if _missing(backend, device) is None else "reference"


def serves(op: str, device: str) -> bool:
    """Whether ``op`` can be served on ``device`` by the backend that was chosen, if one was."""
    return _chosen is None or explain(op, _chosen, device) is None


def serves_unnamed() -> bool:
    """Whether no backend was chosen."""
    return _chosen is None


def check(backend: str | None) -> str | None:
    """``backend`` itself, if it names one or is None."""
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
    return backend


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Within the block, serve every op by ``backend`` (one of :data:`BACKENDS`; None: the best available).

    The choice holds for the process, not for the thread.
    """
    global _chosen
    before, _chosen = _chosen, check(backend)
    try:
        yield
    finally:
        _chosen = before
