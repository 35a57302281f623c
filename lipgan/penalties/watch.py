"""Which lines of a critic run while it is recorded."""

from __future__ import annotations

import gc
import sys
import types
from typing import Any

from lipgan.penalties.reader import Reader
from lipgan.penalties.unseen import Unseen

# Packages whose functions are called by code that was read, and do what is known of them.
_KNOWN = {"torch", "lipgan", *sys.stdlib_module_names}


class Watch:
    """Within it, whatever a critic runs has to have been read, and understood.

    It stands in the place of a debugger, or of a measurement of coverage: where there is one, all lines count as run.
    Garbage is not collected meanwhile: what objects do when they go would count as done by the critic.

    Args:
        reader: that has read the critic.

    Attributes:
        unseen: what reads numbers of tensors unseen.
        refusal: why what ran may do otherwise at another call, None if it may not.
    """

    def __init__(self, reader: Reader) -> None:
        self._codes, self._refused = reader.codes, reader.refused
        self.unseen = Unseen()
        self.refusal: str | None = None
        self._watching = self._collecting = False

    def __enter__(self) -> None:
        self.unseen.__enter__()  # type: ignore[no-untyped-call]
        self._watching = sys.gettrace() is None
        if self._watching:
            self._collecting = gc.isenabled()
            gc.disable()
            sys.settrace(self._called)
        else:
            self.refusal = self.refusal or anything_refused(self._refused)

    def __exit__(self, *error: Any) -> None:
        if self._watching:
            sys.settrace(None)
            if self._collecting:
                gc.enable()
        self.unseen.__exit__(*error)  # type: ignore[no-untyped-call]
        self.refusal = self.refusal or self.unseen.refusal

    def _called(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        refused = self._refused.get(code)
        if refused is not None:
            if 0 in refused:
                self.refusal = self.refusal or refused[0]
            return self._line
        if code in self._codes:
            return None
        module = str(frame.f_globals.get("__name__", ""))
        known = module.partition(".")[0] in _KNOWN or module.startswith("namedtuple_")
        if not known:
            self.refusal = self.refusal or f"{module}.{code.co_name} runs, which has not been read"
        return None

    def _line(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "line" and frame.f_lineno in self._refused[frame.f_code]:
            self.refusal = self.refusal or self._refused[frame.f_code][frame.f_lineno]
        return self._line


def anything_refused(refused: dict[types.CodeType, dict[int, str]]) -> str | None:
    """Why some line of what was read may do otherwise at another call, None if none may."""
    return next((reason for lines in refused.values() for reason in lines.values()), None)
