"""What keeps torch.compile out of the penalties. Imported only where it is in use: its machinery loads for seconds."""

from collections.abc import Callable
from typing import Any

import torch

from lipgan.penalties.precomputed import PrecomputedGradients


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="lipgan.gradient_penalty runs outside of the compiled graph here; it is an operation of the graph if torch "
    "is 2.13 or newer, the critic is a module and no DistributedDataParallel, the samples are tensors, the "
    "arguments of the critic constants and tensors that require no gradient, output is no function and no generator is "
    "given but one of few that are used again; or compile without fullgraph=True"
)
def call(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` outside of the compiled graph."""
    return function(*args)


# A backward pass that begins in a compiled function would have it compiled for every shape of parameters.
PrecomputedGradients.backward = staticmethod(torch.compiler.disable(PrecomputedGradients.backward))  # type: ignore[method-assign, no-untyped-call]
