"""Spectral normalization of a convolution by its operator norm, as a parametrization."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lipgan._checks import check_count, check_positive
from lipgan.linalg.conv_operator import ConvOperator, power_iteration
from lipgan.nn._pickling import make_picklable
from lipgan.nn.spectral_norm import is_normalized

__all__ = ["conv_spectral_norm"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# As many as torch.nn.utils.parametrizations.spectral_norm starts with.
_INITIAL_ITERATIONS = 15


class _ConvSpectralNorm(nn.Module):
    """``W -> W / sigma`` with ``sigma = <u, A(W) v>``, where ``A(W)`` is the convolution by ``W``."""

    _u: Tensor  # [C_out, *out]
    _v: Tensor  # [C_in, *in]

    def __init__(self, operator: ConvOperator, weight: Tensor, n_power_iterations: int, eps: float) -> None:
        super().__init__()
        self.operator = operator
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        wide = self._widen(weight.detach())
        u = torch.randn(operator.output_shape, dtype=wide.dtype, device=wide.device)
        v = torch.randn(operator.input_shape, dtype=wide.dtype, device=wide.device)
        u, v = u / torch.linalg.vector_norm(u), v / torch.linalg.vector_norm(v)
        u, v = power_iteration(operator, wide, u, v, _INITIAL_ITERATIONS, eps)
        self.register_buffer("_u", u.to(weight.dtype))
        self.register_buffer("_v", v.to(weight.dtype))

    @staticmethod
    def _widen(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

    def forward(self, weight: Tensor) -> Tensor:
        wide, u, v = self._widen(weight), self._widen(self._u), self._widen(self._v)
        if self.training:
            u, v = power_iteration(self.operator, wide.detach(), u, v, self.n_power_iterations, self.eps)
            with torch.no_grad():
                self._u.copy_(u)
                self._v.copy_(v)
        # The next forward overwrites the buffers while a backward may still need these.
        u, v = u.clone(), v.clone()
        sigma = (u * self.operator(wide, v)).sum()
        return (wide / torch.where(sigma == 0, 1.0, sigma)).to(weight.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"input_size={self.operator.input_shape[1:]}, n_power_iterations={self.n_power_iterations}"


def conv_spectral_norm(
    module: nn.Module,
    input_size: int | Sequence[int],
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> nn.Module:
    """Divide the weight of a convolution by the operator norm of that convolution.

    The weight becomes ``W / sigma`` with ``sigma`` the largest singular value of the layer, without its bias,
    on inputs of the spatial size ``input_size``, with the layer's own stride, padding, dilation and groups.
    The layer is then 1-Lipschitz in the Euclidean norm up to the convergence of the power iteration. For zero
    padding the norm does not decrease with the size, so the largest size that the layer meets serves the
    smaller ones.

    In training mode each access to the weight makes ``n_power_iterations`` iterations and stores the singular
    vectors in the buffers ``parametrizations.weight.0._u`` ``(C_out, *out)`` and ``._v`` ``(C_in, *in)``; in
    eval mode nothing is changed. The gradient takes ``u`` and ``v`` as constants. A weight with ``sigma = 0``
    is left as it is. ``torch.nn.utils.parametrize.remove_parametrizations`` undoes it.

    Args:
        module: Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d or ConvTranspose3d; all padding
            modes.
        input_size: spatial size of the layer's input, an int or one int per spatial dimension.
        name: name of the weight parameter.
        n_power_iterations: iterations at each access in training mode, at least 1.
        eps: a new singular vector is dropped where its norm before scaling is not larger than this.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a convolution, its weight is not real floating-point, or
            ``n_power_iterations`` is not an int.
        ValueError: no parameter ``name``, a weight not yet initialized, a wrong ``input_size``,
            ``n_power_iterations < 1``, ``eps <= 0``, or the parameter is spectrally normalized already.

    Source: Miyato et al. 2018, Algorithm 1, with convolutions in place of matrices; see
    docs/numerics/conv_spectral_norm.md.

    Example::

        >>> conv = conv_spectral_norm(torch.nn.Conv2d(3, 64, 3, padding=1), (32, 32))
        >>> y = conv(torch.randn(8, 3, 32, 32))
    """
    if not isinstance(module, _CONVOLUTIONS + _TRANSPOSED):
        raise TypeError(f"module must be a Conv or ConvTranspose layer, got {type(module).__name__}")
    if is_normalized(module, name) or (
        parametrize.is_parametrized(module, name)
        and any(isinstance(applied, _ConvSpectralNorm) for applied in getattr(module.parametrizations, name))
    ):
        raise ValueError(f"{name!r} of module {type(module).__name__} is spectrally normalized already")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"module {type(module).__name__} has no parameter or buffer named {name!r}")
    if is_lazy(weight):
        raise ValueError(f"name {name!r} is a parameter that is not initialized yet")
    if weight.ndim != len(module.kernel_size) + 2:
        raise ValueError(f"name {name!r} is no convolution weight, its shape is {tuple(weight.shape)}")
    check_count("n_power_iterations", n_power_iterations)
    check_positive("eps", eps)
    operator = ConvOperator.create(
        weight,
        input_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        transposed=isinstance(module, _TRANSPOSED),
        output_padding=module.output_padding,
        padding_mode=module.padding_mode,
    )
    parametrize.register_parametrization(module, name, _ConvSpectralNorm(operator, weight, n_power_iterations, eps))
    make_picklable(module)
    return module
