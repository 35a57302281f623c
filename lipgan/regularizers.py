"""The public name of :mod:`lipgan.objectives.regularizers`."""

from lipgan.objectives.regularizers import *  # noqa: F403
from lipgan.objectives.regularizers import __all__ as __all__
