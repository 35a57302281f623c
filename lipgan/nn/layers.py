"""PyTorch's layers with spectrally normalized weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from lipgan.nn.spectral_norm import spectral_norm


class SNLinear(nn.Linear):
    """:class:`torch.nn.Linear` with a spectrally normalized weight.

    What ``torch.nn.init`` is to change is ``parametrizations.weight.original``: ``weight`` is computed.

    Args:
        args, kwargs: those of the torch layer.
        n_power_iterations, eps: as in :func:`lipgan.spectral_norm`.
    """

    def __init__(self, *args: Any, n_power_iterations: int = 1, eps: float = 1e-12, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spectral_norm(self, n_power_iterations=n_power_iterations, eps=eps)


class SNConv1d(nn.Conv1d):
    """:class:`torch.nn.Conv1d` with a spectrally normalized weight; arguments as in :class:`SNLinear`."""

    def __init__(self, *args: Any, n_power_iterations: int = 1, eps: float = 1e-12, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spectral_norm(self, n_power_iterations=n_power_iterations, eps=eps)


class SNConv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` with a spectrally normalized weight; arguments as in :class:`SNLinear`."""

    def __init__(self, *args: Any, n_power_iterations: int = 1, eps: float = 1e-12, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spectral_norm(self, n_power_iterations=n_power_iterations, eps=eps)


class SNConv3d(nn.Conv3d):
    """:class:`torch.nn.Conv3d` with a spectrally normalized weight; arguments as in :class:`SNLinear`."""

    def __init__(self, *args: Any, n_power_iterations: int = 1, eps: float = 1e-12, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spectral_norm(self, n_power_iterations=n_power_iterations, eps=eps)


class SNConvTranspose1d(nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` with a spectrally normalized weight; arguments as in :class:`SNLinear`."""

    def __init__(self, *args: Any, n_power_iterations: int = 1, eps: float = 1e-12, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spectral_norm(self, n_power_iterations=n_power_iterations, eps=eps)


class SNConvTranspose2d(nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with a spectrally normalized weight; arguments as in :class:`SNLinear`."""

    def __init__(self, *args: Any, n_power_iterations: int = 1, eps: float = 1e-12, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spectral_norm(self, n_power_iterations=n_power_iterations, eps=eps)


class SNConvTranspose3d(nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` with a spectrally normalized weight; arguments as in :class:`SNLinear`."""

    def __init__(self, *args: Any, n_power_iterations: int = 1, eps: float = 1e-12, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spectral_norm(self, n_power_iterations=n_power_iterations, eps=eps)


class SNEmbedding(nn.Embedding):
    """:class:`torch.nn.Embedding` with a spectrally normalized weight; arguments as in :class:`SNLinear`."""

    def __init__(self, *args: Any, n_power_iterations: int = 1, eps: float = 1e-12, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spectral_norm(self, n_power_iterations=n_power_iterations, eps=eps)
