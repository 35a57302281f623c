"""``lipgan eval``, from a checkpoint to the printed numbers."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lipgan import _choices, data
from lipgan.__main__ import main
from lipgan.commands import evaluate
from lipgan.metrics import cmmd, features, frechet_distance, inception_score, kernel_distance, prdc, protocols
from lipgan.systems.cyclegan import transformed
from lipgan.training import load_generator
from lipgan.training.pictures import evaluation_page
from lipgan.training.sampling import draw

N = 40


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run. Read only."""
    out = tmp_path_factory.mktemp("run")
    assert main(["train", "--size", "8", "--batch-size", "32", "--steps", "20", "--out", str(out)]) == 0
    return out


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[str], str]:
    """What a run that succeeds prints: the lines of the metrics, and stderr."""
    capsys.readouterr()
    status = main(["eval", *map(str, arguments)])
    output = capsys.readouterr()
    assert status == 0, output.err
    return output.out.splitlines(), output.err


def generated(run: Path, seed: int = 0) -> Tensor:
    return draw(load_generator(run / "checkpoint.pt"), N, seed)


def levels(samples: Tensor) -> Tensor:
    """As an image file holds them."""
    return ((samples + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def test_the_distance_is_that_of_the_samples_as_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "eval.json"
    evaluated(capsys, run, "-n", N, "--seed", 3, "--metrics", "fid", "--json", result)
    folder = tmp_path / "samples"
    folder.mkdir()
    for i, image in enumerate(levels(generated(run, seed=3))):
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    assert main(["fid", "digits", str(folder), "--features", "digits", "--size", "8"]) == 0
    expected = float(capsys.readouterr().out.removeprefix("FID:  "))
    assert json.loads(result.read_text())["metrics"]["fid"]["values"]["fid"] == pytest.approx(expected, rel=1e-5)


def test_metrics_and_protocol(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "eval.json"
    lines, error = evaluated(
        capsys, run / "checkpoint.pt", "-n", N, "--metrics", "prdc", "kid", "is", "prdc", "--json", path
    )
    result = json.loads(path.read_text())
    assert result["protocol"] == {
        "name": "lipgan",
        "checkpoint": str(run / "checkpoint.pt"),
        "recipe": "sngan",
        "step": 20,
        "generated": N,
        "seed": 0,
        "data": "digits",
        "real": 1797,
        "shape": [1, 8, 8],
        "features": "digits",
    }
    assert error == (
        f"lipgan: {N} samples of {run / 'checkpoint.pt'} (sngan, step 20, seed 0) against 1797 of digits, "
        "8 x 8 pixels of 8 bits in RGB, features digits, protocol lipgan\n"
    )

    extractor = features.get("digits")
    fake = levels(generated(run))
    x, y = extractor(levels(data.load("digits", 8).samples)), extractor(fake)
    kid = kernel_distance(x, y, 100, N, generator=torch.Generator().manual_seed(0))
    score = inception_score(extractor.probabilities(fake), 10)  # type: ignore[attr-defined]
    values = {name: row["values"] for name, row in result["metrics"].items()}
    assert list(values) == ["prdc", "kid", "is"]
    assert list(values["kid"].values()) == pytest.approx(kid, rel=1e-4)
    assert list(values["is"].values()) == pytest.approx(score, rel=1e-4)
    # A different batch size moves a feature by a rounding, and so a point across a border now and then.
    assert values["prdc"] == pytest.approx(prdc(x, y), abs=0.03)

    assert len(lines) == 3
    for line, (name, row) in zip(lines, result["metrics"].items(), strict=True):
        assert line.startswith(f"{name}:")
        assert line.endswith(f"({row['definition']}, features digits, protocol lipgan)")
    assert f"precision {values['prdc']['precision']:.4f}, recall {values['prdc']['recall']:.4f}" in lines[0]
    assert f"{values['kid']['kid']:.6g} +- {values['kid']['std']:.2g}" in lines[1]
    assert "100 subsets of 40" in lines[1]


def test_the_seed_decides(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (evaluated(capsys, run, "-n", N, "--seed", seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first[0] != other[0]


def test_by_default_all_metrics_that_the_features_allow(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = evaluated(capsys, run, "-n", N)
    assert [line.split(":")[0] for line in lines] == ["fid", "is", "kid", "prdc"]
    lines, error = evaluated(capsys, run, "-n", N, "--features", "pixels", "--data", "digits")
    assert [line.split(":")[0] for line in lines] == ["fid", "kid", "prdc"]
    assert error.endswith("features pixels, protocol lipgan\n")
    assert tuple(evaluate.METRICS) == _choices.METRICS


def test_the_cmmd_is_of_clip_or_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "eval.json"
    lines, _ = evaluated(capsys, run, "-n", N, "--metrics", "cmmd", "--json", path)
    extractor = features.get("digits")
    x, y = extractor(levels(data.load("digits", 8).samples)), extractor(levels(generated(run)))
    row = json.loads(path.read_text())["metrics"]["cmmd"]
    assert row["values"]["cmmd"] == pytest.approx(cmmd(x, y), rel=1e-4)
    assert row["values"]["cmmd"] > 1
    assert lines[0].endswith("(all pairs, Gaussian kernel of sigma 10, times 1000, features digits, protocol lipgan)")

    class Clip(features.Pixels):
        name = "clip"

    monkeypatch.setattr(features, "EXTRACTORS", {**features.EXTRACTORS, "clip": Clip})
    lines, _ = evaluated(capsys, run, "-n", N, "--features", "clip")
    assert [line.split(":")[0] for line in lines] == ["fid", "kid", "prdc", "cmmd"]


def test_translations_are_compared_with_the_domain_that_they_are_to_look_like(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the data, which are what is translated."""
    arguments = ["--recipe", "cyclegan", "--data", "ring", "--batch-size", "4", "--steps", "1"]
    assert main(["train", *arguments, "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(evaluate, "draw", lambda generator, n, seed: transformed(data.load("ring").samples[:n]))
    path = tmp_path / "eval.json"
    _, error = evaluated(capsys, tmp_path, "-n", 10000, "--metrics", "fid", "--json", path)
    result = json.loads(path.read_text())
    assert result["metrics"]["fid"]["values"]["fid"] == pytest.approx(0, abs=1e-6)
    assert result["protocol"]["data"] == "ring, transformed"
    assert "against 10000 of ring, transformed, features coordinates" in error
    # What is named is compared with as it is: the other domain lies a step of 1 away.
    evaluated(capsys, tmp_path, "-n", 10000, "--metrics", "fid", "--json", path, "--data", "ring")
    assert json.loads(path.read_text())["metrics"]["fid"]["values"]["fid"] == pytest.approx(1, abs=0.05)


def test_the_plot_shows_the_nearest_real_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []

    def page(*arguments: Any) -> bytes:
        shown.extend(arguments)
        return evaluation_page(*arguments)

    monkeypatch.setattr(evaluate, "evaluation_page", page)
    path = tmp_path / "eval.png"
    lines, _ = evaluated(capsys, run, "-n", N, "--features", "pixels", "--metrics", "fid", "prdc", "--plot", path)
    samples, neighbours, rows, title = shown
    real = data.load("digits", 8).samples
    assert torch.equal(samples, generated(run))
    pixels = [levels(x).flatten(1).double() for x in (samples, real, neighbours)]
    nearest = torch.cdist(pixels[0], pixels[1], compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert torch.allclose((pixels[0] - pixels[2]).norm(dim=1), nearest)
    assert "1797 of digits" in title
    for line, (_, value, definition) in zip(lines, rows, strict=True):
        assert value in line
        assert definition in line
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width / picture.height == pytest.approx(297 / 210, rel=0.01)


def test_a_page_holds_its_samples_and_table() -> None:
    def page(samples: Tensor, rows: list[tuple[str, str, str]]) -> np.ndarray[Any, Any]:
        with Image.open(io.BytesIO(evaluation_page(samples, torch.ones(5, 3, 4, 6), rows, "title " * 60))) as picture:
            return np.asarray(picture.convert("RGB")).astype(int)

    rows = [("a", "1", "b")]
    red = torch.tensor([1.0, -1, -1])[:, None, None].expand(5, 3, 4, 6)
    picture = page(red, rows)
    left, right = np.array_split(picture, 2, axis=1)
    assert (left == [255, 0, 0]).all(2).mean() > 0.15
    assert not (right == [255, 0, 0]).all(2).any()
    assert (page(red, rows * 4) != picture).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "5", "--metrics", "prdc"], "the metric prdc needs at least 6 samples, got -n 5"),
        (["-n", "9"], "the metric is needs at least 10 samples, got -n 9"),
        (["--metrics", "is", "--features", "pixels"], "which the features pixels do not give"),
        (["--data", "digit"], "digits"),
        (["--features", "pixel"], "pixels"),
        (["--protocol", "cleen"], "unknown protocol 'cleen'; did you mean clean"),
        (["--protocol", "clean", "--metrics", "fid", "is"], "protocol 'clean' has no Inception Score"),
        (["--protocol", "torchmetrics", "-n", "999"], "the metric kid needs at least 1000 samples, got -n 999"),
        (["--features", "pixels", "--download"], "--download is for features whose weights are not part of lipgan"),
        (["--plot", "eval.jpg"], "eval.jpg must end in .png"),
        (["--json", "absent/eval.json"], "absent is not a folder"),
        (["--plot", "absent/eval.png"], "absent is not a folder"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, run, *arguments)
    assert not list(tmp_path.iterdir())


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["eval", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("lipgan: error: ")
    assert output.err.count("\n") == 1, output.err
    return output.err


def test_checkpoints_that_cannot_be_used(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.pt: No such file" in refusal(capsys, tmp_path / "absent.pt")
    assert "checkpoint.pt: No such file" in refusal(capsys, tmp_path)
    whole = (run / "checkpoint.pt").read_bytes()
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in refusal(capsys, damaged)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    unknown = tmp_path / "unknown.pt"
    torch.save(state | {"data": "faces"}, unknown)
    assert "was trained on 'faces', which cannot be loaded (" in refusal(capsys, unknown)
    lines, _ = evaluated(capsys, unknown, "-n", N, "--data", "digits", "--metrics", "fid")
    assert lines == evaluated(capsys, run, "-n", N, "--metrics", "fid")[0]
    torch.save({key: value for key, value in state.items() if key != "step"}, damaged)
    assert "does not say how its generator was trained: 'step'" in refusal(capsys, damaged)
    for weight in state["ema"].values():
        if weight.is_floating_point():
            weight.fill_(torch.nan)
    broken = tmp_path / "broken.pt"
    torch.save(state, broken)
    assert "samples that are not finite" in refusal(capsys, broken)


def test_an_unknown_metric_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["eval", str(run), "--metrics", "fdi"])
    assert exit.value.code == 2
    assert "fdi" in capsys.readouterr().err


def test_a_protocol_decides_the_definitions(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "eval.json"
    n = 1000
    lines, _ = evaluated(capsys, run, "-n", n, "--protocol", "torch-fidelity", "--json", path)
    result = json.loads(path.read_text())
    assert result["protocol"]["name"] == "torch-fidelity"
    assert list(result["metrics"]) == ["fid", "is", "kid", "prdc"]
    protocol = protocols.get("torch-fidelity")
    fake = levels(draw(load_generator(run / "checkpoint.pt"), n, 0))
    probabilities = features.get("digits").probabilities(fake)  # type: ignore[attr-defined]
    score = inception_score(probabilities, protocol="torch-fidelity")
    assert list(result["metrics"]["is"]["values"].values()) == pytest.approx(score, rel=1e-4)
    assert list(result["metrics"]["prdc"]["values"]) == ["precision", "recall", "f1"]
    for line, name in zip(lines, result["metrics"], strict=True):
        assert line.endswith(f"({protocol.definition(name, n)}, features digits, protocol torch-fidelity)")
    lines, _ = evaluated(capsys, run, "-n", N, "--protocol", "pytorch-fid")
    assert [line.split(":")[0] for line in lines] == ["fid"]


def test_a_folder_of_images_in_place_of_the_data_set(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, image in enumerate(levels(data.load("digits", 8).samples)):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:04}.png")
    options = (run, "-n", N, "--features", "digits", "--metrics", "fid", "prdc")
    expected, _ = evaluated(capsys, *options)
    lines, error = evaluated(capsys, *options, "--data", tmp_path, "--workers", 2)
    assert lines == expected
    assert f"against 1797 of {tmp_path}, 8 x 8 pixels" in error
    (tmp_path / "0500.png").write_bytes(b"no image")
    assert "0500.png cannot be used" in refusal(capsys, *options, "--data", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty holds no image" in refusal(capsys, *options, "--data", tmp_path / "empty")


def test_points_are_compared_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--recipe", "gan", "--data", "two-gaussians", "--steps", "2", "--out", str(out)]) == 0
    lines, error = evaluated(capsys, out, "-n", N, "--metrics", "fid", "prdc")
    real = data.load("two-gaussians").samples
    fake = draw(load_generator(out / "checkpoint.pt"), N, 0)
    statistics = [(x.double().mean(0), x.double().T.cov()) for x in (real, fake)]
    expected = float(frechet_distance(*statistics[0], *statistics[1]))
    assert float(lines[0].split()[1]) == pytest.approx(expected, rel=1e-5)
    assert error.endswith("of two-gaussians, features coordinates, protocol lipgan\n")
    assert "--plot are for images" in refusal(capsys, out, "--plot", tmp_path / "page.png")
    assert "--features and" in refusal(capsys, out, "--features", "pixels")
