"""The command line: ``lipgan``, or ``python -m lipgan``.

Exit status: 0 done, 2 bad input or a failure that was explained in one line on stderr, 130 stopped by Ctrl-C.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from types import MappingProxyType

from lipgan.commands import parser

__all__ = ["main"]

# The module of each command, with main(args); imported when it runs, so that the others answer without PyTorch.
_COMMANDS = MappingProxyType(
    {
        "train": "lipgan.commands.train",
        "sample": "lipgan.commands.sample",
        "fid": "lipgan.commands.fid",
        "eval": "lipgan.commands.evaluate",
        "bench": "lipgan.bench",
        "doctor": "lipgan.commands.doctor",
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; ``arguments`` default to those of the process. Returns the exit status.

    Raises:
        SystemExit: --help (status 0), or arguments that do not parse (status 2).
    """
    args = parser.build().parse_args(arguments)
    try:
        command: Callable[..., int | None] = importlib.import_module(_COMMANDS[args.command]).main
        return command(args) or 0
    except KeyboardInterrupt:
        print("lipgan: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except (ValueError, ArithmeticError) as error:
        return _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        # torch has an exception of its own for an accelerator's memory, but none for the CPU's.
        if isinstance(error, MemoryError) or ("memory" in str(error) and "alloc" in str(error)):
            return _fail("out of memory; try a smaller batch, size or number of samples")
        from lipgan.ops import UnavailableError

        if isinstance(error, UnavailableError):
            return _fail(str(error))
        raise


def _fail(message: str) -> int:
    print(f"lipgan: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
