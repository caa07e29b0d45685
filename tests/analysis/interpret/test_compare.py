"""Differences of SAEs: t intervals by hand, pairs, tables, the figure."""

import math
from typing import Any

import matplotlib
import pandas as pd
import pytest

from e2e_sae.analysis.interpret.compare import differences, draw_violins, mean_scores, t_interval, table_4

KIND = {"explainer": "big", "scored_by": "small", "scorer": "detection", "measure": "balanced accuracy"}


def rows(
    label: str, scores: list[float], place: str = "blocks.1.hook_resid_pre", **changes: Any
) -> list[dict[str, Any]]:
    sae = {"label": label, "model_name": "m", "sae_pos": place, "id": label, "run_type": label}
    return [
        {**sae, "latent": n, **KIND, "score": s, "n_examples": 4, "n_failed": 1} | changes for n, s in enumerate(scores)
    ]


def test_the_t_interval_is_the_textbooks() -> None:
    # s = 1, n = 3, t(0.975; 2) = 4.302653.
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == (2.0, pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(2 + 4.302653 / 3**0.5))
    assert t_interval([2.0])[0] == 2.0
    assert math.isnan(t_interval([2.0])[1])
    assert math.isnan(t_interval([])[0])


def test_scores_that_could_not_be_had_are_in_no_mean() -> None:
    (row,) = mean_scores(pd.DataFrame(rows("local", [0.5, float("nan"), 0.7]))).to_dict("records")
    assert (row["n"], row["mean"], row["n_failed"]) == (2, pytest.approx(0.6), 3)


def test_differences_are_of_the_later_one_less_the_earlier_one() -> None:
    table = differences(
        pd.DataFrame([*rows("local", [0.5, 0.6, 0.7, 0.6]), *rows("e2e+ds", [0.9, 1.0, float("nan"), 0.9])])
    )
    (row,) = table.to_dict("records")
    assert (row["first"], row["second"], row["n_first"], row["n_second"]) == ("local", "e2e+ds", 4, 3)
    assert row["difference"] == pytest.approx(2.8 / 3 - 0.6)
    assert row["low"] < row["difference"] < row["high"]
    assert 0 < row["p"] < 0.1
    (shown,) = table_4(table).to_dict("records")
    assert (shown["difference"], shown["score"], shown["mean"], shown["n"]) == (
        "e2e+ds - local", "detection (balanced accuracy)", 0.33, "3, 4",
    )  # fmt: skip


def test_pairs_share_a_hook_point_unless_none_do() -> None:
    a, b, c = (rows(label, [0.5, 0.6], place) for label, place in (("a", "x"), ("b", "y"), ("c", "x")))
    pairs = lambda table: [(row["first"], row["second"]) for row in table.to_dict("records")]  # noqa: E731
    assert pairs(differences(pd.DataFrame([*a, *b, *c]))) == [("a", "c")]
    assert pairs(differences(pd.DataFrame([*a, *b]))) == [("a", "b")]


def test_scores_of_different_kinds_are_never_compared() -> None:
    table = differences(pd.DataFrame([*rows("a", [0.5, 0.6]), *rows("b", [0.5, 0.6], scored_by="other")]))
    assert table.empty


def test_violins_show_every_sae_and_kind_of_score() -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    detection = [*rows("local", [0.5, 0.6, 0.8]), *rows("e2e+ds", [0.9, 0.9])]
    simulation = rows("local", [0.1, float("nan")], scorer="simulation", measure="correlation")
    figure = draw_violins(pd.DataFrame([*detection, *simulation]))
    first, second = figure.axes
    assert [label.get_text() for label in first.get_xticklabels()] == ["local", "e2e+ds"]
    assert "by small" in first.get_title()
    assert "explained by big" in first.get_title()
    assert (first.get_ylabel(), second.get_ylabel()) == ("balanced accuracy per latent", "correlation per latent")
    assert {text.get_text() for text in second.texts} == {"n = 1"}
    plt.close(figure)
