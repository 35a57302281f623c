"""What the modes of the penalties have in common."""

from torch.utils._python_dispatch import TorchDispatchMode


class Mode(TorchDispatchMode):
    """Sees the operations that run while it is active, below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would wrap every call, and import torch._dynamo for it, which takes seconds.
        return False
