"""Square roots of many small symmetric matrices by their eigenvalues; polar factors by matrix products alone."""

from .polar import PRECISIONS, polar_iteration, polynomial, symmetric_product
from .root import matrix_sqrt_fwd

__all__ = ["PRECISIONS", "matrix_sqrt_fwd", "polar_iteration", "polynomial", "symmetric_product"]
