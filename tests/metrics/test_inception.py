"""The features "inception": the network of pytorch-fid, and the file of its weights."""

import hashlib
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import lipgan
from lipgan.metrics.features import FeatureExtractor, InceptionFeatures, get, inception
from lipgan.metrics.features.inception import DIMS, SHA256, URL, InceptionNetwork, cached_weights

ROOT = Path(__file__).parents[2]

# What pytorch-fid 0.3.0 with torchvision 0.29.2 computes from `pictures` with `random_weights`: root mean square, the
# first three features of the first picture and the last three of the second. Logits are those of its network.
PYTORCH_FID = {
    64: (0.51252949, [1.202639, 0.149336, 0.023434], [0.489530, 0.478479, 0.252924]),
    192: (0.80986047, [0.719925, 0.007321, 0.132300], [0.735707, 0.0, 0.925674]),
    768: (1.14011470, [1.605379, 0.0, 0.526268], [1.777319, 0.016315, 0.0]),
    2048: (1.16322861, [0.0, 0.376054, 0.623721], [3.102405, 0.0, 0.008794]),
    1008: (5.18483432, [0.482430, 6.963401, -2.370902], [4.735960, -6.805379, 0.138511]),
}
# The same of one larger picture, at 64, which bilinear interpolation with antialiasing would change.
PYTORCH_FID_LARGE = (0.73486929, [1.506226, 0.359681, 0.052529])
# Names and numbers in its state_dict.
ENTRIES, PARAMETERS = 566, 23850960


def frozen_random(seed: int) -> np.random.RandomState:
    """NumPy promises that the stream of this generator, unlike the newer ones, never changes."""
    return np.random.RandomState(seed)


def random_weights() -> dict[str, Tensor]:
    """A state_dict without the counters of batch norms, as old files are."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in InceptionNetwork().state_dict().items()}
    random = frozen_random(0)
    state = {}
    for name in sorted(name for name, shape in shapes.items() if len(shape)):
        x = torch.from_numpy(random.standard_normal(tuple(shapes[name]))).float()
        if name.endswith("bn.weight"):
            x = 1 + 0.1 * x
        elif name.endswith("running_var"):
            x = (0.2 * x).exp()
        elif x.ndim == 4:
            x = x * (2 / x[0].numel()) ** 0.5
        else:
            x = 0.1 * x
        state[name] = x
    return state


def pictures() -> Tensor:
    return torch.from_numpy(frozen_random(1).randint(0, 256, (2, 3, 40, 56)).astype("uint8"))


def write(folder: Path, content: Any) -> Path:
    """Write a file whose name ends in its checksum."""
    path = folder / "weights.pth"
    torch.save(content, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(folder / f"weights-{digest[:8]}.pth")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("inception"), random_weights())


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of whoever runs the tests may hold the real file, and nothing here may reach for the network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a download that nobody asked for")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


# ---- the network ----


@pytest.mark.slow
@pytest.mark.parametrize("dim", DIMS)
def test_features_are_those_of_pytorch_fid(weights: Path, dim: int) -> None:
    extractor = get("inception", weights=weights, dim=dim)
    assert isinstance(extractor, FeatureExtractor)
    assert extractor.dim == dim
    assert extractor.name == ("inception" if dim == 2048 else f"inception-{dim}")
    features = extractor(pictures())
    assert features.shape == (2, dim)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    rms, first, last = PYTORCH_FID[dim]
    tolerance = 1e-5 * features.abs().max().item()
    assert abs(features.double().square().mean().sqrt().item() - rms) < tolerance
    torch.testing.assert_close(features[0, :3], torch.tensor(first), rtol=0, atol=tolerance)
    torch.testing.assert_close(features[1, -3:], torch.tensor(last), rtol=0, atol=tolerance)


def test_large_images_are_reduced_as_by_pytorch_fid(weights: Path) -> None:
    large = torch.from_numpy(frozen_random(2).randint(0, 256, (1, 3, 420, 700)).astype("uint8"))
    features = InceptionFeatures(weights, dim=64)(large)
    rms, first = PYTORCH_FID_LARGE
    tolerance = 1e-5 * features.abs().max().item()
    assert abs(features.double().square().mean().sqrt().item() - rms) < tolerance
    torch.testing.assert_close(features[0, :3], torch.tensor(first), rtol=0, atol=tolerance)


def test_the_network_has_the_size_of_the_published_one() -> None:
    with torch.device("meta"):
        network = InceptionNetwork()
    assert len(network.state_dict()) == ENTRIES
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS


def test_images_in_all_forms(weights: Path) -> None:
    extractor = InceptionFeatures(weights, dim=64)
    x = pictures()
    expected = extractor(x)
    torch.testing.assert_close(extractor(x.float() / 255), expected)
    assert torch.equal(extractor.train()(x), expected), "train() changed the features"
    grey = x[:, :1]
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
    assert extractor(x[:0]).shape == (0, 64)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        extractor(2 * x.float() / 255 - 1)


@pytest.mark.slow
def test_probabilities_leave_the_bias_out(weights: Path) -> None:
    extractor = InceptionFeatures(weights)
    x = pictures()[:1]
    features, fc = extractor(x), extractor.network.fc
    torch.testing.assert_close(extractor.probabilities(x), (features @ fc.weight.T).softmax(1))


# ---- the file ----


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    for path, wanted in [(None, cached_weights()), (tmp_path / "none.pth", tmp_path / "none.pth")]:
        with pytest.raises(FileNotFoundError) as caught:
            get("inception", weights=path)
        assert caught.value.filename == str(wanted)
        message = caught.value.strerror
        assert URL in message
        assert str(cached_weights()) in message
        assert "download=True" in message


def test_the_cache_is_used(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "_FILE", weights.name)
    cached_weights().parent.mkdir(parents=True)
    cached_weights().symlink_to(weights)
    assert torch.equal(InceptionFeatures(dim=64)(pictures()), InceptionFeatures(weights, dim=64)(pictures()))
    InceptionFeatures(download=True)  # it is there, so `refuse` is not called


def test_a_download_goes_into_the_cache_with_its_checksum(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(url: str, to: str, hash_prefix: str) -> None:
        calls.append((url, to, hash_prefix))
        Path(to).symlink_to(weights)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(ValueError, match=f"must have 95628359 bytes, got {weights.stat().st_size}"):
        InceptionFeatures(download=True)
    assert calls == [(URL, str(cached_weights()), SHA256)]


def test_a_download_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        raise RuntimeError('invalid hash value (expected "6726825d", got "0")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(ValueError, match="is not the published file: invalid hash value"):
        InceptionFeatures(download=True)
    assert not cached_weights().exists()


def test_a_damaged_file_is_refused(weights: Path, tmp_path: Path) -> None:
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / weights.name
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged or another file: its SHA-256 must begin with [0-9a-f]{8}, got"):
        InceptionFeatures(damaged)


def test_a_name_without_checksum_means_the_published_file(weights: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "inception.pth"
    renamed.symlink_to(weights)
    with pytest.raises(ValueError, match="must have 95628359 bytes"):
        InceptionFeatures(renamed)


def test_the_published_file_is_known_by_its_size_and_all_of_its_digest(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(SHA256) == 64
    # The only digits that its publisher tells.
    assert SHA256.startswith("6726825d")
    assert URL.endswith("-6726825d.pth")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    almost = digest[:63] + ("0" if digest[63] != "0" else "1")
    assert digest[:8] in weights.name
    monkeypatch.setattr(inception, "SHA256", almost)
    with pytest.raises(ValueError, match="must have 95628359 bytes, got"):
        InceptionFeatures(weights)
    monkeypatch.setattr(inception, "SIZE", weights.stat().st_size)
    with pytest.raises(ValueError, match=f"its SHA-256 must be {almost}, got {digest}"):
        InceptionFeatures(weights)
    monkeypatch.setattr(inception, "SHA256", digest)
    assert InceptionFeatures(weights).dim == 2048


class Opened:
    """Pickled, it opens a file: what no set of weights may do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_nothing_in_the_file_is_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = write(tmp_path, {"fc.bias": Opened(trace)})
    with pytest.raises(ValueError, match="holds no weights that can be read without running code"):
        InceptionFeatures(path)
    assert not trace.exists()
    with pytest.raises(ValueError, match="holds no weights"):
        InceptionFeatures(write_bytes(tmp_path, b"no archive"))
    with pytest.raises(ValueError, match="holds no weights"):
        InceptionFeatures(write_bytes(tmp_path, pickle.dumps({}, protocol=2)[:-1]))


def write_bytes(folder: Path, content: bytes) -> Path:
    path = folder / f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "must hold a dict of tensors, got list"),
        ({"fc.bias": 1}, "must hold a dict of tensors"),
        ({}, r"Conv2d_1a_3x3\.conv\.weight is missing or differs"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InceptionFeatures(write(tmp_path, content))


def test_other_networks_are_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    bias = state["fc.bias"]
    # Those of torchvision's own network, and one layer more.
    for changed, name in [
        ({"fc.bias": bias[:1000]}, r"fc\.bias"),
        ({"AuxLogits.fc.bias": bias}, r"AuxLogits\.fc\.bias"),
    ]:
        with pytest.raises(ValueError, match=rf"weights of the FID's Inception-v3: {name} is missing or differs"):
            InceptionFeatures(write(tmp_path, state | changed))


@pytest.mark.parametrize("dim", [0, 1000, 2047, "2048", None])
def test_other_lengths_are_refused(weights: Path, dim: Any) -> None:
    with pytest.raises(ValueError, match=r"dim must be one of 64, 192, 768, 2048, 1008, got"):
        InceptionFeatures(weights, dim=dim)


def test_a_file_and_a_download_exclude_each_other(weights: Path) -> None:
    with pytest.raises(ValueError, match="download must be False where weights names a file, got True"):
        InceptionFeatures(weights, download=True)


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (299, 299), (400, 310)])
def test_tensorflow_preprocessing(size: tuple[int, int], weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = InceptionFeatures(weights, preprocessing="tensorflow")
    assert extractor.name == "inception-tensorflow"
    seen = []
    monkeypatch.setattr(extractor.network, "forward", lambda x, dim: seen.append(x) or torch.zeros(len(x), dim))
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor(image)
    # As NumPy interpolates, of which the last place is constant too.
    expected = image[0].double().numpy()
    for axis in (1, 2):
        old = expected.shape[axis]
        places = np.arange(299) * (old / 299)
        expected = np.apply_along_axis(lambda line, x=places: np.interp(x, np.arange(len(line)), line), axis, expected)
    np.testing.assert_allclose(seen[0][0].numpy(), (expected - 128) / 128, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (32, 32), (299, 299), (300, 298), (700, 310)])
def test_clean_preprocessing(size: tuple[int, int], weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = InceptionFeatures(weights, preprocessing="clean")
    assert extractor.name == "inception-clean"
    seen = []
    monkeypatch.setattr(extractor.network, "forward", lambda x, dim: seen.append(x) or torch.zeros(len(x), dim))
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[1] = 255 * (images[1] > 127)  # edges, beyond which a bicubic filter overshoots
    extractor(images)
    for image, x in zip(images, seen[0], strict=True):
        for channel, ours in zip(image, x, strict=True):
            picture = Image.fromarray(channel.numpy().astype(np.float32))
            scaled = np.asarray(picture.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
            # Pillow and PyTorch keep float32 between the passes along either side, and levels reach 255.
            np.testing.assert_allclose(128 * ours.numpy() + 128, scaled, rtol=0, atol=1e-4)


@pytest.mark.cpu
@pytest.mark.parametrize("preprocessing", inception.PREPROCESSINGS)
def test_an_image_is_prepared_alone_as_among_others(
    preprocessing: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = InceptionFeatures(weights, preprocessing=preprocessing)
    seen = []
    monkeypatch.setattr(extractor.network, "forward", lambda x, dim: seen.append(x) or torch.zeros(len(x), dim))
    images = torch.randint(0, 256, (3, 3, 310, 330), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # Of floating point, they are prepared together. As files are read, the channels of a pixel lie together.
    for given in (images.float() / 255, images, images.contiguous(memory_format=torch.channels_last)):
        extractor(given)
        assert seen[-1].is_contiguous()
        assert seen[-1].shape == (3, 3, 299, 299)
        torch.testing.assert_close(seen[-1], seen[0], rtol=0, atol=4e-6)


def test_other_preprocessings_are_refused(weights: Path) -> None:
    names = "pytorch, tensorflow, torchmetrics, clean"
    with pytest.raises(ValueError, match=f"preprocessing must be one of {names}, got 'cleaner'"):
        InceptionFeatures(weights, preprocessing="cleaner")


@pytest.mark.slow
def test_the_script_for_the_published_weights_tells_numbers_apart(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On random weights and few small images: the FID is that of the images, and a number that differs ends in 1."""
    spec = importlib.util.spec_from_file_location("check_inception", ROOT / "scripts" / "check_inception.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "SIDE", 32)
    extract = InceptionFeatures(weights, preprocessing="tensorflow")
    found = script.examples(extract, count=2, splits=1, subset=2)
    # The first images of the example, as torch-fidelity's network and torchmetrics leave the random numbers.
    script.start()
    x, y = (extract.means(script.draw(low, high, 2), 64).double() for low, high in ((0, 200), (100, 255)))
    expected = lipgan.metrics.frechet_distance_from_features(x, y)
    assert found["FID of 64 features"] == pytest.approx(float(expected), rel=1e-6)

    monkeypatch.setattr(script, "examples", lambda extract: found)
    monkeypatch.setattr("sys.argv", ["check_inception.py", str(weights)])
    assert script.main() == 1
    assert "DIFFERENT" in capsys.readouterr().out
    monkeypatch.setattr(script, "PUBLISHED", {name: (value, 1e-6) for name, value in found.items()})
    assert script.main() == 0
