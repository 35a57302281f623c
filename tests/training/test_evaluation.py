"""The quick evaluations of `lipgan train --evaluate-every`."""

import json
from pathlib import Path

import pytest
import torch

from lipgan import data
from lipgan.__main__ import main
from lipgan.data.chords import legal, log_likelihood
from lipgan.metrics import features, frechet_distance, mode_coverage, sliced_wasserstein_distance
from lipgan.training import Trainer
from lipgan.training.evaluation import Evaluation

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize(("name", "extractor"), [("digits", "digits"), ("patches", "random")])
def test_images_by_the_distance_of_their_features(name: str, extractor: str) -> None:
    """The same numbers as by hand, from all features at once."""
    dataset = data.load(name, 8)
    trainer = Trainer.from_recipe("sngan", dataset)
    metrics = Evaluation(dataset)(trainer)
    extract = features.get(extractor)
    statistics = []
    for samples in (dataset.samples, trainer.sample(2000)):
        x = torch.cat([extract((part + 1) / 2) for part in samples.clamp(-1, 1).split(500)]).double()
        statistics.append((x.mean(0), x.T.cov()))
    expected = float(frechet_distance(*statistics[0], *statistics[1]))
    assert metrics.pop("fid") == pytest.approx(expected, rel=1e-4)
    assert expected > 1
    assert set(metrics) == ({"confident", "classes"} if name == "digits" else set())


def test_digits_are_classified() -> None:
    """The share with a probability above 0.9, and the digits among those, of samples that are known."""
    dataset = data.load("digits", 16)
    trainer = Trainer.from_recipe("sngan", dataset)
    threes = dataset.samples[dataset.labels == 3][:100]
    sevens = dataset.samples[dataset.labels == 7][:50]
    # Not a digit: the classifier is in doubt.
    blank = torch.full((50, *dataset.shape), -0.5)
    samples = torch.cat([threes, sevens, blank])
    trainer.sample = lambda n, **_: samples  # type: ignore[method-assign]
    metrics = Evaluation(dataset)(trainer)
    extract = features.DigitFeatures()
    probabilities = extract.probabilities((samples + 1) / 2)
    assert float(probabilities[150:].max()) < 0.9
    assert float(probabilities[:150].amax(1).min()) > 0.9
    assert metrics["confident"] == 0.75
    assert metrics["classes"] == 2


def test_points_by_distance_and_modes() -> None:
    dataset = data.load("ring")
    trainer = Trainer.from_recipe("gan", dataset)
    trainer.sample = lambda n, **_: dataset.samples[:n] * torch.tensor([1.0, 0.0])  # type: ignore[method-assign]
    metrics = Evaluation(dataset)(trainer)
    samples = dataset.samples[:2000] * torch.tensor([1.0, 0.0])
    random = torch.Generator().manual_seed(trainer.seed)
    distance = sliced_wasserstein_distance(samples, dataset.samples[:2000], generator=random)
    assert dataset.modes is not None
    assert dataset.mode_std is not None
    coverage = mode_coverage(samples, dataset.modes, dataset.mode_std)
    # Flattened onto the axis, the ring keeps its modes at 0 and at 180 degrees.
    assert metrics == {
        "sliced_wasserstein": pytest.approx(distance),
        "modes": 2.0,
        "high_quality": coverage.high_quality,
    }
    assert 0.2 < metrics["high_quality"] < 0.3


def test_vectors_without_modes_have_a_distance_alone() -> None:
    dataset = data.load("swiss-roll")
    assert list(Evaluation(dataset)(Trainer.from_recipe("gan", dataset))) == ["sliced_wasserstein"]


def test_the_metrics_join_the_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--recipe", "gan", "--data", "ring", "--steps", "6", "--log-every", "2", "--out"]
    assert main([*command, str(tmp_path / "run"), "--evaluate-every", "4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["modes" in row for row in rows] == [False, True, False]
    last = rows[1]
    assert (
        f"2000 samples of step 4: sliced Wasserstein distance: {last['sliced_wasserstein']:.4g}, modes found: "
        f"{last['modes']:g}, near a mode: {last['high_quality']:.4g}\n"
    ) in capsys.readouterr().out
    assert main([*command, str(tmp_path / "none")]) == 0
    assert "samples of step" not in capsys.readouterr().out
    assert main([*command, str(tmp_path / "other"), "--evaluate-every", "3"]) == 2
    assert "evaluate_every must be a multiple of log_every, 2, got 3" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_phrases_are_judged_by_their_grammar() -> None:
    dataset = data.load("chords")
    trainer = Trainer.from_recipe("seqgan", dataset)
    judged = Evaluation(dataset)
    untrained = judged(trainer)
    phrases = trainer.sample(2000)
    assert untrained["legal"] == pytest.approx(float(legal(phrases).double().mean()))
    assert untrained["grammar_nll"] == pytest.approx(-float(log_likelihood(phrases).mean()))
    assert untrained["phrases"] > 0.9
    trainer.sample = lambda n: dataset.samples[:4].repeat(n // 4, 1, 1)  # type: ignore[method-assign]
    of_data = judged(trainer)
    assert of_data["legal"] == 1
    assert of_data["phrases"] == 4 / 2000
    assert of_data["grammar_nll"] < untrained["grammar_nll"] - 20


def test_images_are_compared_with_their_sentences() -> None:
    """Those of the data in the order in which sentences are asked for, and with one part of the sentence wrong."""
    dataset = data.load("sentences")
    trainer = Trainer.from_recipe("gan-cls", dataset)
    judged = Evaluation(dataset)

    def shares(step: int) -> list[float]:
        """With the images of the sentences that stand ``step`` further on the list."""
        trainer.sample = lambda n: dataset.samples[step : n + step]  # type: ignore[method-assign]
        metrics = judged(trainer)
        return [metrics[f"{part}_as_asked"] for part in ("digits", "count", "stroke")]

    digits, count, stroke = shares(0)
    assert digits > 0.9
    assert min(count, stroke) > 0.99
    digits, count, stroke = shares(20)
    assert count == 0
    digits, count, stroke = shares(1)
    assert digits < 0.05
    assert count > 0.9
