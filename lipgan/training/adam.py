"""A step of Adam on a CPU with little around PyTorch's kernel."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import optimizer as _base

__all__ = ["AdamStep"]


class AdamStep:
    """``optimizer.step()``, to the bit; on a CPU the kernel of ``fused=True`` is called directly.

    Around the kernel, PyTorch's step sorts the parameters by device and dtype, asks for the profiler and guards against
    tracers. With networks of some hundred units that takes as long as the kernel. Where somebody might notice (hooks, a
    schedule of learning rates, the profiler, options that recipes do not have), its own step is called.
    """

    def __init__(self, optimizer: torch.optim.Adam) -> None:
        self.optimizer = optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._alike = len({p.dtype for p in parameters}) == 1 and all(
            type(p) is nn.Parameter and p.device.type == "cpu" and p.is_floating_point() for p in parameters
        )

    def __call__(self) -> None:
        optimizer = self.optimizer
        group = optimizer.param_groups[0]
        parameters = group["params"]
        grads, states = [p.grad for p in parameters], [optimizer.state.get(p, {}) for p in parameters]
        # The first step makes the states; parameters without a gradient are left alone.
        if not self._alike or not all(states) or any(grad is None for grad in grads) or self._needs_all():
            optimizer.step()
            return
        steps = [state["step"] for state in states]
        beta1, beta2 = group["betas"]
        with torch.no_grad():
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                parameters,
                grads,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )

    def _needs_all(self) -> bool:
        optimizer = self.optimizer
        group = optimizer.param_groups[0]
        return bool(
            len(optimizer.param_groups) > 1
            or not group["fused"]
            or group["amsgrad"]
            or group["decoupled_weight_decay"]
            or not isinstance(group["lr"], float)
            # A schedule of PyTorch puts a function of its own in the place of the method.
            or "step" in optimizer.__dict__
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _base._global_optimizer_pre_hooks
            or _base._global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        )
