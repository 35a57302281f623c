"""How steep a critic is: a certified upper bound on its Lipschitz constant, and an empirical lower one.

interpreter.py  one forward pass, operation by operation
rules.py        what is known of each operation
modules.py      modules with plain weights, and those that have a bound as a whole
bounds.py       the two bounds

See docs/numerics/lipschitz.md.
"""

from lipgan.lipschitz import rules as _rules  # noqa: F401  (fills the interpreter's table)
from lipgan.lipschitz.bounds import Bounds, bounds

__all__ = ["Bounds", "bounds"]
