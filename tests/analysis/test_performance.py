"""Analyses of the table of runs: what they show, what they want, and that every figure can be drawn from its CSV."""

import io
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from e2e_sae.analysis import comparisons, per_layer, performance, training_costs
from e2e_sae.analysis.item import Analysis, NotApplicable
from e2e_sae.analysis.study import Study
from tests.analysis.run_tables import NAN, runs, table_of

LOCAL = [(10.0, 1.0), (20.0, 0.5), (40.0, 0.25)]
ALL = {
    analysis.name: analysis
    for module in (performance, comparisons, per_layer, training_costs)
    for analysis in module.ANALYSES
}


def study_of(*rows: list[dict[str, Any]]) -> Study:
    return Study(table_of(*rows), Path("nowhere"))


def times(points: list[tuple[float, float]], share: float) -> list[tuple[float, float]]:
    return [(x, share * y) for x, y in points]


def everything() -> Study:
    """Returns runs of two architectures at two layers that vary in everything."""
    rows: list[list[dict[str, Any]]] = []
    for layer, architecture, factor in ((2, "relu", 1.0), (2, "topk", 0.5), (10, "relu", 0.5)):
        place = {"sae_pos": f"blocks.{layer}.hook_resid_pre", "layer": layer}
        for run_type, share in (("local", 1.0), ("e2e", 0.4)):
            more = {f"recon_loss_layer-{i}": share * i for i in range(layer, 12)}
            more |= {f"explained_var_layer-{i}": 1 - 3 * share / (i - layer + 1) for i in range(layer, 12)}
            more |= {f"explained_var_ln_layer-{i}": 0.5 for i in range(layer, 12)}
            more |= {f"quality_explained_var_layer-{i}": 0.5 for i in range(layer, 12)}
            points = times(LOCAL, factor * share)
            rows.append(runs(run_type, points, architecture, seconds=7200 * share, members=1, **place, **more))
    rows += [runs("local", times(LOCAL, 1.2), lr=lr) for lr in (1e-2, 1e-4)]
    rows += [
        runs("e2e", times(LOCAL, 0.5), seed=1),
        runs("local", LOCAL, ratio=5.0),
        runs("local", LOCAL, n_samples=50.0),
    ]
    return study_of(*rows)


def drawn(figure: Any) -> set[str]:
    """Returns every text that stands in a figure."""
    from matplotlib.text import Text

    return {text.get_text() for text in figure.findobj(Text)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ALL)
def test_every_analysis_is_shown_from_its_saved_table_alone(name: str) -> None:
    import matplotlib.pyplot as plt

    analysis = ALL[name]
    table = analysis.compute(everything())
    saved = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    if analysis.text is not None:
        assert not analysis.text(table).empty
        assert analysis.text(saved).astype(str).equals(analysis.text(table).astype(str))
    for figure in analysis.figures:
        shown = figure.draw(saved)
        shown.canvas.draw()
        assert {"local", "e2e"} & drawn(shown) or name.endswith("comparison")
        assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_title() for ax in shown.axes)
        assert shown.legends
        plt.close(shown)


def test_the_pareto_figure_shows_each_run_and_falls_upwards() -> None:
    table = performance.pareto_table(study_of(runs("local", LOCAL), runs("e2e", times(LOCAL, 0.01))))
    axes = performance.draw_pareto(table).axes
    local, e2e = axes[0].lines
    assert list(zip(*local.get_data(), strict=True)) == LOCAL
    assert (local.get_label(), e2e.get_label()) == ("local", "e2e")
    assert [x for x, _ in LOCAL] == [x / 10 for x in axes[1].lines[0].get_xdata()]
    low, high = axes[0].get_ylim()
    assert low > high
    assert axes[0].get_yscale() == "log"  # 1 is more than 30 times 0.0025
    assert {"L0 (active latents per token)", "alive dictionary elements"} <= drawn(axes[0].figure)


def test_runs_without_an_evaluation_say_what_is_missing() -> None:
    study = study_of(runs("local", [(NAN, NAN)]), runs("e2e", [(10.0, NAN)]))
    for name, analysis in ALL.items():
        words = "training time" if name == "training_time" else "it wants runs that were evaluated"
        with pytest.raises(NotApplicable, match=words):
            analysis.compute(study)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("frontier_summary", "it wants local runs and others of one architecture whose L0 overlap"),
        ("matched_ce", "it wants runs of two kinds at one position"),
        ("architecture_comparison", "it wants runs of several architectures"),
        ("lr_comparison", "it wants runs that differ in lr and agree in ratio, n_samples, .*, seed"),
        ("seed_comparison", "it wants runs that differ in seed and agree in lr, ratio, n_samples"),
        ("per_layer_mse", "it wants runs whose evaluation logged mse of the residual stream"),
        ("training_time", "it wants runs whose training time is known"),
    ],
)
def test_what_the_runs_do_not_have_is_left_out_with_a_reason(name: str, words: str) -> None:
    with pytest.raises(NotApplicable, match=words):
        ALL[name].compute(study_of(runs("local", LOCAL)))
    with pytest.raises(NotApplicable, match="it wants runs that logged grad_norm"):
        ALL["grad_norms"].compute(study_of(runs("local", LOCAL, mean_grad_norm=NAN)))


def test_the_summary_for_readers_has_a_line_for_each_type() -> None:
    study = study_of(
        runs("local", LOCAL),
        runs("e2e", times(LOCAL, 0.4)),
        runs("local", LOCAL, seed=1),
        runs("e2e", times(LOCAL, 0.44), seed=1),
    )
    (row,) = performance.frontier_text(performance.frontier_table(study)).to_dict("records")
    assert row["type"] == "e2e"
    assert row["of local's CE increase at same L0"] == row["of local's CE increase at same alive"] == "0.42 ± 0.03"
    assert (row["L0 range"], row["alive range"], row["seeds"]) == ("10–40", "100–400", 2)


def test_matched_runs_are_shown_as_in_the_papers_tables() -> None:
    study = study_of(runs("local", LOCAL), runs("e2e", LOCAL, k=32.0), runs("e2e+ds", LOCAL, target_l0=20.0))
    shown = performance.matched_text(ALL["matched_l0"].compute(study))
    assert shown["sparsity"].tolist() == ["λ = 2", "k = 32", "L0 -> 20"]
    assert shown["L0"].tolist() == [20.0] * 3
    assert list(shown) == ["SAE at", "type", "sparsity", "L0", "alive", "grad norm", "CE increase"]


def test_a_comparison_has_runs_that_differ_in_one_setting_and_have_twins() -> None:
    study = study_of(
        runs("local", LOCAL),
        runs("local", LOCAL[:2], lr=1e-2),  # no twin at the third coefficient
        runs("local", LOCAL, lr=1e-4, seed=1),  # another seed
        runs("e2e", LOCAL),  # one value only
        runs("e2e", LOCAL, lr=1e-4, ratio=5.0),  # differs in two
    )
    table = ALL["lr_comparison"].compute(study)
    assert set(table["kind"]) == {"local"}
    assert sorted(zip(table["lr"], table["sparsity_coeff"], strict=True)) == [
        (1e-3, 1.0),
        (1e-3, 2.0),
        (1e-2, 1.0),
        (1e-2, 2.0),
    ]


def test_a_comparison_reads_frontiers_off_in_the_middle_of_what_all_reach() -> None:
    study = study_of(runs("local", LOCAL), runs("local", [(12.0, 0.9), (22.0, 0.4), (30.0, 0.3)], lr=1e-2))
    text = ALL["lr_comparison"].text
    assert text is not None
    rows = text(ALL["lr_comparison"].compute(study)).to_dict("records")
    assert [row["learning rate"] for row in rows] == ["0.001", "0.01"]
    assert [row["at L0"] for row in rows] == [21.0, 21.0]  # 12 to 30
    assert rows[0]["CE increase"] == pytest.approx(0.5 - 0.25 / 20)
    assert rows[1]["CE increase"] == pytest.approx(0.9 - 0.5 * 9 / 10)


def test_gradient_norms_are_correlated_by_rank() -> None:
    ups = [{**row, "mean_grad_norm": norm} for row, norm in zip(runs("local", LOCAL), (1.0, 10.0, 100.0), strict=True)]
    downs = [{**row, "mean_grad_norm": norm} for row, norm in zip(runs("e2e", LOCAL), (3.0, 2.0, 1.0), strict=True)]
    shown = training_costs.grad_norm_text(ALL["grad_norms"].compute(study_of(ups, downs)))
    assert shown["rank correlation with alive"].tolist() == pytest.approx([1.0, -1.0])
    assert shown["mean grad norm"].tolist() == pytest.approx([37.0, 2.0])


def test_frontiers_are_read_off_at_levels_that_most_kinds_reach() -> None:
    e2e = [(5.0, 0.8), (15.0, 0.3), (30.0, 0.2)]
    table = ALL["interpolated"].compute(
        study_of(runs("local", LOCAL), runs("local", times(LOCAL, 1.2), seed=1), runs("e2e", e2e))
    )
    local, other = table.to_dict("records")
    # L0: 10, 15, 20 and 30 lie within both, CE increases: 0.25 to 0.8; the middle ones.
    assert (local["at_L0"], local["at_CE_increase"]) == (15.0, 0.5)
    assert local["CE_increase"] == pytest.approx((0.75 + 1.2 * 0.75) / 2)
    assert local["CE_increase_spread"] == pytest.approx(0.15 / math.sqrt(2))
    assert local["L0"] == pytest.approx((20.0 + 20.0 + 20.0 * (0.6 - 0.5) / 0.3) / 2)
    assert (other["CE_increase"], other["L0"]) == pytest.approx((0.3, 5.0 + 10.0 * 0.3 / 0.5))
    assert (local["seeds"], other["seeds"]) == (2, 1)
    shown = performance.interpolated_text(table).to_dict("records")
    assert shown[0]["CE increase"] == "0.825 ± 0.106"
    assert shown[1]["L0"] == "11.0"
    with pytest.raises(NotApplicable, match="two kinds at one position, with several sparsities each"):
        ALL["interpolated"].compute(study_of(runs("local", LOCAL)))


def timed(run_type: str, seconds: list[float], members: float = NAN) -> list[dict[str, Any]]:
    rows = runs(run_type, [(10.0 + i, 1.0) for i in range(len(seconds))], members=members)
    return [{**row, "seconds": s} for row, s in zip(rows, seconds, strict=True)]


def test_the_time_of_several_kinds_trained_together_is_none_of_theirs() -> None:
    together = [*timed("local", [70], members=2), *timed("e2e", [70], members=2)]
    table = ALL["training_time"].compute(study_of(together, timed("e2e", [50, 50], members=3)))
    assert table[["run_type", "seconds", "runs"]].to_numpy().tolist() == [["e2e", 50, 2]]
    with pytest.raises(NotApplicable, match="not trained together with others of another kind"):
        ALL["training_time"].compute(study_of(together))


def test_training_times_are_medians_beside_those_of_local_runs_trained_alike() -> None:
    study = study_of(timed("local", [100, 200, 900]), timed("e2e", [500]), timed("e2e", [50], members=4))
    table = ALL["training_time"].compute(study).set_index(["run_type", "members"])
    assert table.loc[("local", 1), "seconds"] == 200
    assert table.loc[("e2e", 1), "of_local"] == pytest.approx(2.5)
    assert table.loc[("local", 1), "seconds_per_mtoken"] == pytest.approx(200 / 0.004)
    assert math.isnan(table.loc[("e2e", 4), "of_local"])
    shown = training_costs.training_time_text(table.reset_index())
    assert shown["time"].tolist() == ["3m20", "8m20", "0m50"]


def test_the_layers_of_matched_runs_are_drawn_from_the_saes_own_on() -> None:
    layers: dict[str, Any] = {
        "recon_loss_layer-2": 1.0,
        "recon_loss_layer-11": 3.0,
        "recon_loss_layer-3": 2.0,
        "recon_loss_layer-4": NAN,
    }
    study = study_of(runs("local", LOCAL[:1], **layers), runs("e2e", LOCAL[:1], **layers))
    table = ALL["per_layer_mse"].compute(study)
    of_run = [[2, 1.0], [3, 2.0], [11, 3.0]]
    assert table[["at_layer", "mse"]].values.tolist() == of_run * 2
    assert table["run_type"].tolist() == ["local"] * 3 + ["e2e"] * 3
    (ax,) = per_layer.draw_per_layer(table, "mse").axes
    assert [list(map(list, zip(*line.get_data(), strict=True))) for line in ax.lines] == [of_run] * 2
    (first, _) = per_layer.per_layer_text(table, "mse").to_dict("records")
    assert (first["at the SAE"], first["after its block"], first["at the end"]) == (1.0, 2.0, 3.0)


def test_each_analysis_has_a_name_of_its_own_and_a_script(repo: Path) -> None:
    assert len(ALL) == sum(len(m.ANALYSES) for m in (performance, comparisons, per_layer, training_costs))
    for name, analysis in ALL.items():
        assert isinstance(analysis, Analysis)
        script = (repo / "e2e_sae" / "scripts" / "analysis" / f"{name}.py").read_text()
        assert f'main("{name}")' in script
