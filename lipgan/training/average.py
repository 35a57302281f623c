"""The generator that is sampled: a moving average of the one that is trained."""

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]

_STATISTICS = ("running_mean", "running_var")


class MovingAverage:
    """Keeps ``average`` an exponential moving average of ``module``: parameters, and the statistics of batch norm.

    Other buffers (counters, singular vectors, a schedule's state) are copied: their averages mean nothing.

    Source: Yazici et al. 2019, The Unusual Effectiveness of Averaging in GAN Training, arXiv:1806.04498.
    """

    def __init__(self, average: nn.Module, module: nn.Module) -> None:
        averaged = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        ours, theirs = average.state_dict(), module.state_dict()
        # Tensors of the average, and those of the module that they follow.
        self._averaged: tuple[list[Tensor], list[Tensor]] = [], []
        self._copied: tuple[list[Tensor], list[Tensor]] = [], []
        seen = set()
        for name, value in theirs.items():
            # A parameter that two layers share has two names, and moves once.
            if (key := (value.data_ptr(), value.shape)) in seen and value.numel():
                continue
            seen.add(key)
            followers, followed = self._averaged if name in averaged or name.endswith(_STATISTICS) else self._copied
            followers.append(ours[name])
            followed.append(value)

    def update(self, decay: float) -> None:
        """``average = decay * average + (1 - decay) * module``."""
        torch._foreach_lerp_(*self._averaged, 1 - decay)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)
