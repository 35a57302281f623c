"""The folder of a study: whole files, a page that needs nothing else, and answers to bad input."""

import dataclasses
import json
import os
import re
from xml.etree import ElementTree

import pytest
import study_checks
from PIL import Image

from lipgan.__main__ import main
from lipgan._choices import STUDIES
from lipgan._html import document, in_words, table
from lipgan.studies import figures, page, report, run_study
from lipgan.training.lock import locked

SMALL = {"steps": 100, "pairs": [[0.6, 1]], "sizes": [1, 2]}


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("biased-gradients", **SMALL)


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("studies")
    run_study(study, out, seeds=2, first_seed=3)
    return out / study.name


def test_the_folder_holds_what_it_says(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(report.FILES)
    with Image.open(folder / "figure.png") as picture:
        assert picture.width == pytest.approx(figures.WIDTH * 150, abs=2)
    vectors = ElementTree.parse(folder / "figure.svg").getroot()
    assert vectors.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(vectors.iter("{http://www.w3.org/2000/svg}path"))) > 20
    found = json.loads((folder / "verdicts.json").read_text())
    assert found["seeds"] == [3, 4]
    assert found["settings"]["steps"] == 100
    assert [claim["verdict"] for claim in found["claims"]].count("holds") >= 3


def test_the_page_is_valid_and_needs_nothing_else(folder):
    parsed = study_checks.Page((folder / "index.html").read_text())
    assert parsed.seen.count("svg") == 1
    assert parsed.seen.count("article") == 4
    text = " ".join(parsed.text.split())
    found = json.loads((folder / "verdicts.json").read_text())
    for claim in found["claims"]:
        for part in ("claim", "source", "rule", "verdict", "seen"):
            assert " ".join(claim[part].split()) in text, part
    holding = [claim["verdict"] for claim in found["claims"]].count("holds")
    assert f"Verdict: {page._MARKS[found['verdict']]} {found['verdict']} ({holding} of 4 claims hold)" in text
    assert "lipgan study biased-gradients --seeds 2 --seed 3" in text
    assert "2 seeds (3 to 4), " in text
    assert "comes out as claimed in all of 2 seeds one time in 4." in text
    assert "lecture 004: D. Derkach" in text
    assert "lecture 000" not in text
    # The numbers of the table are those of the file.
    for row in (folder / "table.md").read_text().splitlines()[2:]:
        for cell in row.strip("| ").split(" | "):
            assert cell in text


def test_one_seed_is_no_seeds():
    assert (page._seeds([3]), page._seeds([3, 4])) == ("1 seed (3)", "2 seeds (3 to 4)")


def test_values_are_words_of_no_notation():
    assert in_words({"a": None, "b": [1, "x"]}) == "a: none; b: 1, x"


def test_texts_are_escaped():
    name = '<script>"&'
    parsed = study_checks.Page(document(name, table(("a<b",), ((name,),))))
    assert parsed.text.count(name) == 2
    assert "a<b" in parsed.text


def test_the_picture_is_the_same_each_time(study, folder, tmp_path):
    run_study(study, tmp_path, seeds=2, first_seed=3)
    for name in ("figure.svg", "figure.png", "table.csv", "table.md", "verdicts.json"):
        assert (tmp_path / study.name / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_second_run_computes_nothing_and_overwrite_everything(study, tmp_path):
    calls = []
    counted = dataclasses.replace(study, run=lambda s, u: calls.append(u) or study.run(s, u))
    run_study(counted, tmp_path, seeds=1)
    assert len(calls) == 2
    leftover = tmp_path / study.name / ".table.csv.abcd1234"
    leftover.write_text("half")
    run_study(counted, tmp_path, seeds=1)
    assert len(calls) == 2
    assert not leftover.exists()
    run_study(counted, tmp_path, seeds=1, overwrite=True)
    assert len(calls) == 4


def test_a_failure_while_files_are_written_leaves_the_old_ones(study, tmp_path, monkeypatch):
    run_study(study, tmp_path, seeds=1)
    folder = tmp_path / study.name
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace = os.replace

    def full(source, target):
        if str(target).endswith("table.csv"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run_study(study, tmp_path, seeds=2)
    assert (folder / "table.csv").read_bytes() == before["table.csv"]
    assert {path.name for path in folder.iterdir()} == set(before)


def test_one_run_at_a_time(study, tmp_path):
    folder = tmp_path / study.name
    folder.mkdir()
    with locked(folder), pytest.raises(ValueError, match="is in use by process"):
        run_study(study, tmp_path)


def command(capsys, *words):
    """Status, stdout and stderr of ``lipgan study``."""
    try:
        status = main(["study", *map(str, words)])
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


def test_list_names_every_study(capsys):
    status, out, _ = command(capsys, "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(STUDIES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "study needs a name, or all"),
        (("dualty",), "unknown study 'dualty'; did you mean duality?"),
        (("duality", "--list"), "--list takes no name, got 'duality'"),
        (("duality", "--seeds", "0"), "argument --seeds: must be a whole number of at least 1, got '0'"),
        (("duality", "--workers", "two"), "argument --workers: must be a whole number of at least 1, got 'two'"),
        (("duality", "--out", ""), "argument --out: must be the name of a file or folder, got ''"),
        (("duality", "--device", "cuda:99"), "device 'cuda:99' cannot be used here"),
        (("duality", "--device", "gpu"), "device 'gpu' cannot be used here"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = command(capsys, *words)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not out
    assert not list(tmp_path.iterdir())


def test_bad_folders_are_one_sentence_and_status_2(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "duality").write_text("")
    for out, message in ((tmp_path / "file", "is not a folder"), (tmp_path, f"{tmp_path / 'duality'} is not a folder")):
        status, _, err = command(capsys, "duality", "--quick", "--out", out)
        assert status == 2
        assert err.splitlines()[-1].startswith("lipgan: error: ")
        assert message in err.splitlines()[-1]


def test_the_command_prints_each_verdict_and_where_the_page_is(capsys, tmp_path, monkeypatch):
    small = study_checks.smaller("biased-gradients", **SMALL)
    monkeypatch.setattr("lipgan.commands.study.get", lambda name: small)
    monkeypatch.setattr("lipgan.commands.study.STUDIES", {small.name: ""})
    status, out, err = command(capsys, "all", "--seeds", "1", "--out", tmp_path)
    assert status == 0
    lines = out.splitlines()
    assert re.fullmatch(r"biased-gradients: (holds|does not hold here|cannot be told)", lines[0])
    for claim in small.claims:
        assert any(line.startswith(f"  {claim.key}: ") for line in lines)
    assert lines[-1] == f"see {tmp_path / 'index.html'}"
    assert err == "lipgan: biased-gradients: 2 units of work\n"
    overview = study_checks.Page((tmp_path / "index.html").read_text())
    assert "Bernoulli" in overview.text
    assert (tmp_path / "biased-gradients" / "index.html").exists()


def test_processes_of_torchrun_share_the_work_and_the_first_one_writes(capsys, tmp_path, monkeypatch):
    small = study_checks.smaller("biased-gradients", **SMALL)
    monkeypatch.setattr("lipgan.commands.study.get", lambda name: small)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = (small.name, "--seeds", "1", "--out", tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert command(capsys, *words) == (0, "", "")
    assert [path.name for path in (tmp_path / small.name).iterdir()] == ["units-1.jsonl"]
    monkeypatch.setenv("RANK", "0")
    status, out, err = command(capsys, *words)
    assert (status, err) == (0, "lipgan: biased-gradients: 2 units of work, 1 of them finished before\n")
    assert out.splitlines()[-1].startswith("  see ")
    assert sorted(path.name for path in (tmp_path / small.name).iterdir()) == sorted(report.FILES)
    status, _, err = command(capsys, *words, "--overwrite")
    assert status == 2
    assert "--overwrite is not for several processes of torchrun" in err
