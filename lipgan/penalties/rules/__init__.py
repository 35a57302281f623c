"""What the tape knows of the operations of ATen: one rule for each family. The import fills the table of the tape.

A rule runs the operation and records a node. It returns NotImplemented where it does not apply, and the operation is
then run as one outside of the tape, or as one of which only autograd knows the derivative (`other`).
"""

from lipgan.penalties.rules import activations, normalization, other, products, resampling, shapes

__all__ = ["activations", "normalization", "other", "products", "resampling", "shapes"]
