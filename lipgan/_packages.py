"""Packages that need not be installed, and one sentence for what they raise."""

import importlib
from types import ModuleType

__all__ = ["first_line", "imported"]


def imported(module: str, package: str, name: str) -> ModuleType:
    """The module of that name.

    Args:
        module: what to import, such as torchvision.datasets.
        package: what pip installs for it.
        name: what needs it, for the message.

    Raises:
        ValueError: it is not there, or does not work here; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    # A package that was built for another version of torch fails in other ways than by being absent.
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ValueError(f"{name} needs the package {package}: pip install {package} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What ``error`` says first, or else its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
