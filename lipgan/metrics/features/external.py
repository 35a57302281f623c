"""Features of networks from other packages, by name: torchvision, timm, transformers, or a file of the user's.

Each network is given images as its own package prepares them: size, crop, filter, range and norm come from what the
package says of the weights, not from this file. Nothing is fetched unless the caller allows it. Weights are read
without running code from them, and no code that comes with a model is run. ``module:`` alone runs code: that of the
file that it names.
"""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lipgan._packages import first_line, imported
from lipgan._registry import lookup
from lipgan.metrics.features import weights as weights_files
from lipgan.metrics.features.base import ImageFeatures, as_rgb, as_unit_images
from lipgan.metrics.features.preprocessing import INTERPOLATIONS, Preprocessing

__all__ = ["PREFIXES", "ExternalFeatures", "UserFeatures", "huggingface", "module", "timm", "torchvision"]

_Weights = str | os.PathLike[str] | None


class ExternalFeatures(ImageFeatures):
    """A network of another package, with the preprocessing that belongs to its weights.

    Args:
        name: what to call the features.
        network: takes ``[n, 3, h, w]``, float32, to features ``[n, d]``. It is frozen here.
        preprocessing: of images.

    Attributes:
        network, preprocessing: as given.

    Raises:
        ValueError: the network fails on a black image, or makes something else of it than features ``[1, d]``.
    """

    def __init__(self, name: str, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.name, self.network, self.preprocessing = name, network, preprocessing
        self._freeze()
        resize = preprocessing.resize
        size = preprocessing.size or ((resize, resize) if isinstance(resize, int) else (64, 64))
        # The default device may be another than the CPU's.
        device = next((parameter.device for parameter in network.parameters()), None)
        with _explaining(name, "cannot be used"), torch.no_grad():
            row = self.network(torch.zeros(1, 3, *size, device=device))
        self.dim = _width(name, row, 1)
        self.any_size = preprocessing.size is not None

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[n, dim]``, float32. Errors as those of :func:`lipgan.metrics.features.base.as_unit_images`."""
        x = self.preprocessing(images)
        if not len(x):
            return x.new_empty(0, self.dim or 0)
        # A module that holds the extractor may have been brought to another dtype.
        dtype = next((parameter.dtype for parameter in self.network.parameters()), x.dtype)
        features: Tensor = self.network(x.to(dtype))
        return features.float()


def _width(name: str, features: object, n: int) -> int:
    """The ``d`` of ``features [n, d]``; ValueError for anything else."""
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != n or not features.is_floating_point():
        got = f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{name} must take {n} images to features [{n}, d] of floating point, got {got}")
    return features.shape[1]


@contextmanager
def _explaining(name: str, what: str) -> Iterator[None]:
    """Whatever packages raise becomes one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error):
            raise
        raise ValueError(f"{name} {what}: {first_line(error)}") from error


def _absent(name: str, where: str, path: str, rest: str) -> FileNotFoundError:
    hint = f"no such file; the features {name} need the weights {where}: {rest}allow the download by download=True"
    return FileNotFoundError(errno.ENOENT, hint, path)


@contextmanager
def _drawn(wanted: bool) -> Iterator[None]:
    """Random weights of a network that is made within are those of seed 0, and the global generator stays."""
    with torch.random.fork_rng(devices=[], enabled=wanted):
        if wanted:
            torch.manual_seed(0)
        yield


def _called(name: str, pretrained: bool, weights: _Weights) -> str:
    """The name of features of such weights."""
    if not pretrained:
        return f"{name}, random weights"
    return name if weights is None else f"{name}, weights {Path(weights).name}"


def _check_origin(pretrained: bool, download: bool, weights: _Weights, sha256: str | None) -> None:
    if not pretrained and (download or weights is not None or sha256 is not None):
        raise ValueError("pretrained=False draws the weights: leave out weights, sha256 and download")
    if weights is not None and download:
        raise ValueError("download must be False where weights names a file, got True")


# ---- torchvision ----


def torchvision(
    which: str,
    *,
    weights: _Weights = None,
    sha256: str | None = None,
    pretrained: bool = True,
    download: bool = False,
) -> ExternalFeatures:
    """What the last linear layer of a classifier of ``torchvision.models`` is given.

    Args:
        which: such as resnet50, or resnet50.IMAGENET1K_V1; without the name of the weights, torchvision's default ones.
            Their ``transforms`` are the preprocessing.
        weights: a file of weights, .safetensors or what torch.load reads without running code. None: that of
            torchvision, in the cache of torch.hub.
        sha256: what the file's SHA-256 begins with, 8 digits or more. None: those in its name.
        pretrained: False for random weights, always the same.
        download: fetch torchvision's file if it is not in the cache.

    Raises:
        ValueError: torchvision is not installed; an unknown model or weights; a model without a linear layer at its
            end; a file that is damaged or of another model.
        FileNotFoundError: no such file; the message says where to get it and where to put it.
    """
    _check_origin(pretrained, download, weights, sha256)
    models: Any = imported("torchvision.models", "torchvision", f"torchvision:{which}")
    model, _, version = which.partition(".")
    lookup(dict.fromkeys(models.list_models(module=models)), model, "model of torchvision")
    versions = models.get_model_weights(model)
    chosen = lookup(dict(versions.__members__), version or "DEFAULT", f"weights of {model}")
    name = f"torchvision:{model}.{chosen.name}"
    with _explaining(name, "has no preprocessing that is known"):
        preprocessing = _of_torchvision(chosen.transforms())
    if pretrained:
        path = weights_files.cached(chosen.url) if weights is None else Path(weights)
        if weights is None and download and not path.exists():
            weights_files.download(chosen.url, path, weights_files.digest_in_name(path.name))
        if weights is None and not path.exists():
            raise _absent(name, chosen.url, str(path), "put them there, name a file by weights=..., or ")
        state = weights_files.read(path, sha256)
        with _explaining(str(path), f"does not hold the weights of {name}"), _reading(chosen, state):
            network: nn.Module = models.get_model(model, weights=chosen)
    else:
        # Of the networks there, these alone are made for one size of images.
        size = {"image_size": preprocessing.crop[0]} if model.startswith("vit_") and preprocessing.crop else {}
        with _drawn(True), _explaining(name, "cannot be made"):
            network = models.get_model(model, weights=None, **size)
    _behead(name, network)
    return ExternalFeatures(_called(name, pretrained, weights), network, preprocessing)


def _of_torchvision(preset: Any) -> Preprocessing:
    crop, resize = list(preset.crop_size), list(preset.resize_size)
    return Preprocessing(
        resize=resize[0] if len(resize) == 1 else (resize[0], resize[1]),
        crop=(crop[0], crop[-1]),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=_filter(preset.interpolation.value),
        round_up=True,
    )


@contextmanager
def _reading(chosen: Any, state: dict[str, Tensor]) -> Iterator[None]:
    """Weights of torchvision give ``state``, where they would fetch and unpickle a file.

    A model that is made without its weights, and filled later, would be another: some change their input for them.
    """
    chosen.get_state_dict = lambda *args, **kwargs: state
    try:
        yield
    finally:
        del chosen.get_state_dict


def _behead(name: str, network: nn.Module) -> None:
    """Take the last linear layer away, which separates classes."""
    found = [key for key, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError(f"{name} does not end in a linear layer, before which its features would be")
    parent, _, child = found[-1].rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())


def _filter(name: str) -> str:
    if name not in INTERPOLATIONS:
        raise ValueError(f"it scales images by the filter {name}, of which there are {', '.join(INTERPOLATIONS)} here")
    return name


# ---- timm ----


def timm(
    which: str,
    *,
    weights: _Weights = None,
    sha256: str | None = None,
    pretrained: bool = True,
    download: bool = False,
) -> ExternalFeatures:
    """What the classifier of a model of the package timm is given: its forward pass with ``num_classes=0``.

    Args:
        which: such as resnet50.a1_in1k or vit_large_patch14_dinov2.lvd142m. Size, crop, filter and norm are those of
            ``timm.data.resolve_data_config``.
        weights: a file of weights, .safetensors or what torch.load reads without running code. None: those of timm, in
            the cache of the hub.
        sha256, pretrained, download: as of :func:`torchvision`.

    Raises:
        ValueError: timm is not installed; an unknown model; weights that are not here, or of another model; a
            preprocessing that cannot be had.
        FileNotFoundError: no such file.
    """
    _check_origin(pretrained, download, weights, sha256)
    package: Any = imported("timm", "timm", f"timm:{which}")
    settings: Any = imported("timm.data", "timm", f"timm:{which}")
    lookup(dict.fromkeys(package.list_models()), which.partition(".")[0], "model of timm")
    if sha256 is not None and weights is None:
        raise ValueError("sha256 is of the file weights, got sha256 alone")
    options: dict[str, Any] = {}
    if weights is not None:
        options["pretrained_cfg_overlay"] = {"state_dict": weights_files.read(weights, sha256)}
    name = f"timm:{which}"
    with _drawn(not pretrained), _explaining(name, "cannot be loaded"), _offline(not download):
        if pretrained and weights is None:
            _check_cache(package, which, download)
        # With all of its classes, because timm then refuses weights of another model; without, it draws what they lack.
        network = package.create_model(which, pretrained=pretrained, **options)
        network.reset_classifier(0)
        config = settings.resolve_data_config({}, model=network)
    # Which of the weights of this name, where it did not say.
    tag = network.pretrained_cfg.get("tag")
    if tag and "." not in name:
        name = f"{name}.{tag}"
    with _explaining(name, "has no preprocessing that is known"):
        preprocessing = _of_timm(config)
    return ExternalFeatures(_called(name, pretrained, weights), network, preprocessing)


def _check_cache(package: Any, which: str, download: bool) -> None:
    """ValueError for weights that timm would fetch, unless it may: before it draws those of the whole network."""
    config = package.get_pretrained_cfg(which)
    # What timm itself says of unknown weights is said when it makes the model.
    if config is None:
        return
    if not config.hf_hub_id:
        raise ValueError("its weights are not on the hub: name a file of them by weights=...")
    hub: Any = imported("huggingface_hub", "huggingface_hub", f"timm:{which}")
    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    repository, _, revision = config.hf_hub_id.partition("@")
    found = [hub.try_to_load_from_cache(repository, file, revision=revision or None) for file in files]
    if not download and not any(isinstance(path, str) for path in found):
        raise ValueError(
            f"its weights, {config.hf_hub_id} of the hub, are not in the cache: name a file by weights=..., or allow "
            "the download by download=True"
        )


def _of_timm(config: Mapping[str, Any]) -> Preprocessing:
    channels, height, width = config["input_size"]
    mode = config["crop_mode"]
    if channels != 3 or mode not in ("center", "squash") or (mode == "center" and height != width):
        raise ValueError(f"images of {channels} channels, {height} x {width} pixels, cropped by {mode!r}")
    larger = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    return Preprocessing(
        resize=larger[0] if mode == "center" else (larger[0], larger[1]),
        crop=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=_filter(config["interpolation"]),
        round_up=True,
    )


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """The hub's client reads its environment once, at import, and asks the network first."""
    found = importlib.util.find_spec("huggingface_hub")
    if found is None or not wanted:
        yield
        return
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# ---- transformers ----

# Where transformers keeps images and text apart, the class of the half that sees.
_VISION = {"clip": "CLIPVisionModelWithProjection", "clip_vision_model": "CLIPVisionModelWithProjection"}


def huggingface(
    which: str,
    *,
    sha256: str | None = None,
    pretrained: bool = True,
    download: bool = False,
) -> ExternalFeatures:
    """What a vision model of the package transformers makes of an image.

    That is, the first that it has: the embedding of the image, of a model of images and texts; its pooled output,
    unless a layer of its own stands before that, which many files have no trained weights of; its first token, of a
    model with a token for the class; the mean over all tokens.

    Args:
        which: a name on the hub, such as facebook/dinov2-base, or a folder with config.json,
            preprocessor_config.json and model.safetensors, as ``save_pretrained`` writes them.
        sha256: what the SHA-256 of that file begins with, 8 digits or more.
        pretrained: False for random weights, always the same; the folder then needs no weights.
        download: let the package fetch what is not in its cache.

    Raises:
        ValueError: transformers is not installed; files that are not here, damaged, or of a model that sees no images;
            a preprocessing that cannot be had.
    """
    name = f"hf:{which}"
    _check_origin(pretrained, download, None, sha256)
    model, processor = transformer(which, name, sha256=sha256, pretrained=pretrained, download=download)
    with _explaining(name, "has no preprocessing that is known"):
        preprocessing = _of_transformers(processor)
    return ExternalFeatures(_called(name, pretrained, None), _Vision(model), preprocessing)


def transformer(
    which: str, name: str, *, sha256: str | None, pretrained: bool, download: bool, kind: tuple[str, ...] = ()
) -> tuple[nn.Module, Any]:
    """A model of transformers and its image processor; None for the latter if ``kind``, the types allowed, is given."""
    package: Any = imported("transformers", "transformers", name)
    options = {"local_files_only": not download, "trust_remote_code": False}
    offline = "" if download or Path(which).is_dir() else ", a model of the hub, without download=True"
    with _explaining(name, f"cannot be loaded from {which}{offline}"), _quiet(package), _drawn(not pretrained):
        config = package.AutoConfig.from_pretrained(which, **options)
        if kind and config.model_type not in kind:
            raise ValueError(f"it is a model of the type {config.model_type}, not {' or '.join(kind)}")
        if config.model_type == "clip":
            # The embedding's length stands in both halves, and counts in the whole.
            length, config = config.projection_dim, config.vision_config
            config.projection_dim = length
        builder = getattr(package, _VISION.get(config.model_type, "AutoModel"))
        if sha256 is not None:
            weights_files.check_digest(_file(package, which, options), sha256)
        if pretrained:
            model, report = builder.from_pretrained(which, config=config, output_loading_info=True, **options)
            # What a file lacks, the package draws at random. A dense pooler is not used here.
            missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
            if missing:
                raise ValueError(f"its weights lack {missing[0]}")
        else:
            model = builder(config) if builder is not package.AutoModel else builder.from_config(config)
        processor = None if kind else _processor(package, which, options)
    return model, processor


def _file(package: Any, which: str, options: Mapping[str, Any]) -> Path:
    """The one file of weights of a model."""
    if Path(which).is_dir():
        return Path(which, "model.safetensors")
    return Path(package.utils.cached_file(which, "model.safetensors", local_files_only=options["local_files_only"]))


def _processor(package: Any, which: str, options: Mapping[str, Any]) -> Any:
    """Its parameters alone are wanted; the form that needs no torchvision has the same."""
    new = int(package.__version__.partition(".")[0]) >= 5
    form = {"backend": "pil"} if new else {"use_fast": False}
    return package.AutoImageProcessor.from_pretrained(which, **form, **options)


@contextmanager
def _quiet(package: Any) -> Iterator[None]:
    """Without bars and remarks on weights of the parts that are left out."""
    logging = package.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


# What an image processor may do without changing an image that is read as RGB, or what is read below.
_KNOWN_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_reduce_labels")


def _of_transformers(processor: Any) -> Preprocessing:
    values: dict[str, Any] = processor.to_dict()
    others = [
        key
        for key in values
        if (key.startswith("do_") or key == "rescale_offset") and values[key] is True and key not in _KNOWN_STEPS
    ]
    if others:
        raise ValueError(f"{values.get('image_processor_type', type(processor).__name__)} has the step {others[0]}")
    resize: int | tuple[int, int] | None = None
    crop = _sides(values["crop_size"]) if values.get("do_center_crop") else None
    if values.get("do_resize"):
        size = values["size"]
        side = size.get("shortest_edge")
        if side is None:
            resize = _sides(size)
        elif "crop_pct" not in values:
            resize = side
        # ConvNeXt's: smaller images are cut out of larger ones.
        elif side < 384:
            resize, crop = int(side / values["crop_pct"]), (side, side)
        else:
            resize = (side, side)
    normalize = values.get("do_normalize")
    return Preprocessing(
        resize=resize,
        crop=crop,
        mean=tuple(values["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=tuple(values["image_std"]) if normalize else (1.0, 1.0, 1.0),
        scale=values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0,
        interpolation=_filter({0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(values["resample"], "?")),
    )


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if set(size) != {"height", "width"}:
        raise ValueError(f"a size of {', '.join(map(str, size)) or 'nothing'}")
    return size["height"], size["width"]


class _Vision(nn.Module):
    """A model of transformers as a network from pixels to features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        pooler = getattr(model, "pooler", None)
        # A dense layer on the token of the class, for another task: of most files it was never trained.
        self._trusts_pooler = not isinstance(getattr(pooler, "dense", None), nn.Linear)
        self._has_class = any(key.endswith(("cls_token", "class_embedding")) for key, _ in model.named_parameters())

    def forward(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        if hasattr(model, "get_image_features"):
            output = model.get_image_features(pixel_values=pixels)
            return output if isinstance(output, Tensor) else output.pooler_output
        output = model(pixel_values=pixels)
        embedding = getattr(output, "image_embeds", None)
        if embedding is None and self._trusts_pooler:
            embedding = getattr(output, "pooler_output", None)
        if embedding is not None:
            features: Tensor = embedding.flatten(1)
            return features
        tokens: Tensor = output.last_hidden_state
        if tokens.ndim == 4:
            return tokens.mean((2, 3))
        return tokens[:, 0] if self._has_class else tokens.mean(1)


# ---- a file of the user's ----


class UserFeatures(ImageFeatures):
    """What a function of the user's makes of images ``[n, 3, h, w]``, uint8."""

    dim = None

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function
        self._freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[n, d]``, float32; ValueError if the function makes something else."""
        levels = (255 * as_rgb(as_unit_images(images))).round().to(torch.uint8)
        features = self.function(levels)
        _width(self.name, features, len(levels))
        return features.float()


def module(which: str) -> UserFeatures:
    """Features of a function in a file. **The file is run.**

    Args:
        which: ``path/to/file.py:factory``. ``factory()`` returns a module or another callable that takes images
            ``[n, 3, h, w]``, uint8, on the device of the images, to features ``[n, d]`` of floating point. A module is
            put into eval mode and moved to the device; of whatever else the images need, it takes care itself.

    Raises:
        ValueError: not of this form, or the file or the factory fails; no function comes from it.
        FileNotFoundError: no such file.
    """
    name = f"module:{which}"
    file, _, factory = which.rpartition(":")
    path = Path(file)
    if not file or not factory.isidentifier():
        raise ValueError(f"{name} must be module:path/to/file.py:factory")
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file of features", file)
    specification = importlib.util.spec_from_file_location(f"lipgan_user_{path.stem}", path)
    if specification is None or specification.loader is None:
        raise ValueError(f"{name} must name a file of Python code, .py")
    loaded: ModuleType = importlib.util.module_from_spec(specification)
    # Where dataclasses and pickle look the code up.
    sys.modules[specification.name] = loaded
    with _explaining(name, "fails"):
        specification.loader.exec_module(loaded)
    make = lookup(
        {key: value for key, value in vars(loaded).items() if callable(value)}, factory, f"function of {file}"
    )
    with _explaining(name, "fails"):
        function = make()
    if not callable(function):
        raise ValueError(f"{name} must return a module or a function, got {type(function).__name__}")
    return UserFeatures(name, function)


#: What stands before the colon in the name of features.
PREFIXES: Mapping[str, Callable[..., ImageFeatures]] = MappingProxyType(
    {"torchvision": torchvision, "timm": timm, "hf": huggingface, "module": module}
)
