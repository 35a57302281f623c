"""What a generator makes, as a picture."""

import torch
from torch import nn

from lipgan.data import Dataset
from lipgan.systems import latents
from lipgan.training.pictures import Strip, captioned, image_bytes, picture
from lipgan.training.sampling import draw

__all__ = ["picture_of"]

# Interpolations between sentences, and images of each.
_STRIPS, _STEPS = 4, 10


def picture_of(generator: nn.Module, n: int, seed: int, data: Dataset | None, title: str) -> bytes:
    """``n`` samples of a generator in eval mode as PNG, by `lipgan.training.pictures.picture`.

    Of a generator that is told in sentences what to draw, each image with its sentence, and below images between pairs
    of sentences, all of a strip from the same noise.

    Args:
        generator: on any device.
        n, seed: as `lipgan.training.sampling.draw` takes them.
        data, title: as `picture` takes them.

    Raises:
        ValueError: as these.
    """
    samples = draw(generator, n, seed)
    classes, captions = getattr(generator, "classes", 0), getattr(generator, "captions", ())
    if not captions or samples.ndim != 4:
        return picture(samples, data, title, classes)
    page = captioned(samples, [captions[k % classes] for k in range(n)], _strips(generator, captions, seed))
    return image_bytes(page)


@torch.no_grad()
def _strips(generator: nn.Module, captions: tuple[str, ...], seed: int) -> list[Strip]:
    """From one sentence to another, in equal steps."""
    first = next(generator.parameters())
    random = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, _STEPS, device=first.device)
    strips = []
    for noise in latents(generator, _STRIPS, random).to(first):
        start, end = torch.randperm(len(captions), generator=random)[:2].tolist()
        pair = [torch.full((_STEPS,), label, device=first.device) for label in (start, end)]
        images = generator(noise.expand(_STEPS, -1), *pair, share).float().cpu()
        strips.append(Strip(captions[start], captions[end], images))
    return strips
