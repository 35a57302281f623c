"""lipgan.compat.torch_fidelity, by its definition and, where it is installed, beside torch-fidelity."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import peer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from lipgan.bench.peers import present_or_stand_in
from lipgan.compat.torch_fidelity import calculate_metrics
from lipgan.metrics import frechet_distance_from_features, inception_score, kernel_distance, prdc


def levels(seed: int, brightness: int, n: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, brightness, (n, 6, 5, 3), dtype=np.uint8)


REAL, FAKE = levels(0, 256), levels(1, 180)


class Images(Dataset[Tensor]):
    def __init__(self, array: np.ndarray) -> None:
        self.images = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(fake, real). Read only."""
    made = []
    for name, array in (("fake", FAKE), ("real", REAL)):
        folder = tmp_path_factory.mktemp(name)
        for i, image in enumerate(array):
            Image.fromarray(image).save(folder / f"{i:02}.png")
        made.append(str(folder))
    return made[0], made[1]


MATRIX = torch.randn(90, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 300


def project(images: Tensor) -> Tensor:
    return images.flatten(1).double() @ MATRIX


OPTIONS: dict[str, Any] = {
    **{"isc": True, "fid": True, "kid": True, "prc": True, "kid_subsets": 5, "kid_subset_size": 20, "batch_size": 16},
    **{"cuda": False, "cache": False, "verbose": False},
}
NAMES = [
    *("inception_score_mean", "inception_score_std", "frechet_inception_distance", "kernel_inception_distance_mean"),
    *("kernel_inception_distance_std", "precision", "recall", "f_score"),
]


def test_values_by_definition(folders: tuple[str, str]) -> None:
    x, y = project(Images(REAL).images), project(Images(FAKE).images)
    found = calculate_metrics(
        input1=folders[0], input2=folders[1], feature_extractor=project, samples_shuffle=False, **OPTIONS
    )
    assert list(found) == NAMES
    assert all(type(value) is float for value in found.values())
    score = inception_score(y.softmax(1), 10)
    assert (found["inception_score_mean"], found["inception_score_std"]) == pytest.approx(score)
    assert found["frechet_inception_distance"] == pytest.approx(float(frechet_distance_from_features(x, y)))
    shares = prdc(x, y, 3, "le")
    assert found["precision"] == shares["precision"]
    assert found["recall"] == shares["recall"]
    assert 0 < found["f_score"] < 1
    whole = calculate_metrics(
        input1=folders[0], input2=folders[1], feature_extractor=project, **{**OPTIONS, "kid_subset_size": 40}
    )
    assert whole["kernel_inception_distance_mean"] == pytest.approx(kernel_distance(x, y, subset_size=None)[0])
    assert whole["kernel_inception_distance_std"] == pytest.approx(0, abs=1e-9)
    assert whole["inception_score_mean"] != found["inception_score_mean"]  # shuffled


def test_data_sets_and_folders_are_the_same(folders: tuple[str, str]) -> None:
    expected = calculate_metrics(input1=folders[0], input2=folders[1], feature_extractor=project, **OPTIONS)
    found = calculate_metrics(input1=Images(FAKE), input2=Path(folders[1]), feature_extractor=project, **OPTIONS)
    assert found == pytest.approx(expected, rel=1e-9)


def test_layers_by_name_and_by_order(folders: tuple[str, str]) -> None:
    layers = {"feature_layer_fid": "a", "feature_layer_kid": "b"}
    options = {**OPTIONS, "isc": False, "prc": False, "input1": folders[0], "input2": folders[1], **layers}
    by_name = calculate_metrics(feature_extractor=lambda x: {"b": 2 * project(x), "a": project(x)}, **options)
    by_order = calculate_metrics(feature_extractor=lambda x: (project(x), 2 * project(x)), **options)
    alone = calculate_metrics(feature_extractor=project, **options)
    assert by_name == by_order
    assert by_name["frechet_inception_distance"] == alone["frechet_inception_distance"]
    assert by_name["kernel_inception_distance_mean"] != alone["kernel_inception_distance_mean"]


def test_which_files_are_found(folders: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "fake")
    (tmp_path / "fake" / "below").mkdir()
    for i in range(3):
        Image.fromarray(REAL[i]).save(tmp_path / "fake" / "below" / f"{i}.png")
        Image.fromarray(REAL[i]).save(tmp_path / "fake" / f"{i}.bmp")
    seen: list[int] = []

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return project(images)

    for others, number in (({}, 40), ({"samples_find_deep": True}, 43), ({"samples_find_ext": "bmp, png"}, 43)):
        seen.clear()
        options = {**OPTIONS, "fid": False, "kid": False, "prc": False, **others}
        calculate_metrics(input1=str(tmp_path / "fake"), feature_extractor=counted, **options)
        assert sum(seen) == number


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"isc": False, "fid": False, "kid": False, "prc": False}, ValueError, "isc, fid, kid or prc must be True"),
        ({"input1": None}, ValueError, "input1 must be a folder or a data set, got None"),
        ({"input2": None}, ValueError, "input2 must be a folder or a data set, got None"),
        ({"input1": "cifar10-train"}, FileNotFoundError, "cifar10-train: no such folder"),
        ({"input1": __file__}, ValueError, "got the file"),
        ({"input1": nn.Linear(1, 1)}, TypeError, "inputs must be folders or data sets of images, got Linear"),
        ({"feature_extractor": None}, ValueError, "its default in torch-fidelity is VGG"),
        ({"feature_extractor": "nothing"}, ValueError, "a name that was registered with torch_fidelity, got 'nothing'"),
        ({"ppl": True}, ValueError, "ppl must be False"),
        ({"samples_resize_and_crop": 8}, ValueError, "samples_resize_and_crop must be 0"),
        ({"kid_kernel": "laplace"}, ValueError, "kid_kernel must be one of poly, rbf, got 'laplace'"),
        ({"kid_subset_size": 41}, ValueError, "input1 must have at least 41 images for kid_subset_size=41, got 40"),
        ({"nothing": 1}, TypeError, "has no argument 'nothing'"),
        ({"samples_find_ext": "jpg"}, ValueError, r"holds no image \(.jpg\), without folders below it"),
        ({"input1": [1]}, TypeError, "got list"),
        ({"feature_extractor_weights_path": "w.pth"}, ValueError, "must be None beside another extractor, got 'w.pth'"),
    ],
)
def test_what_is_refused(
    folders: tuple[str, str], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"input1": folders[0], "input2": folders[1], "feature_extractor": project, **OPTIONS, **options}
    with pytest.raises(error, match=message):
        calculate_metrics(**given)


def test_images_of_another_dtype(folders: tuple[str, str]) -> None:
    data = Images(FAKE)
    data.images = data.images.float()
    with pytest.raises(TypeError, match=r"must give images \[3, h, w\] of uint8, got batches torch.float32"):
        calculate_metrics(input1=data, input2=folders[1], feature_extractor=project, **OPTIONS)


# ---- beside torch-fidelity ----


@pytest.fixture
def theirs() -> Iterator[Any]:
    with present_or_stand_in():
        yield peer("torch_fidelity")


def registered(module: Any) -> str:
    name = "projection"
    base = peer("torch_fidelity.feature_extractor_base").FeatureExtractorBase

    class Projection(base):
        def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "scores", "features"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "scores" if metric == "isc" else "features"

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            found = {"scores": 3 * project(images).float(), "features": project(images).float()}
            return tuple(found[layer] for layer in self.features_list)

    registry = peer("torch_fidelity.registry").FEATURE_EXTRACTORS_REGISTRY
    registry[name] = Projection
    return name


@pytest.mark.parametrize(
    "kernel", [{}, {"kid_kernel": "rbf", "kid_kernel_rbf_sigma": 3.0}, {"kid_kernel_poly_degree": 2}]
)
@pytest.mark.parametrize("shuffled", [True, False])
def test_numbers_of_torch_fidelity(theirs: Any, kernel: dict[str, Any], shuffled: bool) -> None:
    options = {**OPTIONS, "feature_extractor": registered(theirs), "samples_shuffle": shuffled, **kernel}
    data = {"input1": Images(FAKE), "input2": Images(REAL)}
    expected = theirs.calculate_metrics(**data, **options)
    found = calculate_metrics(**data, **options)
    assert set(found) == set(expected)
    assert found == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-3, abs=1e-5)


def test_settings_of_torch_fidelity(theirs: Any) -> None:
    import inspect

    defaults = peer("torch_fidelity.defaults").DEFAULTS
    ours = inspect.signature(calculate_metrics).parameters
    for name, value in defaults.items():
        if name in ours:
            assert ours[name].default == value, name
        else:
            # Taken and of no effect, or refused unless it is the default.
            options = {**OPTIONS, "fid": False, "kid": False, "prc": False, name: value}
            calculate_metrics(input1=Images(FAKE), feature_extractor=project, **options)


def test_inception_of_torch_fidelity(theirs: Any, weights: str) -> None:
    options = {**OPTIONS, "prc": False, "kid_subset_size": 2, "isc_splits": 1, "feature_layer_kid": "64"}
    options["feature_layer_fid"] = "192"  # of 2048 their eigenvalues take seconds
    options |= {"input1": Images(FAKE[:2]), "input2": Images(REAL[:2]), "feature_extractor_weights_path": weights}
    expected, found = theirs.calculate_metrics(**options), calculate_metrics(**options)
    assert found == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-2)
