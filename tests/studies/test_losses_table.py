"""Every name in the table is a recipe; the rules on made-up numbers; a small run."""

import math

import pytest
import study_checks
from study_checks import changed, made, verdicts

from lipgan import recipes
from lipgan.studies import losses_table as module
from lipgan.studies.study import FAILS, HOLDS, UNKNOWN, Finished
from lipgan.studies.trainers import FAILED


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("losses-table", recipes=list(module._NEEDED), steps=1, every=1, samples=10)


def ideal(unit):
    wgan = unit["recipe"] == "wgan"
    recall = 0.1 if unit["recipe"] == "dcgan" else 0.5
    return {
        "fid": 200.0 if wgan else 100.0,
        "precision": 0.5,
        "recall": recall,
        "ms": 1.0,
        "steps": 100,
        "stopped": "steps",
        "trace": [300.0, 50.0, 100.0],
    }


def test_the_rules_see_what_is_wrong(study):
    rows = made(study, ideal)
    assert set(verdicts(study, rows).values()) == {HOLDS}
    for name, key, value, claim in (("sngan", "fid", math.inf, "clipping"), ("wgan-gp", "recall", 0.1, "collapse")):

        def broken(unit, r, name=name, key=key, value=value):
            return {**r, key: value} if unit["recipe"] == name else r

        found = verdicts(study, changed(rows, broken))
        assert {entry for entry, verdict in found.items() if verdict == FAILS} == {claim}


def test_noise_is_not_compared(study):
    rows = made(study, ideal)

    def noise(*names):
        return verdicts(
            study, changed(rows, lambda unit, r: {**r, "fid": 5 * r["fid"]} if unit["recipe"] in names else r)
        )

    assert noise("wgan", "wgan-gp", "sngan") == {"clipping": UNKNOWN, "collapse": UNKNOWN}
    # What has learned is better than what has not, but says nothing of its recall.
    assert noise("wgan", "wgan-gp") == {"clipping": HOLDS, "collapse": UNKNOWN}


def test_the_table_names_recipes_once():
    assert set(module._RECIPES) <= set(recipes.names())
    assert len(set(module._RECIPES)) == len(module._RECIPES)
    assert set(module._NEEDED) <= set(module._RECIPES)


def test_a_training_ends_when_it_has_converged_or_is_late(monkeypatch):
    settings = {**module.STUDY.settings(True), "steps": 8, "scheduled": 3, "every": 1, "samples": 10}

    def run(recipe="gan", **changes):
        return module._run({**settings, **changes}, {"recipe": recipe, "seed": 0})

    scores = iter([50.0, 10.0, 20.0, 9.6, 11.0, 1.0])
    monkeypatch.setattr(module, "judged", lambda trainer, samples: {**FAILED, "fid": next(scores)})
    # The last three are no better than 0.95 times the best before.
    found = run()
    assert found["trace"] == [50.0, 10.0, 20.0, 9.6, 11.0]
    assert (found["steps"], found["stopped"], found["fid"]) == (5, "no gain", 11.0)
    monkeypatch.setattr(module, "judged", lambda trainer, samples: {**FAILED, "fid": 1 / trainer.step})
    assert (found := run())["stopped"] == "steps"
    assert (found["steps"], len(found["trace"])) == (8, 8)
    assert (found := run(seconds=0))["stopped"] == "time"
    assert found["steps"] == 1
    # What has a schedule runs to the end of it.
    assert run("instance-noise", seconds=0)["steps"] == 3


def test_a_longer_training_has_limits_of_its_own(monkeypatch):
    longer = {"recipes": ["gan"], "steps": 7, "seconds": 600, "patience": 2}
    settings = {**module.STUDY.settings(True), "recipes": ["gan"], "steps": 2, "every": 1, "samples": 10}
    settings["longer"] = longer
    units = module._units(settings, [4, 5])
    assert units == [
        {"recipe": "gan", "seed": 4},
        {"recipe": "gan", "seed": 5},
        {"recipe": "gan", "length": "longer", "seed": 4},
    ]
    monkeypatch.setattr(module, "judged", lambda trainer, samples: {**FAILED, "fid": 1 / trainer.step})
    assert (found := module._run(settings, units[-1]))["steps"] == 7
    monkeypatch.setattr(module, "judged", lambda trainer, samples: {**FAILED, "fid": 1.0})
    assert (found := module._run(settings, units[-1]))["stopped"] == "no gain"
    assert found["steps"] == 3
    settings["longer"]["seconds"] = 0
    assert module._run(settings, units[-1])["stopped"] == "time"


def test_longer_trainings_stand_apart():
    study = study_checks.smaller("losses-table", recipes=list(module._NEEDED))
    rows = made(study, ideal)
    # It would break both claims.
    worse = Finished({"recipe": "wgan-gp", "length": "longer", "seed": 0}, {**rows[0].result, "fid": 1e3}, 0.1)
    worse.result.update({"recall": 0.0, "steps": 250})
    settings = study.settings(False)
    analysis = study.analyse(settings, [*rows, worse])
    assert analysis.verdict == HOLDS
    assert [row[0] for row in analysis.table.rows] == [*module._NEEDED, "wgan-gp, longer"]
    equal, longer = module.tables({**settings, "every": 100}, [*rows, worse])
    # Of three judgements the second was after 200 steps.
    assert [cells[2] for cells in equal.cells()] == ["50 ± 0 (200)"] * 4
    assert longer.cells()[0][:3] == ["wgan-gp", "1000", "50 (200)"]
    assert study_checks.drawn(study, [*rows, worse]) == study_checks.drawn(study, rows)


def test_what_diverges_is_in_the_table(study, monkeypatch):
    monkeypatch.setattr(module, "fit", lambda *arguments, **options: None)
    rows = study_checks.finished(study)
    assert {row.result["stopped"] for row in rows} == {"diverged"}
    assert module.summary(["wgan", "gan"], rows, 1).cells() == [
        ["wgan", "inf", "inf (0)", "0", "0", "0", "0", "diverged (1)", "1"]
    ]
    assert len(study_checks.drawn(study, rows)) > 5_000


def test_a_small_run(study):
    rows = study_checks.finished(study)
    assert all(row.result["ms"] > 0 for row in rows)
    verdicts(study, rows)
    assert len(study_checks.drawn(study, rows)) > 5_000
