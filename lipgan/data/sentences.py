"""Images with a sentence each: "two thin sevens"."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lipgan.data.dataset import Dataset
from lipgan.data.digits import digits

__all__ = ["counted", "cut", "ink", "sentences"]

_SEED = 7
# Of each sentence.
_IMAGES = 60
_COUNTS = ("one", "two", "three")
_STROKES = ("thin", "thick")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# A stroke of the digits is about 3 pixels wide at 3 times their own size.
_SCALE = 3


def sentences(size: int) -> Dataset:
    """One to three handwritten digits of a class side by side, thin or thick, each image with its sentence.

    The digits are those of `lipgan.data.digits`. Thin ones are eroded and thick ones dilated by 3 x 3 pixels at three
    times their own size; two or three of a kind are different digits of that class, drawn once.

    Args:
        size: pixels a side, a multiple of 4 from 16 to 128. A digit is a third of it wide and half of it high.

    Returns:
        samples ``[3600, 1, size, size]``, float32 in [-1, 1]; labels ``[3600]``, the sentence, 0 to 59 in turn; and as
        captions the sentences: "one thin zero", "one thin one", ..., "three thick nines". Ten of them differ in the
        digit alone, and the label of a sentence is 10 (2 (count - 1) + stroke) + digit.

    Raises:
        ValueError: another ``size``.
    """
    if size % 4 or not 16 <= size <= 128:
        raise ValueError(f"size of sentences must be a multiple of 4 from 16 to 128, got {size}")
    source = digits(8 * _SCALE)
    assert source.labels is not None
    # Lone pixels of grey would grow with the strokes.
    levels = (source.samples - 0.2).clamp(-1, 1)
    strokes = torch.stack([-F.max_pool2d(-levels, 3, 1, 1), F.max_pool2d(levels, 3, 1, 1)])
    height, width = size // 2, size // 3
    strokes = F.interpolate(strokes.flatten(0, 1), (height, width), mode="area").view(2, -1, height, width)

    random = torch.Generator().manual_seed(_SEED)
    of_digit = [(source.labels == digit).nonzero().squeeze(1) for digit in range(10)]
    labels = torch.arange(_IMAGES * len(_COUNTS) * len(_STROKES) * len(_DIGITS)) % 60
    samples = torch.full((len(labels), 1, size, size), -1.0)
    for image, label in zip(samples, labels.tolist(), strict=True):
        digit, stroke, count = label % 10, label // 10 % 2, label // 20 + 1
        chosen = of_digit[digit][torch.randperm(len(of_digit[digit]), generator=random)[:count]]
        _place(image[0], strokes[stroke, chosen])
    return Dataset("sentences", samples, labels, captions=_captions())


def _place(image: Tensor, drawn: Tensor) -> None:
    """Put ``drawn [count, h, w]`` side by side into the middle of ``image [size, size]``."""
    count, height, width = drawn.shape
    row = drawn.transpose(0, 1).reshape(height, count * width)
    top, left = _corner(image.shape[0], count)
    image[top : top + height, left : left + count * width] = row


def _corner(size: int, count: int) -> tuple[int, int]:
    """The first row and column of so many digits in an image of ``size`` pixels a side."""
    return (size - size // 2) // 2, (size - count * (size // 3)) // 2


def cut(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The digits of images ``[n, 1, size, size]``, where those of the sentences ``labels [n]`` stand.

    Returns:
        digits ``[m, 1, size // 2, size // 3]``, and the number of the image that each is of, ``[m]``, in rising order.
    """
    size = images.shape[-1]
    digits, owners = [], []
    for k, count in enumerate((labels // 20 + 1).tolist()):
        top, left = _corner(size, count)
        strip = images[k, :, top : top + size // 2, left : left + count * (size // 3)]
        digits.append(torch.stack(strip.chunk(count, 2)))
        owners += [k] * count
    return torch.cat(digits), torch.tensor(owners)


def ink(images: Tensor) -> Tensor:
    """How bright images ``[n, 1, size, size]`` are above black in all, ``[n]``."""
    return ((images + 1) / 2).clamp(0, 1).sum((1, 2, 3))


def counted(images: Tensor) -> Tensor:
    """How many digits stand in images ``[n, 1, size, size]``, by how far they reach: ``[n]``, int64, 1 to 3.

    The outer two of three lie for a third of all the ink further than a digit's width from the middle, where two have
    none; of two, half of it lies further than half a width, where one has hardly any.
    """
    size = images.shape[-1]
    columns = ((images + 1) / 2).clamp(0, 1).sum((1, 2))
    away = (torch.arange(size, device=images.device) + 0.5 - size / 2).abs()

    def beyond(distance: float) -> Tensor:
        return columns[:, away > distance].sum(1) / columns.sum(1).clamp_min(1e-6)

    width = size // 3
    return 1 + (beyond(width / 2) > 0.2).long() + (beyond(width) > 0.15).long()


def _captions() -> tuple[str, ...]:
    return tuple(
        f"{count} {stroke} {digit if count == 'one' else _plural(digit)}"
        for count in _COUNTS
        for stroke in _STROKES
        for digit in _DIGITS
    )


def _plural(word: str) -> str:
    return word + ("es" if word.endswith("x") else "s")
