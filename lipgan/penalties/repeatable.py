"""Whether a critic runs the same operations at every call, and what that depends on.

A recording of a critic's operations may stand for a later call if nothing that the critic's Python code reads has
changed, and if the code leaves nothing behind but tensors. `Conditions` has the code read (`lipgan.penalties.reader`),
of every ``forward`` in a module or of a function, and of what they call; compares what the code reads with what it was,
in about a microsecond for each module (`lipgan.penalties.comparison`); and watches which lines run while the critic is
recorded (`lipgan.penalties.watch`). What is not understood is refused: the answer costs time then, and no digit.

Why this suffices: which lines run, and with what, follows from what is compared. While the critic is recorded only
lines run that are understood. They change nothing that is compared, which is compared again after the recording, and
leave nothing elsewhere. So the next call finds what this one found, and runs the same lines.

Understood are PyTorch's own layers and functions, methods of tensors, constants, and functions, lists and dicts of
them; attributes by name, a computed one as well; modules and tensors in closures, arguments and attributes; the
parametrizations and hooks of spectral and weight normalization, and those of a `SpectralNormGroup`. Refused are changes
of attributes, closures and globals, values that leave a tensor (``item``, ``numpy``), random numbers of Python, other
hooks and parametrizations, functions that are not written in Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lipgan.nn.spectral_norm_group import SpectralNormGroup
from lipgan.penalties.comparison import comparison
from lipgan.penalties.reach import reached
from lipgan.penalties.reader import Reader
from lipgan.penalties.watch import Watch, anything_refused


class Conditions:
    """What has to stay the same for the operations of a critic to be the same.

    Args:
        critic: as it is now: a module, or a function of one.

    Raises:
        NotRepeatable: with the reason.

    Attributes:
        groups: those whose hooks run before and after the critic, or a part of it.
        buffers: of the modules in it, as they are now.
        doubt: why some line may do otherwise at another call, or leave something behind, None if none may; `watch`, and
            another comparison, tell whether it does.
    """

    def __init__(self, critic: Any) -> None:
        reader = Reader(critic)
        self.groups = _groups(thing for thing in reached(critic) if isinstance(thing, nn.Module))
        self._check, modules = comparison(critic, reader, self.groups)
        self._reader: Reader | None = reader
        buffers = [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]
        self.buffers = [*{id(buffer): buffer for buffer in buffers}.values()]
        self.doubt = anything_refused(reader.refused) or reader.mutable

    def watch(self) -> Watch:
        """What is to be around the critic while it is recorded."""
        assert self._reader is not None
        return Watch(self._reader)

    def close(self) -> None:
        """The critic has been recorded: nothing of it is held any more."""
        self._reader, self.buffers = None, []

    def holds(self, critic: Any) -> list[Tensor] | None:
        """The critic's tensors, each once, in one order; None if a condition fails."""
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return None
        try:
            return self._check(critic)
        except (KeyError, AttributeError, TypeError, IndexError, ValueError):  # something is gone
            return None


def _groups(modules: Iterable[nn.Module]) -> list[SpectralNormGroup]:
    """Those whose hooks are on modules, or on parts of them."""
    hooks = [h for critic in modules for module in critic.modules() for h in module._forward_pre_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return list({id(owner): owner for owner in owners if isinstance(owner, SpectralNormGroup)}.values())
