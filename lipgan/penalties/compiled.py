"""Operations of a plan as generated code: compiled once by Inductor, and called without dynamo's guards and frames.

Most of what dynamo would compare at each call is known where a plan runs: its `Conditions` hold, and its `case` has the
shapes, strides and dtypes. What neither knows is compared here: the settings of the process that generated code depends
on, and whether something that it changes shares its memory with something else. Where that is so, torch.compile serves,
as it does for CUDA graphs, and where this torch has no other way in.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

# The same random numbers as those of the operations that were recorded, and the same half-precision numbers.
_OPTIONS: dict[str, Any] = {"fallback_random": True, "emulate_precision_casts": True}
# As many versions as torch.compile keeps of a function.
_KEPT = 8


class Compiled:
    """A graph as a function of tensors, compiled when it is called first. It is called without a gradient.

    Args:
        graph: of PyTorch's operations.
        changing: which of the arguments are changed in place.
        unseen: those among them of whose change autograd is to know nothing.
        captured: whether in CUDA graphs, whose results are overwritten by the next call.
    """

    def __init__(
        self, graph: fx.GraphModule, *, changing: Sequence[int], unseen: Sequence[int], captured: bool
    ) -> None:
        self._graph, self._changing, self._unseen = graph, changing, unseen
        self._options = {**_OPTIONS, "triton.cudagraphs": True} if captured else _OPTIONS
        self._direct = not captured
        # (settings, code for them), the newest first
        self._made: list[tuple[Any, Callable[..., Any]]] = []
        self._guarded: Callable[..., Any] | None = None

    def __call__(self, *arguments: Tensor) -> Any:
        function = self._code(arguments)
        if not self._unseen:
            return function(*arguments)
        # Compiled code changes by an operation in place what the operation itself changes unseen.
        kept = tuple([arguments[place] for place in self._unseen])
        versions = tuple([tensor._version for tensor in kept])
        results = function(*arguments)
        torch._C._autograd._unsafe_set_version_counter(kept, versions)
        return results

    def _code(self, arguments: Sequence[Tensor]) -> Callable[..., Any]:
        """What serves these arguments, with the settings as they are now."""
        if self._direct and not (self._changing and _overlap(arguments, self._changing)):
            for settings, code in self._made:
                if settings.check():
                    return code
            made = self._make(arguments)
            if made is not None:
                return made
        if self._guarded is None:
            self._guarded = torch.compile(self._graph, fullgraph=True, dynamic=False, options=self._options)
        return self._guarded

    def _make(self, arguments: Sequence[Tensor]) -> Callable[..., Any] | None:
        """Generated code for arguments like these, which is kept; None where this torch has no such way in."""
        try:  # they load for seconds
            from torch._C._dynamo.guards import GlobalStateGuard
            from torch._inductor import compile
        except ImportError:
            self._direct = False
            return None

        def make(**options: Any) -> Callable[..., Any]:
            # The compiler owns the graph that it is given.
            graph = copy.deepcopy(self._graph)
            return compile(graph, [*arguments], options={**self._options, **options})  # type: ignore[no-any-return]

        inductor = logging.getLogger("torch._inductor.ir")
        inductor.addFilter(_is_no_detour)
        try:
            # Calls of kernels from C++: from Python they are a fifth of the time of a small transformer's penalty.
            code = make(cpp_wrapper=all(tensor.device.type == "cpu" for tensor in arguments))
        except Exception:  # a compiler's, of whatever kind, for what that way does not serve
            code = make()
        finally:
            inductor.removeFilter(_is_no_detour)
        self._made.insert(0, (GlobalStateGuard(), code))
        del self._made[_KEPT:]
        return code


def _is_no_detour(record: logging.LogRecord) -> bool:
    """Whether a warning is of something else than an operation that is called from C++ by a detour, and slower."""
    return "c-shim" not in record.getMessage()


def _overlap(arguments: Sequence[Tensor], changing: Sequence[int]) -> bool:
    """Whether an argument that is changed shares its memory with another."""
    memory = [tensor.untyped_storage()._cdata for tensor in arguments]
    return any(memory.count(memory[place]) > 1 for place in changing)
