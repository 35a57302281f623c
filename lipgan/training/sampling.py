"""Samples of a generator, and the generator of a checkpoint."""

import os

import torch
from torch import Tensor, nn

from lipgan import recipes
from lipgan._checks import check_count
from lipgan.systems import latents
from lipgan.training import checkpoint
from lipgan.training.checkpoint import explaining
from lipgan.training.networks import build_networks, normalized, placed

__all__ = ["draw", "load_generator"]

_DRAW_BATCH = 256


@torch.no_grad()
def draw(generator: nn.Module, n: int, seed: int) -> Tensor:
    """``n`` samples of a generator in eval mode: ``[n, ...]``, float32, on the CPU.

    The noise is a function of the seed alone. A generator with classes is asked for them in turn: 0, 1, ...

    Raises:
        ValueError: ``n`` below 1, or a generator without ``latent_dim``.
    """
    check_count("n", n)
    first = next(generator.parameters())
    noise = latents(generator, n, torch.Generator().manual_seed(seed))
    classes = getattr(generator, "classes", 0)
    samples = []
    for start in range(0, n, _DRAW_BATCH):
        z = noise[start : start + _DRAW_BATCH].to(first)
        labels = (torch.arange(start, start + len(z), device=first.device) % classes,) if classes else ()
        samples.append(generator(z, *labels).float().cpu())
    return torch.cat(samples)


def load_generator(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> nn.Module:
    """The averaged generator of a checkpoint, in eval mode, without the critic, the optimizers or the data.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: not a whole checkpoint, or its generator is not of the recipe's architecture.
    """
    state = checkpoint.read(path)
    with explaining(path):
        recipe = recipes.from_dict(state["recipe"])
        generator, _ = build_networks(state, recipe)
        generator, _ = normalized(generator, recipe.generator_norm)
        generator.load_state_dict(state["ema"])
    return placed(generator, torch.device(device)).eval().requires_grad_(False)
