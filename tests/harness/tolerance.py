"""The error rule of the parity tests.

A kernel is as good as PyTorch when its error against a float64 truth is at most ``c`` times PyTorch's own error in
the same dtype, plus a floor for the cases in which PyTorch happens to be exact. The floor is a number of roundings
(units of the dtype's eps) relative to the largest entry of the truth; each test derives its number in a comment.
"""

import torch


def max_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference, in float64, on the CPU; inf where one side is NaN and the other is not."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape, f"shapes differ: {tuple(value.shape)} and {tuple(truth.shape)}"
    if value.numel() == 0:
        return 0.0
    error = (value - truth).abs()
    both_nan = value.isnan() & truth.isnan()
    same_inf = value.isinf() & (value == truth)
    error = error.masked_fill(both_nan | same_inf, 0.0)
    return float(error.nan_to_num(nan=float("inf")).max())


def assert_as_accurate(
    value: torch.Tensor,
    peer: torch.Tensor,
    truth: torch.Tensor,
    *,
    roundings: float,
    c: float = 2.0,
    scale: float | None = None,
) -> None:
    """Assert ``error(value) <= c * error(peer) + roundings * eps * scale``.

    Args:
        value: our result, in the dtype under test.
        peer: PyTorch's result in the same dtype.
        truth: the result in float64, from float64 inputs equal to the inputs under test.
        roundings: the floor, in roundings of ``value.dtype``.
        c: how many times PyTorch's error is allowed.
        scale: the size of the terms that the result is a sum of; ``max|truth|`` unless they cancel.
    """
    assert value.dtype == peer.dtype, f"dtypes differ: {value.dtype} and {peer.dtype}"
    if scale is None:
        scale = float(truth.detach().double().abs().max()) if truth.numel() else 0.0
    bound = c * max_error(peer, truth) + roundings * torch.finfo(value.dtype).eps * scale
    error = max_error(value, truth)
    assert error <= bound, f"error {error:.3e} exceeds {bound:.3e} (PyTorch's own: {max_error(peer, truth):.3e})"
