"""The op ``symmetrize``: a matrix that is symmetric up to rounding, as its symmetric part."""

from torch import Tensor

from lipgan._checks import check_symmetric


def symmetrize(name: str, a: Tensor) -> tuple[Tensor, bool]:
    """``(a + a^T) / 2`` of ``a [n, n]`` in float64, and whether ``a`` is symmetric to the last bit.

    Raises:
        ValueError: ``a``, called ``name``, is not finite, or not symmetric beyond the rounding of its dtype.
    """
    exact = check_symmetric(name, a)
    a = a.double()
    return (a, True) if exact else (0.5 * (a + a.mT), False)
