"""The op ``symmetrize``: covariances are checked and made exactly symmetric, each tile of the memory read once.

It is not differentiable, and no tracer sees it: what is refused is read by the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipgan._checks import check_finite, refuse_asymmetry
from lipgan._dtypes import FLOATING
from lipgan.ops import _backend
from lipgan.reference import symmetrize as reference


def _native(name: str, a: Tensor) -> tuple[Tensor, bool]:
    module = _backend.serving_native()
    # The transpose has the same symmetric part, and need not be copied where a is stored by columns.
    given = a.mT if a.mT.is_contiguous() else a
    largest, difference, symmetric = module.symmetrize(given, torch.get_num_threads())
    if not math.isfinite(largest):
        check_finite(name, a)
    seen = torch.tensor([difference, largest], dtype=torch.float64, device="cpu")
    refuse_asymmetry(name, seen[0], seen[1], a.dtype)
    return a if symmetric is None else symmetric, difference == 0


_FORWARD: dict[str, Callable[[str, Tensor], tuple[Tensor, bool]]] = {
    "reference": reference.symmetrize,
    "native": _native,
}


def symmetrize(name: str, a: Tensor, backend: str | None = None) -> tuple[Tensor, bool]:
    """``(a + a^T) / 2`` in float64, and whether ``a`` is symmetric to the last bit; the former is then a's numbers.

    Args:
        name: what the errors call it.
        a: ``[n, n]``, real, without gradient.
        backend: "reference" or "native"; None for the best that serves.

    Raises:
        ValueError: not finite, or not symmetric beyond the rounding of its dtype.
    """
    serving = "reference"
    if backend is not None or (a.dtype in FLOATING and _backend.serves("symmetrize", a.device.type)):
        serving = _backend.resolve("symmetrize", backend, a.device.type)
    if serving == "native" and not _backend.is_unobserved((a,)):
        serving = "reference"
    return _FORWARD[serving](name, a)
