"""The Inception-v3 that defines the FID, with weights from a file that the user has."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan._checks import check_choice
from lipgan.metrics.features import weights as weights_files
from lipgan.metrics.features.base import ImageFeatures, as_rgb, as_unit_images, one_by_one

__all__ = ["DIMS", "PREPROCESSINGS", "SHA256", "SIZE", "URL", "InceptionFeatures", "InceptionNetwork", "cached_weights"]

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

# Of the file there. Its publisher tells the first 32 bits only, in its name; programs that pin it agree on the rest.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE = 95_628_359

# Lengths of the features: means over the image at four depths, and the logits.
DIMS = (64, 192, 768, 2048, 1008)

_CLASSES = 1008
_SIDE = 299  # pixels

PREPROCESSINGS = ("pytorch", "tensorflow", "torchmetrics", "clean")

# Output channels, height and width of a kernel. Several in one place work side by side on the same input.
_Layer: TypeAlias = "tuple[int, int, int]"
_Chain: TypeAlias = "list[_Layer | list[_Layer]]"


class _Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, layer: _Layer, stride: int = 1, *, pad: bool = True) -> None:
        super().__init__()
        outputs, height, width = layer
        padding = (height // 2, width // 2) if pad else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Chains of convolutions side by side and a pooling branch, joined along the channels.

    The names of the convolutions are those of the published weights: ``branch``, or ``branch_1``, ``branch_2`` of
    a longer chain, with ``a`` and ``b`` for two side by side.

    Args:
        inputs: channels.
        chains: the convolutions of each branch, by name.
        pool: output channels of the convolution behind the pooling. None: the block halves the image, by stride 2 in
            the last convolution of each chain and in the pooling, which has no convolution.
        max_pool: pool by maximum instead of mean.
    """

    def __init__(self, inputs: int, chains: dict[str, _Chain], pool: int | None, *, max_pool: bool = False) -> None:
        super().__init__()
        self.halves, self.max_pool = pool is None, max_pool
        self.steps: list[list[list[str]]] = []
        outputs = 0
        for branch, chain in chains.items():
            channels, steps = inputs, []
            for index, group in enumerate(chain, 1):
                last = index == len(chain)
                if isinstance(group, list):
                    layers = {f"{branch}_{index}{letter}": layer for letter, layer in zip("ab", group, strict=True)}
                else:
                    layers = {branch if len(chain) == 1 else f"{branch}_{index}": group}
                for name, layer in layers.items():
                    halve = self.halves and last
                    self.add_module(name, _Convolution(channels, layer, 2 if halve else 1, pad=not halve))
                channels = sum(layer[0] for layer in layers.values())
                steps.append(list(layers))
            self.steps.append(steps)
            outputs += channels
        if pool is not None:
            self.branch_pool = _Convolution(inputs, (pool, 1, 1))
        self.channels = outputs + (inputs if pool is None else pool)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self.steps:
            y = x
            for names in steps:
                parts = [self.get_submodule(name)(y) for name in names]
                y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outputs.append(y)
        if self.halves:
            outputs.append(F.max_pool2d(x, 3, stride=2))
        elif self.max_pool:
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            # As in TensorFlow, and unlike torchvision, the padding does not count.
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(outputs, 1)


def _mixed_35(inputs: int, pool: int) -> _Mixed:
    """A block at 35x35 pixels."""
    chains: dict[str, _Chain] = {
        "branch1x1": [(64, 1, 1)],
        "branch5x5": [(48, 1, 1), (64, 5, 5)],
        "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)],
    }
    return _Mixed(inputs, chains, pool)


def _mixed_35_to_17(inputs: int) -> _Mixed:
    chains: dict[str, _Chain] = {
        "branch3x3": [(384, 3, 3)],
        "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)],
    }
    return _Mixed(inputs, chains, None)


def _mixed_17(inputs: int, width: int) -> _Mixed:
    """A block at 17x17 pixels."""
    chains: dict[str, _Chain] = {
        "branch1x1": [(192, 1, 1)],
        "branch7x7": [(width, 1, 1), (width, 1, 7), (192, 7, 1)],
        "branch7x7dbl": [(width, 1, 1), (width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7)],
    }
    return _Mixed(inputs, chains, 192)


def _mixed_17_to_8(inputs: int) -> _Mixed:
    chains: dict[str, _Chain] = {
        "branch3x3": [(192, 1, 1), (320, 3, 3)],
        "branch7x7x3": [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)],
    }
    return _Mixed(inputs, chains, None)


def _mixed_8(inputs: int, *, max_pool: bool) -> _Mixed:
    """A block at 8x8 pixels."""
    split = [(384, 1, 3), (384, 3, 1)]
    chains: dict[str, _Chain] = {
        "branch1x1": [(320, 1, 1)],
        "branch3x3": [(384, 1, 1), split],
        "branch3x3dbl": [(448, 1, 1), (384, 3, 3), split],
    }
    return _Mixed(inputs, chains, 192, max_pool=max_pool)


class InceptionNetwork(nn.Module):
    """The network. Its names of parameters are those of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, (32, 3, 3), 2, pad=False)
        self.Conv2d_2a_3x3 = _Convolution(32, (32, 3, 3), pad=False)
        self.Conv2d_2b_3x3 = _Convolution(32, (64, 3, 3))
        self.Conv2d_3b_1x1 = _Convolution(64, (80, 1, 1))
        self.Conv2d_4a_3x3 = _Convolution(80, (192, 3, 3), pad=False)
        self.Mixed_5b = _mixed_35(192, 32)
        self.Mixed_5c = _mixed_35(256, 64)
        self.Mixed_5d = _mixed_35(288, 64)
        self.Mixed_6a = _mixed_35_to_17(288)
        self.Mixed_6b = _mixed_17(768, 128)
        self.Mixed_6c = _mixed_17(768, 160)
        self.Mixed_6d = _mixed_17(768, 160)
        self.Mixed_6e = _mixed_17(768, 192)
        self.Mixed_7a = _mixed_17_to_8(768)
        self.Mixed_7b = _mixed_8(1280, max_pool=False)
        # The published network takes a maximum here, unlike the paper's.
        self.Mixed_7c = _mixed_8(2048, max_pool=True)
        self.fc = nn.Linear(2048, _CLASSES)

    def forward(self, x: Tensor, dim: int = 2048) -> Tensor:
        """Features ``[n, dim]``, one of the means over the image, of ``x [n, 3, 299, 299]`` in [-1, 1]."""
        parts = {
            64: (self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, nn.MaxPool2d(3, 2)),
            192: (self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, nn.MaxPool2d(3, 2)),
            768: (
                *(self.Mixed_5b, self.Mixed_5c, self.Mixed_5d),
                *(self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e),
            ),
            2048: (self.Mixed_7a, self.Mixed_7b, self.Mixed_7c),
        }
        for depth, layers in parts.items():
            for layer in layers:
                x = layer(x)
            if depth == dim:
                break
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class InceptionFeatures(ImageFeatures):
    """The features that published FIDs and Inception Scores are computed from.

    Images of any size are brought to 299x299 pixels, by bilinear interpolation without antialiasing unless
    ``preprocessing`` says otherwise.

    Args:
        weights: a file like that at :data:`URL`. None: that file in the cache of torch.hub.
        dim: 2048, the layer of the FID; 64, 192 or 768, means over the image at lesser depths; 1008, the logits.
        download: fetch that file if it is not in the cache. Nothing is fetched otherwise.
        preprocessing: "pytorch", as pytorch-fid: pixels are interpolated between their centres, and levels go to
            [-1, 1]; "tensorflow", as TensorFlow 1, torch-fidelity, and torchmetrics with ``antialias=False``: between
            their corners, so that the picture moves by a part of a pixel, and level 128 goes to 0; "torchmetrics", as
            torchmetrics from 1.8 on at its defaults: between their centres, with antialiasing, and level 128 goes to 0;
            "clean", as clean-fid: by Pillow's bicubic filter with antialiasing, not rounded to whole levels, and level
            128 goes to 0.

    Raises:
        FileNotFoundError: no such file; the message says where to get it and where to put it.
        ValueError: another ``dim`` or ``preprocessing``; ``weights`` beside ``download``; a file that holds something
            else, or whose SHA-256 does not begin with the digits that its name ends in. Where these are the published
            file's, or the name has none, its size and all of its SHA-256 must be :data:`SIZE` and :data:`SHA256`.
        OSError: the file cannot be read or fetched.

    Source: Szegedy et al. 2015 (arXiv:1512.00567); Heusel et al. 2017 (arXiv:1706.08500) for the features; the weights
        are TensorFlow's of 2015-12-05, converted by pytorch-fid; Parmar, Zhang, Zhu 2022 (arXiv:2104.11222) for
        "clean".
    """

    any_size = True

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        *,
        dim: int = 2048,
        download: bool = False,
        preprocessing: str = "pytorch",
    ) -> None:
        super().__init__()
        if dim not in DIMS:
            raise ValueError(f"dim must be one of {', '.join(map(str, DIMS))}, got {dim!r}")
        check_choice("preprocessing", preprocessing, PREPROCESSINGS)
        if weights is not None and download:
            raise ValueError("download must be False where weights names a file, got True")
        path = cached_weights() if weights is None else Path(weights)
        if download and not path.exists():
            weights_files.download(URL, path, SHA256)
        self.dim = self._dim = dim
        self.preprocessing = preprocessing
        # The name says what differs from the features of pytorch-fid.
        self.name = "inception" if dim == 2048 else f"inception-{dim}"
        if preprocessing != "pytorch":
            self.name += f"-{preprocessing}"
        # On the meta device no weights are drawn that are overwritten at once.
        with torch.device("meta"):
            self.network = InceptionNetwork()
        self.network.load_state_dict(_read(path, self.network.state_dict()), assign=True)
        self._freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[n, dim]``, float32. Errors as those of :func:`lipgan.metrics.features.base.as_unit_images`."""
        return self.logits(images) if self._dim == _CLASSES else self.means(images, self._dim)

    def logits(self, images: Tensor, *, bias: bool = True) -> Tensor:
        """Of the 1008 classes: ``[n, 1008]``, float32; the errors are those of a call."""
        fc = self.network.fc
        return F.linear(self.means(images, 2048), fc.weight, fc.bias if bias else None)

    def probabilities(self, images: Tensor) -> Tensor:
        """Of the 1008 classes, for the Inception Score: ``[n, 1008]``, float32; the errors are those of a call.

        They leave the bias of the logits out, as the code of the paper that proposes the score does.
        """
        return self.logits(images, bias=False).softmax(1)

    def means(self, images: Tensor, dim: int) -> Tensor:
        """The means over the image at another layer, ``[n, dim]``; the errors are those of a call."""
        x = one_by_one(self._prepared, images)
        if not len(x):
            return x.new_empty(0, dim)
        # A module that holds the extractor may have been brought to another dtype.
        means: Tensor = self.network(x.to(self.network.fc.weight.dtype), dim)
        return means

    def _prepared(self, images: Tensor) -> Tensor:
        """What the network is given: ``[n, 3, 299, 299]``, float32."""
        x = as_rgb(as_unit_images(images))
        if not len(x):
            return x.new_empty(0, 3, _SIDE, _SIDE)
        if self.preprocessing == "tensorflow":
            x = (_resize_corners(_resize_corners(255 * x, 3), 2) - 128) / 128
        elif self.preprocessing == "torchmetrics":
            scaled = F.interpolate(255 * x, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=True)
            x = (scaled - 128) / 128
        elif self.preprocessing == "clean":
            x = (resize_bicubic(255 * x) - 128) / 128
        else:
            x = 2 * F.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False) - 1
        return x.contiguous()


def resize_bicubic(x: Tensor) -> Tensor:
    """``x`` brought to 299 x 299 as Pillow scales its images of floating point, which stay within [0, 255]."""
    # With antialiasing, PyTorch's filter is Pillow's. In float64, as Pillow computes its weights and sums; one by one,
    # because a batch of large images in float64 takes gigabytes.
    scaled = [
        F.interpolate(image[None].double(), size=(_SIDE, _SIDE), mode="bicubic", align_corners=False, antialias=True)
        for image in x
    ]
    return torch.cat(scaled).clamp(0, 255).float()


def _resize_corners(x: Tensor, axis: int) -> Tensor:
    """``x`` brought to 299 along ``axis``, linearly, where place ``i`` is read at ``i * old / 299``."""
    size = x.shape[axis]
    places = torch.arange(_SIDE, dtype=torch.float32, device=x.device) * (size / _SIDE)
    low = places.long().clamp(max=size - 1)
    shape = [1] * x.ndim
    shape[axis] = _SIDE
    below, above = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
    return below + (above - below) * (places - low).view(shape)


# ---- the file ----

_FILE = URL.rpartition("/")[2]


def cached_weights() -> Path:
    """Where pytorch-fid, and `InceptionFeatures` when asked to download, keep the file at :data:`URL`."""
    return weights_files.cached(_FILE)


def _read(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The verified weights in the file, with the names and shapes of ``expected``, in float32."""
    # All of the digits, unless the name says that it is another file than the published one.
    digits = weights_files.digest_in_name(path.name)
    if digits is None or SHA256.startswith(digits):
        digits = SHA256
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        hint = (
            f"no such file; the features 'inception' need {_FILE} from {URL}: "
            f"put it at {cached_weights()}, or name it by weights=..., or allow the download by download=True"
        )
        raise FileNotFoundError(errno.ENOENT, hint, str(path)) from error
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and must be a file of weights")
    if digits == SHA256 and size != SIZE:
        raise ValueError(f"{path} is damaged or another file: it must have {SIZE} bytes, got {size}")
    return _checked(path, weights_files.read(path, digits), expected)


def _checked(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    # How many batches trained a batch norm plays no role in eval mode, and old files do not say it.
    # (zeros_like of a tensor on the meta device imports sympy, for a second.)
    counters = {name: torch.zeros((), dtype=t.dtype) for name, t in expected.items() if t.ndim == 0}
    weights = {name: tensor for name, tensor in state.items() if name not in counters}
    wanted = {name: tensor.shape for name, tensor in expected.items() if name not in counters}
    wrong = [name for name in [*wanted, *weights] if name not in weights or weights[name].shape != wanted.get(name)]
    if wrong:
        raise ValueError(
            f"{path} does not hold the weights of the FID's Inception-v3: {wrong[0]} is missing or differs"
        )
    return {name: tensor.float() for name, tensor in weights.items()} | counters
