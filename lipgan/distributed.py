"""The former place of :mod:`lipgan.training.distributed`."""

from lipgan.training.distributed import *  # noqa: F403
from lipgan.training.distributed import __all__ as __all__
