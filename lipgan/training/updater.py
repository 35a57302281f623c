"""One network's side of an update: its optimizer, and what happens to gradients before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipgan.recipes import Recipe
from lipgan.training import distributed
from lipgan.training.adam import AdamStep

__all__ = ["NetworkUpdater"]


class NetworkUpdater:
    """Updates the parameters of one module as a recipe says.

    Args:
        module: the network.
        recipe: of optimizer, precision, clipping.
        lr: the learning rate before decay.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, lr: float) -> None:
        self.module, self.lr, self.max_grad_norm = module, lr, recipe.max_grad_norm
        self.parameters = list(module.parameters())
        device = self.parameters[0].device
        self.optimizer = _optimizer(self.parameters, recipe, lr)
        self._adam_step = AdamStep(self.optimizer) if isinstance(self.optimizer, torch.optim.Adam) else None
        # Losses in float16 are multiplied, so that small gradients do not vanish.
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self._scaled = self.scaler.is_enabled()
        self._device = device

    def frozen(self) -> _Frozen:
        """No gradients of this network's weights meanwhile, which saves a third of its backward pass."""
        return _Frozen(self.parameters)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to those that are there."""
        scaled = self.scaler.scale(loss) if self._scaled else loss
        scaled.backward()  # type: ignore[no-untyped-call]

    def update(self, *, measure: bool) -> Tensor | None:
        """Average the gradients over the processes, shorten them, take the step, and drop them.

        Args:
            measure: return the Euclidean norm of the gradient before shortening, 0-dim; None without.
        """
        distributed.average_gradients(self.parameters)
        norm = None
        if measure or self.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            limit = self.max_grad_norm or math.inf
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit) if limit < math.inf else self._norm()
        if self._scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self._adam_step is not None:
            self._adam_step()
        else:
            self.optimizer.step()
        # What the optimizer's zero_grad does, which takes as long as a layer of a small network.
        for p in self.parameters:
            p.grad = None
        return norm if measure else None

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def set_lr(self, factor: float) -> None:
        """The learning rate is now ``factor`` times the one at the start."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer and of the scaling."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    first, second = recipe.betas
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, alpha=second, foreach=True)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=first, fused=True)
    # Fused: one pass over all weights instead of a dozen small operations for each.
    return torch.optim.Adam(parameters, lr=lr, betas=recipe.betas, fused=True)


class _Frozen:
    """What `NetworkUpdater.frozen` returns: a class, since a generator takes twice as long."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._trainable = [p for p in parameters if p.requires_grad]

    def __enter__(self) -> None:
        for p in self._trainable:
            p.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for p in self._trainable:
            p.requires_grad_(True)
