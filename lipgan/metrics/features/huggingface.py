"""Features of vision models of the package transformers, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lipgan._packages import imported
from lipgan.metrics.features import weights as weights_files
from lipgan.metrics.features.external import ExternalFeatures, called, check_filter, check_origin, drawn, explaining
from lipgan.metrics.features.preprocessing import Preprocessing

__all__ = ["huggingface", "transformer"]


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
    check_origin(pretrained, download, None, sha256)
    model, processor = transformer(which, name, sha256=sha256, pretrained=pretrained, download=download)
    with explaining(name, "has no preprocessing that is known"):
        preprocessing = _of_transformers(processor)
    return ExternalFeatures(called(name, pretrained, None), _Vision(model), preprocessing)


def transformer(
    which: str, name: str, *, sha256: str | None, pretrained: bool, download: bool, kind: tuple[str, ...] = ()
) -> tuple[nn.Module, Any]:
    """A model of transformers and its image processor; None for the latter if ``kind``, the types allowed, is given."""
    package: Any = imported("transformers", "transformers", name)
    options = {"local_files_only": not download, "trust_remote_code": False}
    offline = "" if download or Path(which).is_dir() else ", a model of the hub, without download=True"
    with explaining(name, f"cannot be loaded from {which}{offline}"), _quiet(package), drawn(not pretrained):
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
    filters = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    return Preprocessing(
        resize=resize,
        crop=crop,
        mean=tuple(values["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=tuple(values["image_std"]) if normalize else (1.0, 1.0, 1.0),
        scale=values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0,
        interpolation=check_filter(filters.get(values["resample"], "?")),
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
