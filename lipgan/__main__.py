"""The command line: ``lipgan``, or ``python -m lipgan``.

Exit status: 0 done, 2 bad input or a failure that was explained in one line on stderr, 128 and the number of the
signal that stopped it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP; 141, without a word, where what reads the
output has gone, such as ``head``.
"""

import importlib
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from types import FrameType, MappingProxyType

from lipgan import _signals

__all__ = ["main"]

# The module of each command, with main(args); imported when it runs, so that the others answer without PyTorch.
_COMMANDS = MappingProxyType(
    {
        "train": "lipgan.commands.train",
        "sample": "lipgan.commands.sample",
        "fid": "lipgan.commands.fid",
        "eval": "lipgan.commands.evaluate",
        "bench": "lipgan.bench",
        "study": "lipgan.commands.study",
        "doctor": "lipgan.commands.doctor",
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; ``arguments`` default to those of the process. Returns the exit status.

    Raises:
        SystemExit: --help (status 0), or arguments that do not parse (status 2).
    """
    with _signals.handling(_signals.leave):
        # Imported here, where Ctrl-C is waited for already.
        from lipgan.commands import parser

        args = parser.build().parse_args(arguments)
        return _run(args)


def _run(args: Namespace) -> int:
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise _signals.Stopped(number)

    try:
        with _signals.handling(interrupt):
            from lipgan.commands import names

            names.check(args)
            command: Callable[..., int | None] = importlib.import_module(_COMMANDS[args.command]).main
            status = command(args) or 0
            print(end="", flush=True)  # here, where it can still be told that nobody reads
            return status
    except BaseException as error:
        # An import that was interrupted may raise anything.
        if received or isinstance(error, KeyboardInterrupt):
            print("lipgan: stopped", file=sys.stderr)
            return 128 + (received or [signal.SIGINT])[0]
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + 13  # SIGPIPE, which not every system has
        return _explain(error)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that was closed at its other end; it becomes the null device, for Python to leave by."""
    try:
        descriptor = sys.stdout.fileno()
        os.write(descriptor, b"\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return True
    except (OSError, ValueError):  # nothing that has a descriptor
        return False
    return False


def _explain(error: BaseException) -> int:
    if isinstance(error, OSError):
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    if isinstance(error, (ValueError, ArithmeticError)):
        return _fail(str(error))
    if isinstance(error, (RuntimeError, MemoryError)):
        # torch has an exception of its own for an accelerator's memory, but none for the CPU's.
        if isinstance(error, MemoryError) or ("memory" in str(error) and "alloc" in str(error)):
            return _fail("out of memory; try a smaller batch, size or number of samples")
        from lipgan.ops import UnavailableError
        from lipgan.training.distributed import ProcessLostError

        if isinstance(error, (UnavailableError, ProcessLostError)):
            return _fail(str(error))
    raise error


def _fail(message: str) -> int:
    print(f"lipgan: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
