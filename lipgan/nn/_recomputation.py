"""Normalized weights for a part of a model that ``torch.utils.checkpoint(use_reentrant=False)`` runs again.

The second run takes place within the backward, outside of the forward of the model and so after its group has taken
its weights back. What a part of the model was given in the first run is kept for as long as PyTorch may run that part
again: with the object that describes the run, which only the closures of the checkpoint's hooks hold.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

_kept: weakref.WeakKeyDictionary[Any, dict[nn.Module, Tensor | None]] = weakref.WeakKeyDictionary()


def _top_hook() -> tuple[str, Any] | None:
    """``("first", frame)`` or ``("again", frame)`` where a checkpoint saves tensors at present, else None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    pack = inspect.unwrap(hooks[0])
    names = getattr(getattr(pack, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(pack, "__closure__", None) or (), strict=True))
    if "_checkpoint_hook" in pack.__qualname__ and "frame" in cells:
        return "first", cells["frame"].cell_contents
    if "_recomputation_hook" in pack.__qualname__ and "target_frame_ref" in cells:
        return "again", cells["target_frame_ref"].cell_contents()
    return None


def keep(owner: nn.Module, weight: Tensor | None) -> None:
    """Remember what ``owner`` gave out, if a checkpoint may run this part of the model again; None: its own weight."""
    hook = _top_hook()
    if hook is not None and hook[0] == "first":
        # Without its graph, which would keep the frame alive for ever where it was made within the checkpoint. The
        # second run needs values, and to save as many tensors as the first one did.
        weight = None if weight is None else weight.detach().requires_grad_(weight.requires_grad)
        _kept.setdefault(hook[1], {})[owner] = weight


def recall(owner: nn.Module) -> Tensor | None:
    """What ``owner`` gave out in the first run, within the second one; None if it made its weight itself.

    Raises:
        RuntimeError: checkpoints within checkpoints, and several forwards of the model before the backward: which of
            them is run again cannot be told.
    """
    hook = _top_hook()
    if hook is None:
        return None
    kind, frame = hook
    if kind == "again" or owner in _kept.get(frame, {}):
        return _kept.get(frame, {}).get(owner)
    # A checkpoint within a checkpoint: the outer one, run again, has begun the inner one anew.
    candidates = [weights[owner] for weights in list(_kept.values()) if owner in weights]
    distinct: list[Tensor | None] = []
    for candidate in candidates:
        if not any(
            candidate is other or (candidate is not None and other is not None and torch.equal(candidate, other))
            for other in distinct
        ):
            distinct.append(candidate)
    if len(distinct) > 1:
        raise RuntimeError(
            "a SpectralNormGroup cannot tell which of several forwards a checkpoint within a checkpoint runs again: "
            "use one level of torch.utils.checkpoint in the model, or one backward after each forward"
        )
    weight = distinct[0] if distinct else None
    keep(owner, weight)
    return weight
