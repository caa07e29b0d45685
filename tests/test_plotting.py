"""The paper's library's two figures: what is drawn is what the table holds, and the files are there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from e2e_sae.errors import UserError
from e2e_sae.plotting import plot_facet, plot_per_layer_metric

STYLES = {"local": {"marker": "^", "color": "#f0a70a"}, "e2e": {"color": "#518c31", "label": "end to end"}}


@pytest.fixture
def runs() -> pd.DataFrame:
    """Six runs: SAEs at layers 2 and 6, of two types, the local ones in no order of their cost."""
    return pd.DataFrame(
        {
            "id": ["a", "b", "c", "d", "e", "f"],
            "layer": [2, 2, 2, 6, 6, 6],
            "run_type": ["local", "local", "e2e", "local", "local", "local"],
            "L0": [90.0, 30.0, 25.0, 200.0, 60.0, 100.0],
            "alive": [20_000, 30_000, 15_000, 40_000, 25_000, 30_000],
            "cost": [0.05, 0.15, 0.06, 0.1, 0.4, 0.2],
            "seed": [0, 1, 0, 2, 1, 0],
            **{f"recon_loss_layer-{i}": [i + n / 10 for n in range(6)] for i in range(2, 9)},
        }
    )


@pytest.fixture(autouse=True)
def closed_figures():
    """Nothing is left open behind a test."""
    yield
    plt.close("all")


def points(line: Any) -> list[tuple[float, float]]:
    """Returns a line's points in the order in which they are joined."""
    return [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def legend(ax: Any) -> list[str]:
    """Returns the texts of a legend."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


FACETS: dict[str, Any] = {"xs": ["L0", "alive"], "y": "cost", "facet_by": "layer", "line_by": "run_type"}


def test_a_facets_line_joins_its_runs_in_the_order_of_y(runs: pd.DataFrame):
    rows = plot_facet(runs, **FACETS, line_by_vals=["local", "e2e"], styles=STYLES)
    assert [len(row) for row in rows] == [2, 2]
    assert points(rows[0][0].lines[0]) == [(90, 0.05), (30, 0.15)]
    assert points(rows[0][1].lines[0]) == [(20_000, 0.05), (30_000, 0.15)]
    assert points(rows[0][0].lines[1]) == [(25, 0.06)]
    assert points(rows[1][0].lines[0]) == [(200, 0.1), (100, 0.2), (60, 0.4)]
    assert [line.get_color() for line in rows[0][0].lines] == ["#f0a70a", "#518c31"]
    assert [line.get_marker() for line in rows[0][0].lines] == ["^", "o"]
    assert [ax.get_xlabel() for ax in rows[1]] == ["L0", "alive"]
    assert [row[0].get_ylabel() for row in rows] == ["cost", "cost"]


def test_sort_by_another_column_joins_the_points_in_its_order(runs: pd.DataFrame):
    rows = plot_facet(runs, **FACETS, sort_by="seed", facet_vals=[6])
    assert points(rows[0][0].lines[1]) == [(100, 0.2), (60, 0.4), (200, 0.1)]


def test_a_series_without_runs_still_stands_in_the_legend(runs: pd.DataFrame):
    kinds = ["local", "e2e", "downstream"]
    rows = plot_facet(runs, **FACETS, line_by_vals=kinds, styles=STYLES, legend_title="type", facet_vals=[6])
    assert legend(rows[0][0]) == ["local", "end to end", "downstream"]
    assert rows[0][0].get_legend().get_title().get_text() == "type"
    assert [len(points(line)) for line in rows[0][0].lines] == [3, 0, 0]


def test_limits_ticks_and_labels_are_those_asked_for(runs: pd.DataFrame):
    rows = plot_facet(
        runs,
        **FACETS,
        xlims=[{2: (0, 200), 6: (0, 600)}, None],
        ylim={2: (0.2, 0.0), 6: (0.4, 0.0)},
        xticks=[[0, 100, 200], ([0, 40_000], ["0", "40k"])],
        xlabels=["active latents", None],
        ylabel="CE increase",
        yticks=[0.0, 0.1],
    )
    assert [row[0].get_xlim() for row in rows] == [(0, 200), (0, 600)]
    # Descending limits: no cost is at the top. The columns of a row share them.
    assert [[ax.get_ylim() for ax in row] for row in rows] == [[(0.2, 0.0)] * 2, [(0.4, 0.0)] * 2]
    assert rows[0][0].get_xticks().tolist() == [0, 100, 200]
    assert [tick.get_text() for tick in rows[0][1].get_xticklabels()] == ["0", "40k"]
    assert [ax.get_xlabel() for ax in rows[0]] == ["active latents", "alive"]
    assert rows[0][0].get_ylabel() == "CE increase"
    assert rows[0][0].get_yticks().tolist() == [0.0, 0.1]


def test_a_scatter_draws_the_same_points_unjoined(runs: pd.DataFrame):
    lines = [plot_facet(runs, **FACETS, plot_type=kind)[1][0].lines[1] for kind in ("line", "scatter")]
    assert points(lines[0]) == points(lines[1])
    assert [line.get_linestyle() for line in lines] == ["-", "None"]


def test_titles_and_the_formatter_reach_every_row(runs: pd.DataFrame):
    formatted: list[Sequence[Any]] = []
    rows = plot_facet(runs, **FACETS, title={2: "early", 6: "late"}, suptitle="all", axis_formatter=formatted.append)
    assert formatted == rows
    parts = [row[0].figure for row in rows]
    assert [part.get_suptitle() for part in parts] == ["early", "late"]
    assert parts[0].get_figure(root=True).get_suptitle() == "all"


def test_a_figure_with_a_file_is_saved_twice_and_closed(runs: pd.DataFrame, tmp_path: Path):
    path = tmp_path / "new" / "folder" / "facets.png"
    rows = plot_facet(runs, **FACETS, facet_vals=[2], out_file=path)
    width, height = rows[0][0].figure.get_figure(root=True).get_size_inches()
    pixels: Any = plt.imread(path)
    np.testing.assert_allclose(pixels.shape[:2], (400 * height, 400 * width), atol=1)
    assert path.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")
    assert plt.get_fignums() == []
    plot_facet(runs, **FACETS, out_file=tmp_path / "alone.png", save_svg=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.png", "new"]


def test_a_figure_without_a_file_stays_open_and_a_failed_one_does_not(runs: pd.DataFrame):
    def fails(row: Any) -> None:
        raise RuntimeError("formatter")

    with pytest.raises(RuntimeError, match="formatter"):
        plot_facet(runs, **FACETS, axis_formatter=fails)
    assert plt.get_fignums() == []
    plot_facet(runs, **FACETS)
    assert len(plt.get_fignums()) == 1


def test_the_look_is_a_dark_grid_and_stays_inside_the_call(runs: pd.DataFrame):
    before = dict(plt.rcParams)
    rows = plot_facet(runs, **FACETS)
    assert rows[0][0].get_facecolor() == pytest.approx((0.918, 0.918, 0.949, 1), abs=1e-2)  # seaborn's #EAEAF2
    assert dict(plt.rcParams) == before


RUN_IDS = {6: {"local": "d", "e2e": "e"}, 2: {"local": "a", "e2e": "c"}}


def test_each_sae_layer_has_a_panel_that_begins_at_it(runs: pd.DataFrame):
    panels = plot_per_layer_metric(runs, RUN_IDS, "recon_loss", 8, ["local", "e2e"], styles=STYLES, ylim=(0, 30))
    assert [ax.get_title() for ax in panels] == ["SAE at layer 2", "SAE at layer 6"]
    # Row n holds i + n / 10 at layer i.
    assert points(panels[0].lines[0]) == [(i, i + 0.0) for i in range(2, 9)]
    assert points(panels[0].lines[1]) == [(i, i + 0.2) for i in range(2, 9)]
    assert points(panels[1].lines[0]) == [(i, i + 0.3) for i in (6, 7, 8)]
    assert [ax.get_ylim() for ax in panels] == [(0, 30)] * 2
    assert panels[1].get_xticks().tolist() == [6, 7, 8]
    assert legend(panels[0]) == ["local", "end to end"]


def test_columns_are_added_to_the_legends_labels(runs: pd.DataFrame):
    columns = [("cost", 3), ("L0", 0)]
    panels = plot_per_layer_metric(
        runs, {2: {"local": "b"}}, "recon_loss", 3, ["local"],
        legend_label_cols_and_precision=columns, legend_title="type", show_ax_titles=False,
    )  # fmt: skip
    assert legend(panels[0]) == ["local (cost=0.150, L0=30)"]
    assert panels[0].get_legend().get_title().get_text() == "type"
    assert panels[0].get_title() == ""


def test_the_horizontal_layout_gives_the_papers_layers_their_widths(runs: pd.DataFrame, tmp_path: Path):
    table = runs.assign(**{f"recon_loss_layer-{i}": 1.0 for i in range(9, 12)})
    ids = {2: {"local": "a"}, 6: {"local": "d"}, 10: {"local": "f"}}
    panels = plot_per_layer_metric(
        table, ids, "recon_loss", 11, ["local"], horz_layout=True, out_file=tmp_path / "layers.png"
    )
    ratios = panels[0].get_gridspec().get_width_ratios()
    assert list(ratios) == [3, 2, 1.2]
    assert len({round(ax.get_position().y0, 6) for ax in panels}) == 1
    assert [ax.get_ylabel() != "" for ax in panels] == [True, False, False]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layers.png", "layers.svg"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y": "CE"}, r"the table has no column \['CE'\]; its columns are \['id', 'layer'"),
        ({"xlims": [None]}, r"xlims has 1 entries, expected one for each of xs=\['L0', 'alive'\]"),
        ({"facet_vals": []}, "nothing to draw: column 'layer' of the table has no values"),
    ],
)
def test_a_facet_that_cannot_be_drawn_says_why(runs: pd.DataFrame, changes: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        plot_facet(runs, **{**FACETS, **changes})
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ({2: {"local": "x"}}, {}, r"run 'x' \(local, layer 2\) is in 0 rows of the table, expected one"),
        ({2: {"e2e": "c"}}, {}, r"run_ids has no 'local' for layer 2, only \['e2e'\]"),
        ({2: {"local": "a"}}, {"horz_layout": True}, r"horz_layout is for SAE layers \[\[2, 6, 10\]\], not for \[2\]"),
        ({2: {"local": "a"}}, {"final_layer": 9}, r"the table has no column \['recon_loss_layer-9'\]"),
    ],
)
def test_a_per_layer_figure_that_cannot_be_drawn_says_why(
    runs: pd.DataFrame, ids: dict[int, dict[str, str]], options: dict[str, Any], words: str
):
    values: dict[str, Any] = {"metric": "recon_loss", "final_layer": 8, "run_types": ["local"], **options}
    with pytest.raises(UserError, match=words):
        plot_per_layer_metric(runs, ids, **values)
    assert plt.get_fignums() == []
