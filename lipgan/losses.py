"""The public name of :mod:`lipgan.objectives.losses`."""

from lipgan.objectives.losses import *  # noqa: F403
from lipgan.objectives.losses import __all__ as __all__
