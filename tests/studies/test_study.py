"""Values of the frame: tables, the rule over seeds, names."""

import csv
import math

import pytest

from lipgan.studies import Finding, Table, get, names
from lipgan.studies.study import FAILS, HOLDS, LECTURES, UNKNOWN, Analysis, judge, spread


def test_the_rule_over_seeds():
    assert judge([True] * 3) == HOLDS
    assert judge([True, True, False]) == UNKNOWN
    assert judge([True, False]) == FAILS
    assert judge([False]) == FAILS
    assert judge([]) == UNKNOWN


@pytest.mark.parametrize(
    ("found", "verdict"),
    [((HOLDS, HOLDS), HOLDS), ((HOLDS, UNKNOWN), UNKNOWN), ((UNKNOWN, FAILS), FAILS), ((FAILS, HOLDS), FAILS)],
)
def test_a_study_holds_if_every_claim_does(found, verdict):
    table = Table(("x",), ())
    assert Analysis(tuple(Finding(str(i), word, "") for i, word in enumerate(found)), table).verdict == verdict


def test_a_verdict_is_one_of_three():
    with pytest.raises(ValueError, match=r"verdict must be one of holds, .*, got 'maybe'"):
        Finding("x", "maybe", "")


def test_spread_is_mean_and_standard_deviation():
    assert spread([1.0, 3.0]) == "2 ± 1.4"
    assert spread([1000.0, 1200.0]) == "1100 ± 141"
    assert spread([0.5]) == "0.5"
    assert spread([math.inf, 1.0]) == "inf"


def test_tables_keep_their_numbers():
    table = Table(("name", "value"), (("a | b", 1 / 3), ('"c", d', 12)))
    rows = list(csv.reader(table.csv().splitlines()))
    assert rows == [["name", "value"], ["a | b", repr(1 / 3)], ['"c", d', "12"]]
    assert table.markdown() == '| name | value |\n| --- | --- |\n| a \\| b | 0.3333 |\n| "c", d | 12 |\n'
    with pytest.raises(ValueError, match="rows must have 2 entries"):
        Table(("name", "value"), (("a",),))


@pytest.mark.parametrize("name", names())
def test_every_study_is_whole(name):
    study = get(name)
    assert study.name == name
    assert len({claim.key for claim in study.claims}) == len(study.claims) > 0
    assert study.seeds[0] >= study.seeds[1] >= 2
    for claim in study.claims:
        assert claim.source[:11] in LECTURES
        assert claim.rule
    for quick in (False, True):
        settings = study.settings(quick)
        units = study.units(settings, [3, 4])
        assert {unit["seed"] for unit in units} == {3, 4}
        assert len({str(sorted(unit.items())) for unit in units}) == len(units), "a unit twice"


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match="unknown study 'f-gans'; did you mean f-gan"):
        get("f-gans")
