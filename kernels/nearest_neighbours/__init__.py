"""Nearest neighbours, and counts of points in balls, without a matrix of all distances.

    D(x, y) = sum over the features of (x - y)^2, in float64

Every answer is that of D, to the bit. exact.py computes D of all pairs; bounds.py computes bounds on D by a product in
float32, and D only where they do not decide; launch.py says which is used, and launches.

The only atomic operations are additions of whole numbers, whose sum does not depend on their order.
"""

from .launch import ball_counts, nearest_neighbours

__all__ = ["ball_counts", "nearest_neighbours"]
