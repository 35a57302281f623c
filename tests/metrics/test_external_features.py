"""Features of other packages, and of files, by name.

torchvision and timm do not install beside the torch that these tests run on. Small packages stand in for them, which
have exactly the names that the modules of `lipgan.metrics.features` use, and know nothing of the real ones: what is
tested is the route, the reading of metadata, and the errors. transformers is the real one where it is installed.
Preprocessing is tested against Pillow, which all three packages use.
"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from devices import DEVICE
from peers import peer
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from lipgan.__main__ import main
from lipgan.metrics import features as features_module
from lipgan.metrics.features import FeatureExtractor, Preprocessing
from lipgan.metrics.features.vision import _at_side

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def get(name: str, **options: Any) -> Any:
    return features_module.get(name, **options).to(DEVICE)


def images(n: int = 3, height: int = 41, width: int = 29, seed: int = 0) -> torch.Tensor:
    levels = torch.randint(
        0, 256, (n, 3, height, width), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )
    return levels.to(torch.uint8).to(DEVICE)


def levels_of(x: torch.Tensor) -> np.ndarray:
    mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
    return 255 * (x.numpy(force=True) * std + mean)


# ---- preprocessing ----


@pytest.mark.parametrize(
    ("filter", "name"),
    [
        (Image.Resampling.BICUBIC, "bicubic"),
        (Image.Resampling.BILINEAR, "bilinear"),
        (Image.Resampling.NEAREST, "nearest"),
    ],
)
@pytest.mark.parametrize("size", [(41, 29), (20, 14), (60, 60), (90, 7)])
def test_scaling_is_pillows(filter: Image.Resampling, name: str, size: tuple[int, int]) -> None:
    x = images()
    ours = levels_of(Preprocessing(size, None, MEAN, STD, interpolation=name)(x))
    for image, scaled in zip(x.permute(0, 2, 3, 1).numpy(force=True), ours, strict=True):
        truth = np.asarray(Image.fromarray(image).resize(size[::-1], filter)).transpose(2, 0, 1)
        difference = np.abs(scaled - truth)
        # Pillow's weights are rounded: sums that are half way between levels, as of the linear filter, go either way.
        assert difference.max() < 1.01
        assert (difference > 0.01).mean() < (0.06 if name == "bilinear" else 0.002)


@pytest.mark.parametrize("shape", [(41, 29), (29, 41), (40, 40), (20, 51)])
@pytest.mark.parametrize("round_up", [False, True])
def test_the_shorter_side_and_the_middle(shape: tuple[int, int], round_up: bool) -> None:
    x = images(1, *shape)
    ours = levels_of(Preprocessing(20, (13, 16), MEAN, STD, round_up=round_up)(x))[0]
    height, width = shape
    target = (20, int(20 * width / height)) if height <= width else (int(20 * height / width), 20)
    whole = np.asarray(Image.fromarray(x[0].permute(1, 2, 0).numpy(force=True)).resize(target[::-1], 3))
    margins = target[0] - 13, target[1] - 16
    top, left = (round(margin / 2) if round_up else margin // 2 for margin in margins)
    truth = whole[top : top + 13, left : left + 16].transpose(2, 0, 1)
    assert np.abs(ours - truth).max() < 1.01
    assert np.abs(ours - truth).mean() < 0.05


def test_a_square_is_cut_out_first_and_grey_is_spread() -> None:
    x = images(2, 30, 47)
    square = Preprocessing((16, 16), None, MEAN, STD, square=True)
    assert torch.equal(square(x), square(x[:, :, :, 8:38]))
    grey = x[:, :1]
    assert torch.equal(square(grey), square(grey.expand(-1, 3, -1, -1)))
    assert square(x[:0]).shape == (0, 3, 16, 16)


def test_fractions_are_the_levels_and_have_derivatives() -> None:
    preprocessing = Preprocessing((16, 16), (12, 12), MEAN, STD)
    x = images()
    unit = (x.float() / 255).requires_grad_()
    y = preprocessing(unit)
    assert torch.equal(y, preprocessing(x))
    (y * torch.tensor(STD, device=y.device)[:, None, None]).sum().backward()
    assert unit.grad is not None
    # The weights of each result sum to 1.
    assert float(unit.grad.sum()) == pytest.approx(3 * 3 * 12 * 12, rel=0.01)


def test_preprocessings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="interpolation must be one of nearest, bilinear, bicubic, got 'lanczos'"):
        Preprocessing(8, None, MEAN, STD, interpolation="lanczos")
    with pytest.raises(ValueError, match=r"crop must be no larger than resize, 8 x 8, got \(9, 8\)"):
        Preprocessing(8, (9, 8), MEAN, STD)
    with pytest.raises(ValueError, match="too small to cut"):
        Preprocessing(None, (99, 99), MEAN, STD)(images())


# ---- stand-ins ----


class Classifier(nn.Module):
    """Means of the channels, a layer of 5 features, and one of classes."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.head: nn.Module = nn.Linear(5, 7) if head else nn.Identity()
        self.doubled = False
        self.pretrained_cfg = {"tag": "a_tag"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x.mean((2, 3)) * (2 if self.doubled else 1))
        return self.head(x)

    def reset_classifier(self, classes: int) -> None:
        assert classes == 0
        self.head = nn.Identity()


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchvision.models with one model, ``net``, whose trained form is not the one that is made without weights."""

    class Weights(Enum):
        V1 = "net-0f.pth"
        V2 = "https://example.org/net-12345678.pth"
        DEFAULT = V2

        @property
        def url(self) -> str:
            return self.value

        def transforms(self) -> Any:
            size = {"resize_size": [24], "crop_size": [16 if self is Weights.V2 else 20]}
            return SimpleNamespace(
                **size, mean=list(MEAN), std=list(STD), interpolation=SimpleNamespace(value="bilinear")
            )

        def get_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("the network was asked")

    def get_model(name: str, weights: Weights | None) -> nn.Module:
        model = Classifier()
        if weights is not None:
            model.doubled = True
            model.load_state_dict(weights.get_state_dict(progress=True, check_hash=True))
        return model

    module: Any = ModuleType("torchvision.models")
    module.list_models = lambda module: ["net", "net_b"]
    module.get_model_weights = lambda name: Weights
    module.get_model = get_model
    parent: Any = ModuleType("torchvision")
    parent.models = module
    monkeypatch.setitem(sys.modules, "torchvision", parent)
    monkeypatch.setitem(sys.modules, "torchvision.models", module)
    return module


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm with one model, ``net``."""

    def create_model(name: str, pretrained: bool, pretrained_cfg_overlay: Any = None) -> nn.Module:
        model = Classifier()
        if pretrained:
            if pretrained_cfg_overlay is None:
                raise RuntimeError("No connection\nand more of it")
            model.load_state_dict(pretrained_cfg_overlay["state_dict"])
        return model

    module: Any = ModuleType("timm")
    module.list_models = lambda: ["net"]
    module.create_model = create_model
    module.get_pretrained_cfg = lambda name: SimpleNamespace(hf_hub_id="timm/net.a_tag", hf_hub_filename=None)
    module.config = {"crop_mode": "center", "crop_pct": 0.9, "input_size": (3, 16, 16), "interpolation": "bicubic"}
    data: Any = ModuleType("timm.data")
    data.resolve_data_config = lambda args, model: {"mean": MEAN, "std": STD, **module.config}
    hub: Any = ModuleType("huggingface_hub")
    hub.try_to_load_from_cache = lambda repository, file, revision: module.cache.get((repository, file, revision))
    hub.constants = ModuleType("huggingface_hub.constants")
    hub.constants.HF_HUB_OFFLINE = False
    module.cache, module.constants = {}, hub.constants
    for name, stand_in in (("timm", module), ("timm.data", data), ("huggingface_hub", hub)):
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", hub.constants)
    hub.__spec__ = SimpleNamespace(name="huggingface_hub")
    return module


def state(seed: int = 3) -> dict[str, torch.Tensor]:
    """Weights of `Classifier`, on the CPU, as files have them."""
    random = torch.Generator("cpu").manual_seed(seed)
    shapes = {key: tensor.shape for key, tensor in Classifier().state_dict().items()}
    return {key: torch.randn(shape, generator=random, device="cpu") for key, shape in shapes.items()}


def by_hand(extractor: Any, x: torch.Tensor, weights: dict[str, torch.Tensor], factor: int = 1) -> torch.Tensor:
    means = extractor.preprocessing(x).mean((2, 3)).cpu() * factor
    return means @ weights["body.weight"].T + weights["body.bias"]


# ---- torchvision, timm ----


def test_torchvision_with_weights_from_a_file(torchvision: Any, tmp_path: Path) -> None:
    weights, x = state(), images()
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        extractor = get("torchvision:net", weights=tmp_path / file)
        assert isinstance(extractor, FeatureExtractor)
        assert extractor.name == f"torchvision:net.V2, weights {file}"
        assert (extractor.dim, extractor.any_size) == (5, True)
        assert extractor.preprocessing == Preprocessing(
            24, (16, 16), MEAN, STD, interpolation="bilinear", round_up=True
        )
        # As the model that is made with weights, which doubles its input.
        torch.testing.assert_close(extractor(x).cpu(), by_hand(extractor, x, weights, 2))
        assert extractor(x[:0]).shape == (0, 5)
        assert not extractor.train().network.training
        assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert get("torchvision:net.V1", weights=tmp_path / "w.pth").preprocessing.crop == (20, 20)
    # What was put in the way of torchvision's own reading is gone.
    with pytest.raises(AssertionError, match="the network was asked"):
        torchvision.get_model_weights("net").V2.get_state_dict()


def test_torchvisions_own_file_lies_in_the_cache(
    torchvision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"need the weights https://example\.org/net-12345678\.pth: ") as error:
        get("torchvision:net")
    assert error.value.filename == str(tmp_path / "hub" / "checkpoints" / "net-12345678.pth")
    calls = []

    def fetch(url: str, path: str, hash_prefix: str) -> None:
        calls.append((url, path, hash_prefix))
        torch.save(state(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    # The stand-in's name does not tell its checksum.
    with pytest.raises(
        ValueError, match=r"net-12345678\.pth is damaged or another file: its SHA-256 must begin with 1234"
    ):
        get("torchvision:net", download=True)
    assert calls == [("https://example.org/net-12345678.pth", error.value.filename, "12345678")]
    digest = hashlib.sha256(Path(error.value.filename).read_bytes()).hexdigest()
    assert get("torchvision:net", sha256=digest[:12]).name == "torchvision:net.V2"
    assert len(calls) == 1


def test_timm_with_weights_from_a_file(timm: Any, tmp_path: Path) -> None:
    weights, x = state(), images()
    save_file(weights, tmp_path / "w.safetensors")
    extractor = get("timm:net", weights=tmp_path / "w.safetensors")
    assert extractor.name == "timm:net.a_tag, weights w.safetensors"
    assert extractor.preprocessing == Preprocessing(17, (16, 16), MEAN, STD, round_up=True)
    torch.testing.assert_close(extractor(x).cpu(), by_hand(extractor, x, weights))
    timm.config.update(crop_mode="squash", crop_pct=1.0, input_size=(3, 16, 24))
    assert get("timm:net.a_tag", pretrained=False).preprocessing.resize == (16, 24)
    for change, message in (
        ({"crop_mode": "border"}, "cropped by 'border'"),
        ({"input_size": (1, 16, 16)}, "images of 1 channels"),
        ({"interpolation": "lanczos"}, "it scales images by the filter lanczos"),
    ):
        before = dict(timm.config)
        timm.config.update(change)
        with pytest.raises(ValueError, match=rf"^timm:net\.a_tag has no preprocessing that is known: .*{message}"):
            get("timm:net", pretrained=False)
        timm.config.update(before)


def test_timm_asks_the_hub_only_if_it_may(timm: Any) -> None:
    seen: list[bool] = []
    create = timm.create_model
    timm.create_model = lambda *args, **options: seen.append(timm.constants.HF_HUB_OFFLINE) or create(*args, **options)
    with pytest.raises(
        ValueError, match=r"^timm:net cannot be loaded: its weights, timm/net\.a_tag of the hub, are not"
    ):
        get("timm:net")
    assert seen == []
    timm.cache["timm/net.a_tag", "model.safetensors", None] = "/cache/model.safetensors"
    with pytest.raises(ValueError, match=r"^timm:net cannot be loaded: No connection$"):
        get("timm:net")
    with pytest.raises(ValueError, match="No connection"):
        get("timm:net", download=True)
    assert seen == [True, False]
    assert timm.constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("name", ["torchvision:net", "timm:net"])
def test_random_weights_are_always_the_same(name: str, torchvision: Any, timm: Any) -> None:
    before = torch.get_rng_state()
    extractor = get(name, pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(get(name, pretrained=False)(images()), extractor(images()))
    assert extractor.name.endswith(", random weights")


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["torchvision:net", "timm:net"])
def test_weights_of_something_else_are_refused(name: str, torchvision: Any, timm: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "it was run"),)

    path = tmp_path / "w.pth"
    for content, message in (
        (state() | {"head.weight": torch.zeros(2, 2)}, r"Error\(s\) in loading state_dict"),
        ({"other": torch.zeros(1)}, r"Error\(s\) in loading state_dict"),
        ([1, 2], r"w\.pth must hold a dict of tensors, got list"),
        (Evil(), r"w\.pth holds no weights that can be read without running code from it"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as error:
            get(name, weights=path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "it was run").exists()
    torch.save(state(), path)
    with pytest.raises(ValueError, match=r"its SHA-256 must be (f){64}, got "):
        get(name, weights=path, sha256="f" * 64)
    with pytest.raises(ValueError, match="sha256 must be 8 to 64 digits from 0 to 9 and a to f, got 'xyz'"):
        get(name, weights=path, sha256="xyz")
    with pytest.raises(FileNotFoundError, match="no such file of weights"):
        get(name, weights=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="download must be False where weights names a file"):
        get(name, weights=path, download=True)
    with pytest.raises(ValueError, match="pretrained=False draws the weights"):
        get(name, weights=path, pretrained=False)


def test_names_that_are_not_there(torchvision: Any, timm: Any) -> None:
    for name, message in (
        ("torchvision:nett", "unknown model of torchvision 'nett'; did you mean net"),
        ("torchvision:net.V3", "unknown weights of net 'V3'; did you mean V2 or V1"),
        ("timm:ned", "unknown model of timm 'ned'; did you mean net"),
        ("timm:", "timm: lacks the name of a model"),
        ("tim:net", "unknown feature extractor 'tim:net'"),
    ):
        with pytest.raises(ValueError, match=message):
            get(name)
    with pytest.raises(TypeError, match="seeds"):
        get("timm:net", seeds=1)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("torchvision:net", "torchvision"),
        ("timm:net", "timm"),
        ("hf:net", "transformers"),
        ("dinov2", "transformers"),
        ("clip", "transformers"),
    ],
)
def test_without_the_package_there_is_a_sentence(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchvision", "torchvision.models", "timm", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"^{name} needs the package {package}: pip install {package} \("):
        get(name)


# ---- transformers ----


def saved(folder: Path, kind: str, processor: dict[str, Any]) -> tuple[str, Any]:
    """A small model of transformers with random weights, as its package saves it."""
    transformers = peer("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    if kind == "CLIP":
        vision, text = sizes | {"image_size": 28, "patch_size": 14}, sizes | {"vocab_size": 9, "bos_token_id": 0}
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    elif kind == "ResNet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    else:
        config = getattr(transformers, f"{kind}Config")(**sizes, image_size=42, patch_size=14)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder), model


PROCESSORS = {
    "ViT": {"feature_extractor_type": "ViTFeatureExtractor", "size": 42, "image_mean": MEAN, "image_std": STD},
    "Dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 48},
        "crop_size": {"height": 42, "width": 42},
        "resample": 3,
        "image_mean": MEAN,
        "image_std": STD,
    },
    "CLIP": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28, "resample": 3},
    "ResNet": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 42}, "crop_pct": 0.875},
}


@pytest.mark.cpu
@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_transformers_by_its_own_processor(kind: str, tmp_path: Path) -> None:
    folder, model = saved(tmp_path, kind, PROCESSORS[kind])
    transformers = peer("transformers")
    extractor = get(f"hf:{folder}")
    x = images(3, 91, 61)
    form = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **form)
    pictures = [Image.fromarray(image) for image in x.permute(0, 2, 3, 1).numpy()]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    std = torch.tensor(extractor.preprocessing.std)[:, None, None]
    difference = 255 * std * (extractor.preprocessing(x) - pixels).abs()
    assert difference.max() < 1.01
    # Pillow 13 may take the passes in the other order, which moves some roundings.
    assert difference.mean() < 0.25
    with torch.no_grad():
        if kind == "CLIP":
            output = model.get_image_features(pixel_values=pixels)
            expected = output if isinstance(output, torch.Tensor) else output.pooler_output
        elif kind == "ViT":  # whose pooler has a layer of its own
            expected = model(pixel_values=pixels).last_hidden_state[:, 0]
        else:
            expected = model(pixel_values=pixels).pooler_output.flatten(1)
        torch.testing.assert_close(extractor.network(pixels), expected)
    assert extractor.dim == expected.shape[1]
    assert get(f"hf:{folder}", pretrained=False).name == f"hf:{folder}, random weights"


def test_recommended_features(tmp_path: Path) -> None:
    dino, _ = saved(tmp_path / "dino", "Dinov2", PROCESSORS["Dinov2"])
    clip, _ = saved(tmp_path / "clip", "CLIP", PROCESSORS["CLIP"])
    x = images(3, 91, 61)
    extractor = get("dinov2", weights=dino)
    assert (extractor.name, extractor.dim) == ("dinov2-16-1", 16)
    assert extractor.preprocessing.resize == (224, 224)
    assert extractor(x).shape == (3, 16)
    # The positions are those of 224 pixels, so transformers interpolates nothing any more.
    assert extractor.network.model.embeddings.position_embeddings.shape == (1, 257, 16)
    extractor = get("clip", weights=clip)
    assert (extractor.name, extractor.dim) == ("clip-12-28", 12)
    torch.testing.assert_close(extractor(x).norm(dim=1), torch.ones(3, device=extractor(x).device))
    torch.testing.assert_close(extractor(x), extractor(x[:, :, 15:76]))
    for name, folder, message in (
        ("dinov2", clip, "it is a model of the type clip, not dinov2"),
        ("clip", dino, "it is a model of the type dinov2, not clip or clip_vision_model"),
    ):
        with pytest.raises(ValueError, match=f"^{name} cannot be loaded from .*: {message}"):
            get(name, weights=folder)


def test_files_of_transformers_that_are_refused(tmp_path: Path) -> None:
    peer("transformers")
    with pytest.raises(
        ValueError, match=r"^hf:nobody/nothing cannot be loaded from nobody/nothing, a model of the hub, "
    ):
        get("hf:nobody/nothing")
    folder, model = saved(tmp_path, "ViT", PROCESSORS["ViT"])
    file = tmp_path / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert get(f"hf:{folder}", sha256=digest).dim == 16
    with pytest.raises(ValueError, match="its SHA-256 must begin with 00000000, got"):
        get(f"hf:{folder}", sha256="0" * 8)
    # What a file lacks would be drawn at random.
    save_file({key: tensor for key, tensor in model.state_dict().items() if "layernorm" not in key}, file)
    with pytest.raises(ValueError, match=r"its weights lack (layernorm|encoder)"):
        get(f"hf:{folder}")
    file.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"^hf:.* cannot be loaded from "):
        get(f"hf:{folder}")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"^hf:.* cannot be loaded from "):
        get(f"hf:{folder}", pretrained=False)


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75."""
    a, x = -0.75, np.abs(distance)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@pytest.mark.cpu
def test_positions_lie_where_the_published_network_has_them() -> None:
    count, side, patch = 37, 224, 14
    grid = np.random.default_rng(0).standard_normal((count, count, 2))
    rows = torch.from_numpy(grid).float().reshape(-1, 2)
    old = torch.cat([torch.tensor([[-5.0, -6.0]]), rows])[None]
    model = SimpleNamespace(
        config=SimpleNamespace(patch_size=patch), embeddings=SimpleNamespace(position_embeddings=nn.Parameter(old))
    )
    _at_side(model, side)
    new = model.embeddings.position_embeddings[0].detach()
    assert new[0].tolist() == [-5, -6]
    # The scale is (16 + 0.1) / 37, and what lies outside is the border.
    places = (np.arange(16) + 0.5) * count / 16.1 - 0.5
    weights = np.zeros((16, count))
    for i, place in enumerate(places):
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(tap, 0), count - 1)] += cubic(np.array(place - tap))
    expected = np.einsum("ia,jb,abc->ijc", weights, weights, grid).reshape(-1, 2)
    # Places near 37 are rounded in float32. Without the 0.1 they would be off by up to 0.2.
    np.testing.assert_allclose(new[1:].numpy(force=True), expected, atol=3e-5)


# ---- files of the user's ----


USER = """
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, images):
        assert images.dtype == torch.uint8 and not self.training
        return images.double().mean((2, 3))

def module():
    return Net()

def function():
    return lambda images: images.float().amax((2, 3))

def wrong():
    return lambda images: images

def nothing():
    pass

def fails():
    raise KeyError("what is that")

number = 3
"""


def test_a_file_of_the_users(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER)
    x = images()
    extractor = get(f"module:{file}:module")
    assert isinstance(extractor, FeatureExtractor)
    assert (extractor.name, extractor.dim, extractor.any_size) == (f"module:{file}:module", None, False)
    torch.testing.assert_close(extractor(x), x.float().mean((2, 3)))
    # Fractions come as the levels that they are in a file.
    torch.testing.assert_close(extractor(x.float() / 255), extractor(x))
    torch.testing.assert_close(
        get(f"module:{file}:function")(x[:, :1]), x[:, :1].expand(-1, 3, -1, -1).float().amax((2, 3))
    )
    with pytest.raises(ValueError, match=r"wrong must take 3 images to features \[3, d\] of floating point, got torch"):
        get(f"module:{file}:wrong")(x)
    for name, message in (
        (f"module:{file}:nothing", "must return a module or a function, got NoneType"),
        (f"module:{file}:fails", "fails fails: 'what is that'"),
        (f"module:{file}:number", "unknown function of .*mine.py 'number'"),
        (f"module:{file}", r"must be module:path/to/file\.py:factory"),
        ("module:mine", r"must be module:path/to/file\.py:factory"),
    ):
        with pytest.raises(ValueError, match=message):
            get(name)
    with pytest.raises(FileNotFoundError, match="no such file of features"):
        get(f"module:{tmp_path / 'absent.py'}:module")
    file.write_text("1 / 0")
    with pytest.raises(ValueError, match="module fails: division by zero"):
        get(f"module:{file}:module")


# ---- from the command line ----


def test_on_the_command_line(timm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for k in range(2):
        folder = tmp_path / str(k)
        folder.mkdir()
        for i, image in enumerate(images(9, seed=k)):
            # Of two sizes, because the features bring them to one.
            picture = Image.fromarray(image.permute(1, 2, 0).numpy(force=True)).resize((30 + i % 2, 40))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            (folder / f"{i}.png").write_bytes(buffer.getvalue())
        folders.append(str(folder))
    weights = tmp_path / "w.safetensors"
    save_file(state(), weights)
    device = ["--device", str(DEVICE)]
    assert main(["fid", *folders, "--features", "timm:net", "--weights", str(weights), *device]) == 0
    output = capsys.readouterr()
    assert float(output.out.removeprefix("FID: ")) > 0
    assert "A: 9 samples, images" in output.err
    assert "of several sizes in RGB, features timm:net.a_tag, weights w.safetensors, " in output.err
    for arguments, message in (
        (
            ["--features", "timm:net", "--weights", str(weights), "--sha256", "0" * 9],
            "SHA-256 must begin with 000000000",
        ),
        (["--features", "timm:net", "--weights", "absent.pth"], "absent.pth: no such file of weights; on the command"),
        (["--features", "digits", "--weights", str(weights)], "--weights is for features whose weights are not part"),
        (["--features", "module:a.py:b", "--download"], "--download is for features whose weights are not part"),
        (["--sha256", "0" * 9], "--sha256 is not for inception, whose checksum is known"),
        (["--features", str(weights), "--download"], "--download is for features by name, got the file"),
    ):
        assert main(["fid", *folders, *arguments, *device]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
