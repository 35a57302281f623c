"""Features and class probabilities of a small classifier of handwritten digits, whose weights are in the package."""

from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.metrics.features.base import ImageFeatures, as_unit_images

__all__ = ["HELD_OUT", "WEIGHTS", "DigitFeatures", "DigitNetwork"]

WEIGHTS = "digits.safetensors"
# Of the digits of lipgan.data, those that the classifier was not trained on: every fifth.
HELD_OUT = slice(4, None, 5)

_SIZE, _DIM, _CLASSES = 8, 64, 10


class DigitNetwork(nn.Module):
    """The classifier: three convolutions, a layer of features, a layer of classes. Images are ``[n, 1, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
        )
        self.hidden = nn.Linear(64 * 2 * 2, _DIM)
        self.classes = nn.Linear(_DIM, _CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """``[n, 64]``: what the last layer separates into classes."""
        return F.relu(self.hidden(self.convolutions(images)))

    def forward(self, images: Tensor) -> Tensor:
        """The logits ``[n, 10]``."""
        logits: Tensor = self.classes(self.features(images))
        return logits


def to_digits(images: Tensor) -> Tensor:
    """Images ``[n, 1 or 3, h, w]`` in [0, 1] as the network takes them: grey, averaged over 8x8 cells."""
    return F.adaptive_avg_pool2d(images.mean(1, keepdim=True), _SIZE)


class DigitFeatures(ImageFeatures):
    """Features of handwritten digits, and their class probabilities for the Inception Score.

    The classifier was trained by scripts/train_digits_features.py on four fifths of the digits of
    :mod:`lipgan.data`. Images are bright digits on black that fill the frame, of any size: they are averaged to 8x8
    pixels. Of other images the features say little.
    """

    name = "digits"
    dim = _DIM

    def __init__(self) -> None:
        super().__init__()
        # On the meta device no weights are drawn that are overwritten at once, so the global generator stays as it is.
        with torch.device("meta"):
            self.network = DigitNetwork()
        weights = load(resources.files(__package__).joinpath(WEIGHTS).read_bytes())
        self.network.load_state_dict(weights, assign=True)
        self._freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[n, 64]``, float32. Errors as those of :func:`lipgan.metrics.features.base.as_unit_images`."""
        return self.network.features(to_digits(as_unit_images(images)))

    def probabilities(self, images: Tensor) -> Tensor:
        """Of the classes 0 to 9: ``[n, 10]``, float32; the errors are those of a call."""
        logits: Tensor = self.network(to_digits(as_unit_images(images)))
        return logits.softmax(1)
