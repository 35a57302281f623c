"""The penalty on the norms of a critic's input gradients, its own gradient, and the samples it is taken at.

Gradients are [B, C, S] with a norm over C for each of the N = B * S columns. S = 1 is a matrix [B, C] whose rows have
norms. `scale` is weight / N, or weight for "max"; t is `target`. A norm n contributes phi(n) to the penalty:

  two-sided  scale (n - t)^2          Gulrajani et al. 2017, eq. 3
  one-sided  scale max(0, n - t)^2    Petzka et al. 2018, eq. 8
  squared    scale n^2 / 2            R1 and R2, Mescheder et al. 2018
  max        scale (max n - t)^2

and the cotangent is phi'(n) g / n, with 0 for the gradient of a norm that is 0.

Squares of float32 leave its range where norms do not. So every part x of a column is reduced to (s, q), |x|^2 = s^2 q,
where s is a power of two not above the largest |x_i|: x / s is exact, lies in [0, 4), and one element of it is at least
1. So q does not overflow, and what underflows in it is far below its last digit. Parts are joined by powers of two as
well, and s sqrt(q) overflows only where the norm does. The cotangent is (g / s) (phi'(n) / (n / s)) with s from n,
whose first factor is below 2 and whose second one is of the size of phi'(n); a g below 2^-126 of its norm may get lost.

The norms, the penalty and (except for "max" and long rows) the cotangent are one launch: partial results go to scratch
memory, and the program that takes the last ticket adds them up, in a fixed order, so that equal inputs give equal bits
whichever program that is. The ticket is the only atomic operation. All arithmetic is in the accumulation dtype A
(float64 for float64, float32 otherwise): values are widened right after a load and rounded once on a store.

norms.py has the arithmetic, passes.py the kernels; launch.py says which of them a penalty takes, and launches.
"""

from .launch import KINDS, gradient_penalty_fwd, gradient_penalty_interpolate

__all__ = ["KINDS", "gradient_penalty_fwd", "gradient_penalty_interpolate"]
