"""How well each later layer survives an SAE (arXiv 2405.12241, figs. 2, 6 and 12), of runs at equal CE increase.

Layers are counted at the residual stream before a block; the last one is the end of the stream. At the SAE's own layer
the SAE's output is compared with what it replaced, at later ones the spliced with the clean stream.

    mse                 (1 / (N d)) sum ||x - a||^2
    explained_var       the paper's: mean over tokens of 1 - ||x - a||^2 / ||a - mean(a)||^2, batch by batch;
                        at the SAE's own layer relative to its output, not to what it replaced
    explained_var_ln    the same, both sides layer-normed
    quality             1 - sum ||x - a||^2 / sum ||a - mean(a)||^2 over all tokens; a is clean
"""

from functools import partial
from typing import Any

from e2e_sae.analysis.item import Analysis, Figure, NotApplicable
from e2e_sae.analysis.lines import looks_of_types, make_logarithmic, panels_by, spans_decades
from e2e_sae.analysis.looks import grid, legend_below
from e2e_sae.analysis.matching import in_order, matched
from e2e_sae.analysis.performance import measured, place_cells
from e2e_sae.analysis.runs import layer_of
from e2e_sae.analysis.study import Study

MEASURES = {
    "mse": (
        "recon_loss",
        "MSE from the clean stream",
        "MSE from the clean stream at every later layer (figs. 2 and 6)",
    ),
    "explained_var": (
        "explained_var",
        "explained variance\n(paper's, mean over tokens)",
        "explained variance as the paper has it, at every later layer (fig. 12a)",
    ),
    "explained_var_ln": (
        "explained_var_ln",
        "explained variance\n(paper's, layer-normed)",
        "explained variance after layer norm as the paper has it, at every later layer (fig. 12b)",
    ),
    "quality": (
        "quality_explained_var",
        "explained variance\n(1 - FVU)",
        "explained variance as a ratio of sums, at every later layer",
    ),
}
"""Measure -> columns of the table of runs, the axis' label, and what its analysis is about."""
_KEYS = ["id", "model_name", "sae_pos", "layer", "architecture", "run_type", "kind", "L0", "CE_increase"]
_FLOOR = -1.0
"""Explained variances are not shown below it."""


def per_layer_table(study: Study, measure: str) -> Any:
    """Returns a row for each run and measured layer (`at_layer`); `own_layer` is the SAE's, if it is in the stream.

    Raises:
        NotApplicable: nothing was measured.
    """
    import pandas as pd

    stem = f"{MEASURES[measure][0]}_layer-"
    rows = [
        {**{key: run[key] for key in _KEYS}, "own_layer": layer_of(run["sae_pos"]), "at_layer": layer, measure: value}
        for run in matched(measured(study.table), "CE").to_dict("records")
        for layer, value in sorted((int(c.removeprefix(stem)), v) for c, v in run.items() if c.startswith(stem))
        if value == value
    ]
    if not rows:
        raise NotApplicable(f"it wants runs whose evaluation logged {measure} of the residual stream")
    return pd.DataFrame(rows)


def draw_per_layer(table: Any, measure: str) -> Any:
    """Draws a measure by layer, a panel for each position and architecture, a line for each type of run."""
    panels = panels_by(table, ["model_name", "sae_pos", "architecture"])
    figure, axes = grid(len(panels), 3, 3.9, 3.1)
    looks = looks_of_types(in_order(table["run_type"]))
    is_log = measure == "mse" and spans_decades([value for value in table[measure] if value > 0])
    for ax, (title, runs) in zip(axes, panels, strict=True):
        for kind, look in looks.items():
            points = runs[runs["run_type"] == kind].sort_values("at_layer")
            if len(points):
                ax.plot(points["at_layer"], points[measure], label=kind, markersize=5, linewidth=1.3, **look)
        ax.set(xlabel="layer", ylabel=MEASURES[measure][1], xticks=_ticks(runs["at_layer"]))
        if is_log:
            make_logarithmic(ax.yaxis)
        if measure != "mse":
            lowest = runs[measure].min()
            ax.set_ylim(max(_FLOOR, min(0.0, lowest - 0.05)), 1.03)
            if lowest < _FLOOR:
                ax.text(
                    0.98, 0.03, f"below {_FLOOR:g}: not shown", transform=ax.transAxes, ha="right", fontsize="small"
                )
        ax.set_title(title, fontsize="medium")
    legend_below(figure, axes)
    return figure


def per_layer_text(table: Any, measure: str) -> Any:
    """Returns for readers a measure at the SAE's own, at the next and at the last layer, a line for each run."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for _, of_run in table.groupby(["id", "sae_pos"], sort=False):
        first = of_run.iloc[0]
        values = of_run.set_index("at_layer")[measure]
        ends = {
            "at the SAE": first["own_layer"],
            "after its block": first["layer"] + 1,
            "at the end": values.index.max(),
        }
        cells = {where: float(values.get(layer, float("nan"))) for where, layer in ends.items()}
        place = {**place_cells(table, first), "type": first["run_type"], "CE increase": first["CE_increase"]}
        rows.append({**place, **cells})
    return pd.DataFrame(rows)


def _ticks(layers: Any) -> list[int]:
    low, high = int(layers.min()), int(layers.max())
    return list(range(low, high + 1, max(1, (high - low) // 8)))


ANALYSES = tuple(
    Analysis(
        f"per_layer_{measure}",
        about,
        partial(per_layer_table, measure=measure),
        [Figure(f"per_layer_{measure}", partial(draw_per_layer, measure=measure))],
        text=partial(per_layer_text, measure=measure),
    )
    for measure, (_, _, about) in MEASURES.items()
)
