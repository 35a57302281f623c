"""Units and rows: products, choices, results laid side by side."""

from lipgan.studies.rows import by_seed, crossed, over, values, where
from lipgan.studies.study import Finished


def rows():
    units = crossed([3, 4], method=["a", "b"], size=[1, 2])
    return [Finished(unit, {"x": 10 * unit["seed"] + unit["size"]}, 0.1) for unit in units]


def test_units_are_products_and_those_of_a_seed_stand_together():
    units = crossed([3, 4], method=["a", "b"], size=[1, 2])
    assert units[:3] == [
        {"method": "a", "size": 1, "seed": 3},
        {"method": "a", "size": 2, "seed": 3},
        {"method": "b", "size": 1, "seed": 3},
    ]
    assert [unit["seed"] for unit in units] == [3] * 4 + [4] * 4


def test_rows_are_chosen_by_the_entries_of_their_units():
    assert values(where(rows(), method="b", size=2), "x") == [32, 42]
    assert where(rows(), other=1) == []
    assert over(rows(), "x", method="b", size=2) == "37 ± 7.1"


def test_results_of_a_seed_are_found_by_their_entries():
    found = by_seed([*rows(), Finished({"other": 1, "seed": 3}, {}, 0.1)], "method", "size")
    assert [result["a", 2]["x"] for result in found] == [32, 42]
    assert [sorted(result) for result in by_seed(rows(), "size")] == [[1, 2], [1, 2]]
