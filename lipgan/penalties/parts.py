"""Samples of several tensors, as nodes and edges of a graph: joined for the penalty, taken apart for the critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import check_samples

# What a penalty is taken at: one tensor [B, ...], or several with the same B.
Samples = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """The tensors that samples consist of.

    Attributes:
        keys: of a dict; None for a tuple or list.
        shapes: of one sample of each tensor.
        dtypes: of each tensor.
    """

    keys: tuple[str, ...] | None
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """The arguments with which the critic is called for the joined samples ``x``, ``[B, D]``."""
        columns = torch.split(x, [torch.Size(shape).numel() for shape in self.shapes], dim=1)
        tensors = [
            part.reshape(-1, *shape).to(dtype)
            for part, shape, dtype in zip(columns, self.shapes, self.dtypes, strict=True)
        ]
        return tuple(tensors) if self.keys is None else (dict(zip(self.keys, tensors, strict=True)),)

    def deviations(self, x: Tensor) -> Tensor:
        """The standard deviation of all numbers of a part, for each column of ``x``: ``[D]``."""
        columns = torch.split(x, [torch.Size(shape).numel() for shape in self.shapes], dim=1)
        return torch.cat([part.std(correction=0).expand(part.shape[1]) for part in columns])


def join(name: str, samples: Any, convert: Any) -> tuple[Any, Parts | None]:
    """Several tensors as one ``[B, D]``, of the dtype that all promote to, with what it consists of.

    Anything else, a single tensor among it, comes back as it is, for the checks that follow.

    Args:
        name: of the argument, for messages.
        samples: a tuple, list or dict of tensors ``[B, ...]``.
        convert: applied to each tensor before it is read.

    Raises:
        TypeError: a part that is no dense floating-point tensor.
        ValueError: no parts, an empty one, or numbers of samples or devices that differ.
    """
    if isinstance(samples, Tensor) or not isinstance(samples, (tuple, list, Mapping)):
        return convert(samples), None
    keys = tuple(samples) if isinstance(samples, Mapping) else None
    named = {
        f"{name}[{key!r}]": convert(part)
        for key, part in (samples.items() if isinstance(samples, Mapping) else enumerate(samples))
    }
    if not named:
        raise ValueError(f"{name} must hold at least one tensor, got {samples!r}")
    for part_name, part in named.items():
        check_samples(part_name, part)
    (first_name, first), *others = named.items()
    for part_name, part in others:
        if part.shape[0] != first.shape[0]:
            raise ValueError(
                f"{part_name} must hold as many samples as {first_name}, {first.shape[0]}, got {len(part)}"
            )
        if part.device != first.device:
            raise ValueError(f"{part_name} must be on the device of {first_name}, {first.device}, got {part.device}")
    tensors = list(named.values())
    dtype = first.dtype
    for part in tensors:
        dtype = torch.promote_types(dtype, part.dtype)
    parts = Parts(keys, tuple(tuple(part.shape[1:]) for part in tensors), tuple(part.dtype for part in tensors))
    return torch.cat(
        [part.detach().flatten(1).to(dtype) if part.ndim > 1 else part.detach()[:, None].to(dtype) for part in tensors],
        1,
    ), parts


def check_same_parts(real: Parts | None, fake: Parts | None) -> None:
    """ValueError unless fake samples consist of what the real ones do; dtypes may differ."""
    if (real and (real.keys, real.shapes)) != (fake and (fake.keys, fake.shapes)):
        raise ValueError(f"fake must consist of what real does: {_words(real)}, got {_words(fake)}")


def _words(parts: Parts | None) -> str:
    if parts is None:
        return "one tensor"
    names = range(len(parts.shapes)) if parts.keys is None else parts.keys
    return ", ".join(
        f"{name!r} of shape [B{''.join(f', {n}' for n in shape)}]"
        for name, shape in zip(names, parts.shapes, strict=True)
    )
