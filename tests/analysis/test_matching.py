"""Matching and frontiers, against brute force and numbers derived by hand."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from e2e_sae.analysis.matching import (
    L0_at_equal_CE,
    at_equal_L0,
    frontier,
    in_order,
    in_papers_order,
    main_runs,
    matched,
    summary_numbers,
)
from tests.analysis.run_tables import NAN, runs, table_of

LOCAL = [(10.0, 1.0), (20.0, 0.5), (40.0, 0.25)]
E2E = [(5.0, 0.8), (10.0, 0.4), (20.0, 0.2)]


def interpolated_by_hand(points: list[tuple[float, float]], x: float) -> float:
    """Returns y at x on the lines between points that are sorted by x; NaN beyond them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[0][1] if len(points) == 1 and points[0][0] == x else NAN


def unbeaten(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that no other one beats, by comparing all with all."""

    def is_beaten(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return b != a and b[0] <= a[0] and b[1] <= a[1]

    return sorted({a for a in points if not any(is_beaten(a, b) for b in points)})


@pytest.mark.parametrize("seed", range(20))
def test_a_frontier_is_what_no_other_run_beats_joined_by_lines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in rng.integers(1, 12, size=(9, 2))]
    front = frontier([x for x, _ in points], [y for _, y in points])
    expected = unbeaten(points)
    assert list(zip(front.x, front.ce, strict=True)) == expected
    for x in np.linspace(0, 12, 25):
        assert float(front.ce_at(x)) == pytest.approx(interpolated_by_hand(expected, x), nan_ok=True)
    turned = [(y, x) for x, y in reversed(expected)]
    for ce in np.linspace(0, 12, 25):
        assert float(front.x_at(ce)) == pytest.approx(interpolated_by_hand(turned, ce), nan_ok=True)


def test_runs_without_numbers_are_on_no_frontier() -> None:
    front = frontier([10.0, NAN, 20.0], [0.5, 0.1, NAN])
    assert (front.x.tolist(), front.ce.tolist()) == ([10.0], [0.5])
    assert len(frontier([NAN], [1.0]).x) == 0


def test_runs_are_read_off_at_equal_L0_and_at_equal_CE() -> None:
    table = table_of(runs("local", LOCAL), runs("e2e", E2E))
    at_L0 = at_equal_L0(table, [15.0, 30.0]).set_index(["kind", "L0"])["CE_increase"]
    assert at_L0["local", 15.0] == pytest.approx(0.75)
    assert at_L0["local", 30.0] == pytest.approx(0.375)
    assert at_L0["e2e", 15.0] == pytest.approx(0.3)
    assert math.isnan(at_L0["e2e", 30.0])
    at_CE = L0_at_equal_CE(table, [0.5]).set_index("kind")["L0"]
    assert at_CE["local"] == pytest.approx(20.0)
    assert at_CE["e2e"] == pytest.approx(8.75)


def test_the_summary_number_is_the_mean_ratio_over_what_both_reach() -> None:
    table = table_of(runs("local", LOCAL), runs("e2e", E2E))
    numbers = summary_numbers(table).set_index("x")
    at = [10 + 10 * i / 19 for i in range(20)]
    ratios = [interpolated_by_hand(E2E, x) / interpolated_by_hand(LOCAL, x) for x in at]
    assert numbers.loc["L0", "share"] == pytest.approx(sum(ratios) / 20)
    assert (numbers.loc["L0", "from"], numbers.loc["L0", "to"]) == (10, 20)
    assert (numbers.loc["alive", "from"], numbers.loc["alive", "to"]) == (100, 200)
    assert numbers.loc["alive", "share"] == pytest.approx(numbers.loc["L0", "share"])
    costs = [0.25 + 0.55 * i / 19 for i in range(20)]
    own, local = ([(y, x) for x, y in reversed(points)] for points in (E2E, LOCAL))
    needs = [interpolated_by_hand(own, ce) / interpolated_by_hand(local, ce) for ce in costs]
    assert numbers.loc["L0", "x_share"] == pytest.approx(sum(needs) / 20)
    assert math.isnan(numbers.loc["L0", "spread"])


def test_a_type_that_costs_the_same_share_everywhere_has_that_share_at_each_seed() -> None:
    def share_of(points: list[tuple[float, float]], share: float) -> list[tuple[float, float]]:
        return [(x, share * y) for x, y in points]

    table = table_of(
        runs("local", LOCAL),
        runs("local", share_of(LOCAL, 1.1), seed=1),
        runs("e2e", share_of(LOCAL, 0.4)),
        runs("e2e", share_of(LOCAL, 0.55), seed=1),
        runs("e2e", share_of(LOCAL, 0.1), seed=2),  # has no local twin
    )
    row = summary_numbers(table).set_index("x").loc["L0"]
    assert row["share"] == pytest.approx(0.45)
    assert row["spread"] == pytest.approx(math.sqrt(2 * 0.05**2))
    assert row["seeds"] == 2


def test_types_are_compared_within_their_architecture() -> None:
    table = table_of(
        runs("local", LOCAL),
        runs("local", [(x, y / 2) for x, y in LOCAL], "topk"),
        runs("e2e", [(x, y / 4) for x, y in LOCAL], "topk"),
        runs("e2e", LOCAL, "gated"),
    )
    numbers = summary_numbers(table)
    assert set(numbers["architecture"]) == {"topk"}
    assert numbers["share"].tolist() == pytest.approx([0.5, 0.5])


def test_ranges_that_do_not_meet_have_no_share() -> None:
    assert summary_numbers(table_of(runs("local", LOCAL), runs("e2e", [(1.0, 3.0), (9.0, 1.0)]))).empty


def nearest_by_brute_force(table: Any, kind: str, column: str, target: float) -> float:
    values = [row[column] for row in table.to_dict("records") if row["kind"] == kind]
    return min(values, key=lambda value: abs(value - target))


@pytest.mark.parametrize(("by", "column"), [("CE", "CE_increase"), ("L0", "L0"), ("alive", "alive_dict_elements")])
def test_matched_runs_are_the_nearest_to_a_local_run_that_most_kinds_reach(by: Any, column: str) -> None:
    far = [(100.0, 9.0), (200.0, 8.0)]
    table = table_of(runs("local", LOCAL), runs("e2e", E2E), runs("e2e+ds", LOCAL[:2]), runs("local", far, "codebook"))
    found = matched(table, by)
    assert found["kind"].tolist() == ["local", "e2e", "e2e+ds"]  # the codebook's do not reach it
    targets = [row[column] for row in table.to_dict("records") if row["kind"] == "local"]
    spans = {kind: table[table["kind"] == kind][column] for kind in ("local", "e2e", "e2e+ds")}
    reached = [t for t in targets if all(0.9 * s.min() <= t <= 1.1 * s.max() for s in spans.values())]
    assert found["target"].iloc[0] in reached
    assert found["target"].nunique() == 1
    for row in found.to_dict("records"):
        assert row[column] == nearest_by_brute_force(table, row["kind"], column, row["target"])
        assert row["distance"] == pytest.approx(row[column] - row["target"])


def test_of_targets_that_all_kinds_reach_it_is_the_one_they_come_nearest_to() -> None:
    local, e2e = [(10.0, 3.0), (20.0, 1.0), (40.0, 0.3)], [(5.0, 4.0), (9.0, 1.8), (16.0, 0.28)]
    found = matched(table_of(runs("local", local), runs("e2e", e2e)), "CE")
    # Ratios to the nearest: 4 / 3, 1.8 / 1 and 0.3 / 0.28.
    assert found["target"].tolist() == [0.3, 0.3]
    assert found["L0"].tolist() == [40.0, 16.0]


def test_runs_of_one_seed_are_compared_where_there_is_one() -> None:
    near, far = [(10.0, 1.0)], [(10.0, 1.2)]
    table = table_of(
        runs("local", near, seed=1),
        runs("local", far, seed=0),
        runs("local", near, seed=2),
        runs("e2e", near, seed=2),
        runs("e2e", far, seed=0),
        runs("e2e+ds", near, seed=5),
    )
    found = matched(table, "CE")
    assert found[["kind", "seed", "CE_increase"]].to_numpy().tolist() == [
        ["local", 0, 1.2],
        ["e2e", 0, 1.2],
        ["e2e+ds", 5, 1.0],
    ]


def test_each_position_has_a_target_of_its_own_and_a_single_run_is_always_compared() -> None:
    other: dict[str, Any] = {"sae_pos": "blocks.10.hook_resid_pre", "layer": 10}
    table = table_of(
        runs("local", [(7.0, 3.0)], **other),
        runs("e2e", [(9.0, 1.0)], **other),
        runs("local", LOCAL),
        runs("e2e", E2E),
    )
    found = matched(table, "CE")
    assert found[["layer", "kind", "target"]].values.tolist() == [
        [2, "local", 0.5],
        [2, "e2e", 0.5],
        [10, "local", 3.0],
        [10, "e2e", 3.0],
    ]


def test_runs_without_a_measurement_are_not_matched() -> None:
    assert matched(table_of(runs("local", [(NAN, NAN)]), runs("e2e", [(NAN, NAN)])), "CE").empty


def test_frontiers_have_the_settings_of_most_runs_of_a_kind() -> None:
    table = table_of(
        runs("local", LOCAL),
        runs("local", LOCAL[:2], lr=1e-2),
        runs("local", LOCAL[:2], seed=1),
        runs("e2e", LOCAL[:1], lr=1e-4),
        runs("e2e", [(10.0, 0.2)], lr=1e-5),  # as many, and lower
        runs("e2e+ds", LOCAL[:1], n_samples=800.0),  # as many, and longer
        runs("e2e+ds", [(10.0, 0.2)]),
    )
    kept = main_runs(table)
    local = kept[kept["kind"] == "local"]
    assert (len(local), set(local["lr"]), set(local["seed"])) == (5, {1e-3}, {0, 1})
    assert kept[kept["kind"] == "e2e"]["lr"].tolist() == [1e-5]
    assert kept[kept["kind"] == "e2e+ds"]["n_samples"].tolist() == [800.0]


def test_a_coefficient_of_0_is_no_other_setting_than_none() -> None:
    table = table_of(runs("e2e", LOCAL, out_to_in_coeff=NAN), runs("e2e", LOCAL, out_to_in_coeff=0.0, seed=1))
    assert len(main_runs(table)) == 6


def test_chosen_runs_are_taken_as_they_are() -> None:
    table = table_of(runs("local", LOCAL), runs("e2e", E2E), runs("e2e+ds", E2E))
    table["is_main"] = table["L0"] > 5
    table["matched_CE"] = [False, False, True, False, True, False, False, False, False]
    assert len(main_runs(table)) == 7
    found = matched(table, "CE").set_index("kind")
    assert found["CE_increase"].to_dict() == {"local": 0.25, "e2e": 0.4, "e2e+ds": 0.4}
    assert found["target"].tolist() == pytest.approx([0.325] * 3)
    assert matched(table, "L0")["target"].iloc[0] == 20.0  # nobody has chosen these


def test_kinds_and_tables_are_in_the_papers_order() -> None:
    assert in_order(["topk e2e", "odd", "e2e+ds", "topk local", "local"]) == [
        "local",
        "e2e+ds",
        "topk local",
        "topk e2e",
        "odd",
    ]
    table = table_of(
        runs("e2e", LOCAL[:1], "topk"),
        runs("local", LOCAL[:1], "topk"),
        runs("e2e", LOCAL[:1], layer=10, sae_pos="blocks.10.hook_resid_pre"),
        runs("e2e", LOCAL[:1]),
        runs("local", LOCAL[:1]),
    )
    ordered = in_papers_order(table)[["layer", "kind"]].values.tolist()
    assert ordered == [[2, "local"], [2, "e2e"], [2, "topk local"], [2, "topk e2e"], [10, "e2e"]]
