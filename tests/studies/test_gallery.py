"""The page of the studies: sections are replaced, remarks are kept, figures are small."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from lipgan import studies
from lipgan.studies import losses_table, runner

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
            assert (gallery.IMAGES / f"{name}.png").stat().st_size < 80_000


def test_the_table_of_recipes_comes_from_the_units_that_are_there(gallery, tmp_path):
    study, settings = losses_table.STUDY, losses_table.STUDY.settings(False)
    units = [unit for unit in study.units(settings, [0, 1]) if unit["recipe"] in ("gan", "wgan")][:3]

    def run(settings, unit):
        quality = {"fid": 100.0 + unit["seed"], "precision": 0.5, "recall": 0.25}
        return {**quality, "ms": 2.0, "steps": 400, "stopped": "no gain"}

    folder = tmp_path / study.name
    folder.mkdir()
    runner.finish(dataclasses.replace(study, run=run), settings, units, folder)
    text = gallery.digits("Before.\n\n<!-- digits -->\n\n-\n<!-- end -->\n\nAfter.\n", tmp_path)
    assert text.startswith("Before.\n\n<!-- digits -->\n\n| recipe | FID of digits |")
    assert "\n| gan | 100.5 ± 0.71 | 0.5 ± 0 | 0.25 ± 0 | 400 ± 0 | 2 ± 0 | no gain (2) | 2 |\n" in text
    assert "\n| wgan | 100 | 0.5 | 0.25 | 400 | 2 | no gain (1) | 1 |\n" in text
    assert text.endswith("\n<!-- end -->\n\nAfter.\n")


def test_the_page_of_the_recipes_has_a_row_for_each(gallery):
    table = gallery.pattern("digits").search(gallery.RECIPES.read_text(encoding="utf-8"))[1]
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == [name for name in losses_table.STUDY.full["recipes"] if name in names]
    assert len(names) == len(set(names)) > 40
