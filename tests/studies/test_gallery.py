"""The page of the studies: sections are replaced, remarks are kept, figures are small."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipgan import studies
from lipgan.studies import figures, losses_table, runner

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "scripts" / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verdicts(name, seen, verdict="holds"):
    claims = [{"claim": c.text, "source": c.source, "seen": seen, "verdict": verdict} for c in studies.get(name).claims]
    return {"claims": claims, "verdict": verdict, "quick": True}


PAGE = "Studies.\n\n<!-- studies -->\n\n-\n<!-- end -->\n\n## Change one thing\n"


def test_sections_come_in_order_and_remarks_stay(gallery):
    text = gallery.update(PAGE, {"ttur": verdicts("ttur", "x | y")})
    text = text.replace("\n## Change", "\nA remark.\n\n## Change")
    text = gallery.update(text, {"f-gan": verdicts("f-gan", "z", "cannot be told")})
    text = gallery.update(text, {"ttur": verdicts("ttur", "now *", "does not hold here")})
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## f-gan",
        "## ttur",
        "## Change one thing",
    ]
    assert "\nA remark.\n\n## Change one thing\n" in text
    assert "x \\| y" not in text
    assert text.count("| now \\* | does not hold here |") == 4
    assert "| [f-gan](#f-gan) | 0 of 4 | cannot be told |" in text
    assert "| [ttur](#ttur) | 0 of 4 | does not hold here |" in text
    assert gallery.update(text, {}) == text


def test_the_page_of_the_documentation_is_what_the_script_writes(gallery):
    text = gallery.PAGE.read_text(encoding="utf-8")
    assert gallery.update(text, {}) == text
    for name in studies.names():
        found = gallery.pattern(f"study {name}").search(text)
        if found is not None:
            assert f"images/studies/{name}.png" in found[1]
            assert found[1].count("\n| ") == 1 + len(studies.get(name).claims)
            assert (gallery.IMAGES / f"{name}.png").stat().st_size < 100_000


def test_the_figures_of_the_page_have_the_colours_of_their_style(gallery):
    for name, lines in (("f-gan", 5), ("ttur", 6)):
        with Image.open(gallery.IMAGES / f"{name}.png") as picture:
            near = np.asarray(picture.convert("RGB")).astype(int).reshape(-1, 3)
        for colour in figures.COLOURS[:lines]:
            wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
            assert np.abs(near - wanted).max(1).min() <= 2, f"{name} lacks {colour}"


def test_the_tables_of_recipes_come_from_all_trainings_that_are_known(gallery, tmp_path):
    study, settings = losses_table.STUDY, losses_table.STUDY.settings(False)
    units = study.units(settings, [0, 1])

    def some(recipes, **entries):
        return [u for u in units if u["recipe"] in recipes and all(u.get(k) == v for k, v in entries.items())]

    def run(settings, unit):
        quality = {"fid": 100.123456 + unit["seed"], "precision": 0.5, "recall": 0.25}
        trace = [110.0, 90.5 - unit["seed"], quality["fid"]]
        return {**quality, "ms": 2.0, "steps": 250, "stopped": "no gain", "trace": trace}

    # Two runs, the second with what the first lacked; out of order.
    known = tmp_path / "known.jsonl"
    for name, part in (
        ("first", some(("gan", "wgan"), length=None, seed=1)),
        ("second", some(("gan",), seed=0) + some(("wgan",), length="longer")),
    ):
        folder = tmp_path / name / study.name
        folder.mkdir(parents=True)
        runner.finish(dataclasses.replace(study, run=run), settings, part, folder)
        gallery.collect(tmp_path / name, known)
    rows = runner.read(known, study.name, settings)
    assert [("length" in row.unit, row.unit["recipe"], row.unit["seed"]) for row in rows] == [
        (False, "gan", 0),
        (False, "gan", 1),
        (False, "wgan", 1),
        (True, "gan", 0),
        (True, "wgan", 0),
    ]
    assert rows[0].result["fid"] == 100.12
    before = known.read_bytes()
    gallery.collect(tmp_path / "second", known)
    assert known.read_bytes() == before
    page = "Before.\n\n<!-- digits -->\n\n-\n<!-- end -->\n\n<!-- longer -->\n\n-\n<!-- end -->\n\nAfter.\n"
    equal, longer = gallery.digits(page, known).split("<!-- longer -->")
    assert equal.startswith("Before.\n\n<!-- digits -->\n\n| recipe | FID of digits | lowest FID (step) |")
    assert (
        "\n| gan | 100.6 ± 0.71 | 90 ± 0.71 (200) | 0.5 ± 0 | 0.25 ± 0 | 250 ± 0 | 2 ± 0 | no gain (2) | 2 |\n" in equal
    )
    assert "\n| wgan | 101.1 | 89.5 (200) | 0.5 | 0.25 | 250 | 2 | no gain (1) | 1 |\n" in equal
    assert "\n| wgan | 100.1 | 90.5 (200) | 0.5 | 0.25 | 250 | 2 | no gain (1) | 1 |\n" in longer
    assert longer.endswith("\n<!-- end -->\n\nAfter.\n")


def test_the_page_of_the_recipes_is_what_the_trainings_make(gallery):
    text = gallery.RECIPES.read_text(encoding="utf-8")
    assert gallery.digits(text, gallery.TRAININGS) == text, "run scripts/gallery.py --recipes"
    table = gallery.pattern("digits").search(text)[1]
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == losses_table.STUDY.full["recipes"]
