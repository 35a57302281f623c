"""Images with a sentence each: "two thin sevens"."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lipgan.data.dataset import Dataset
from lipgan.data.digits import digits

__all__ = ["sentences"]

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
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - count * width) // 2
    image[top : top + height, left : left + count * width] = row


def _captions() -> tuple[str, ...]:
    return tuple(
        f"{count} {stroke} {digit if count == 'one' else _plural(digit)}"
        for count in _COUNTS
        for stroke in _STROKES
        for digit in _DIGITS
    )


def _plural(word: str) -> str:
    return word + ("es" if word.endswith("x") else "s")
