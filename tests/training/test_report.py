"""The page of a run: whole, without a network, with what the files of the folder say."""

import dataclasses
import json

import pytest
import study_checks
import torch

from lipgan import data, recipes
from lipgan.__main__ import main
from lipgan.lipschitz.bounds import Bounds
from lipgan.systems.cyclegan import transformed
from lipgan.training import Trainer, report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "<ring> & co"
    words = ["--recipe", "lipschitz", "--data", "ring", "--batch-size", "8", "--log-every", "2", "--save-every", "2"]
    assert main(["train", *words, "--steps", "6", "--evaluate-every", "2", "--out", str(out)]) == 0
    return out


def test_the_page_is_valid_and_says_what_the_files_say(run):
    source = (run / "report.html").read_text()
    parsed = study_checks.Page(source)
    assert parsed.seen.count("img") == 4 + 1, "samples at 0, 2, 4, 6 and the curves"
    text = " ".join(parsed.text.split())
    summary = json.loads((run / "metrics.json").read_text())
    for name in ("sliced_wasserstein", "critic_loss"):
        assert f"{summary['last'][name]:.5g}" in text
    for line in (run / "config.toml").read_text().splitlines():
        if " = " in line and not line.startswith(("#", "[")):
            assert line.split(" = ")[0] in text
    assert "6 of 6 steps" in text
    assert "The critic is 1-Lipschitz" in text
    assert [step for step, _ in report.frames(run)] == [0, 2, 4, 6]
    assert (run / "samples" / "00000006.png").read_bytes() == (run / "samples.png").read_bytes()


def test_a_run_that_is_replaced_forgets_its_pictures(tmp_path):
    for step in range(0, 100, 5):
        shown = report.add_frame(tmp_path, step, b"%d" % step)
    assert len(shown) == 8
    assert (shown[0], shown[-1]) == ((0, b"0"), (95, b"95"))
    assert report.add_frame(tmp_path, 7, b"again") == [(0, b"0"), (5, b"5"), (7, b"again")]
    assert [step for step, _ in report.frames(tmp_path)] == [0, 5, 7]


def test_the_verdict_on_critics():
    ring = data.load("ring")

    def verdict(**changes):
        recipe = dataclasses.replace(recipes.get("gan"), batch_size=4, **changes)
        return report.lipschitz_verdict(Trainer.from_recipe(recipe, ring))

    assert "It is not 1-Lipschitz" in verdict()
    assert verdict(minibatch="discrimination").startswith("There are no bounds for this critic: ")
    # Images go through the critic in another layout, by a hook.
    convolutions = report.lipschitz_verdict(Trainer.from_recipe("sngan", data.load("digits", 8)))
    assert convolutions.startswith("The Lipschitz constant of the critic lies between ")
    trainer = Trainer.from_recipe("lipschitz", ring)
    before = torch.get_rng_state()
    assert "is 1-Lipschitz." in report.lipschitz_verdict(trainer)
    assert torch.equal(before, torch.get_rng_state())


def test_the_verdict_is_on_scores_of_what_the_critic_judges(monkeypatch):
    ring = data.load("ring")

    def verdict(name, dataset=ring, **changes):
        recipe = dataclasses.replace(recipes.get(name, dataset.shape), batch_size=4, **changes)
        return report.lipschitz_verdict(Trainer.from_recipe(recipe, dataset))

    for name, judged in (("aae", "codes"), ("ali", "pairs of a sample and a code"), ("avb", "pairs")):
        assert verdict(name).startswith(f"There are no bounds for this critic, which judges {judged}"), name
    # Labels are sentences there, and the critic's second argument.
    sentences = verdict("gan-cls", data.load("sentences", 24), options={"pretraining": 1})
    assert sentences.startswith("The Lipschitz constant of the critic lies between ")
    seen = []
    monkeypatch.setattr(report, "bounds", lambda critic, x, labels, **_: seen.append((x, labels)) or Bounds(2.0, 1.0))
    verdict("cyclegan")
    assert torch.equal(seen[0][0], transformed(ring.samples[: len(seen[0][0])])), "the critic of translations"
    verdict("acgan")
    verdict("cgan")
    assert seen[1][1] is None, "an auxiliary classifier needs none"
    assert torch.equal(seen[2][1], ring.labels[: len(seen[2][1])])


def test_large_critics_are_left_alone(monkeypatch):
    monkeypatch.setattr(report, "_MOST_PARAMETERS", 10)
    monkeypatch.setattr(report, "bounds", None)
    assert report.lipschitz_verdict(Trainer.from_recipe("gan", "ring")).startswith("Not computed, for a critic of ")
