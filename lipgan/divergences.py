"""The public name of :mod:`lipgan.objectives.divergences`."""

from lipgan.objectives.divergences import *  # noqa: F403
from lipgan.objectives.divergences import __all__ as __all__
