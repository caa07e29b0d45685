"""Frontiers of runs that differ in one setting (arXiv 2405.12241, appendices E and F, figs. 13-18).

Runs that are compared agree in everything else that `matching.SETTINGS` names, in kind, place and seed, and each has
a twin with another value of the setting and the same sparsity coefficient (or k, or target). Where several such groups
vary the setting, each kind's largest is shown.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from e2e_sae.analysis.item import Analysis, Figure, NotApplicable
from e2e_sae.analysis.lines import draw_costs, looks_of_names, looks_of_numbers, panels_by
from e2e_sae.analysis.matching import PLACE, SETTINGS, frontier, main_runs
from e2e_sae.analysis.performance import COLUMNS, measured, place_cells
from e2e_sae.analysis.study import Study

LABELS = {
    "lr": "learning rate",
    "ratio": "dictionary size / input size",
    "n_samples": "training samples",
    "seed": "seed",
    "architecture": "architecture",
}
"""What is compared."""


def comparison_table(study: Study, setting: str) -> Any:
    """Returns the runs that differ in a setting and nothing else: a row for each run and position.

    Raises:
        NotApplicable: there are none.
    """
    import pandas as pd

    found: list[Any] = []
    table = measured(study.table)
    agreed = [name for name in (*SETTINGS, "seed") if name != setting]
    for _, runs in table.groupby([*PLACE, "kind"], sort=False, dropna=False):
        groups = [g for _, g in runs.fillna(dict.fromkeys(agreed, 0.0)).groupby(agreed) if g[setting].nunique() > 1]
        shared = [_with_twins(group, setting) for group in groups]
        if any(map(len, shared)):
            found.append(table.loc[max(shared, key=len).index])
    if not found:
        raise NotApplicable(f"it wants runs that differ in {setting} and agree in {', '.join(agreed)}")
    extra = [name for name in (setting,) if name not in COLUMNS]
    return pd.concat(found)[[*COLUMNS, *extra]].reset_index(drop=True)


def architecture_table(study: Study) -> Any:
    """Returns the runs of the frontiers, where there are several architectures.

    Raises:
        NotApplicable: there is one only.
    """
    table = main_runs(measured(study.table))
    if table["architecture"].nunique() < 2:
        raise NotApplicable("it wants runs of several architectures")
    return table[COLUMNS].reset_index(drop=True)


def draw_comparison(table: Any, setting: str) -> Any:
    """Draws CE increase against L0 and alive elements, a panel for each position and kind, a line for each value."""
    values = sorted(table[setting].unique())
    looks = looks_of_numbers(values) if setting in ("lr", "ratio", "n_samples") else looks_of_names(values)
    if setting == "architecture":
        panels = panels_by(table, [*PLACE, "run_type"])
    else:
        panels = panels_by(table, [*PLACE, "architecture", "run_type"])
    named = [(title, runs.assign(value=[_shown(value) for value in runs[setting]])) for title, runs in panels]
    return draw_costs(named, "value", {_shown(v): look for v, look in looks.items()}, legend_title=LABELS[setting])


def comparison_text(table: Any, setting: str) -> Any:
    """Returns for readers the CE increase of each value at the L0 in the middle of what all of them reach, read off
    their frontiers."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for _, runs in panels_by(
        table, [*PLACE, "architecture", "run_type"] if setting != "architecture" else [*PLACE, "run_type"]
    ):
        fronts = {value: frontier(own["L0"], own["CE_increase"]) for value, own in runs.groupby(setting)}
        at = common_middle([front.x for front in fronts.values()])
        for value, front in fronts.items():
            own = runs[runs[setting] == value]
            where = place_cells(table, runs.iloc[0])
            where.pop("architecture", None) if setting == "architecture" else None
            numbers = {"runs": len(own), "L0 from": own["L0"].min(), "L0 to": own["L0"].max()}
            read = {"at L0": at, "CE increase": float(front.ce_at(at))}
            rows.append({**where, "type": runs["run_type"].iloc[0], LABELS[setting]: _shown(value), **numbers, **read})
    return pd.DataFrame(rows)


def common_middle(ranges: Sequence[Any]) -> float:
    """Returns the middle of what all ranges (rising numbers) have in common; NaN if that is nothing."""
    low, high = max(values[0] for values in ranges), min(values[-1] for values in ranges)
    return float(np.mean([low, high])) if low <= high else float("nan")


def _with_twins(runs: Any, setting: str) -> Any:
    """Returns the runs whose sparsity has been tried with several values of the setting."""
    sparsity = runs.groupby(["sparsity_coeff", "target_l0", "k"], dropna=False)
    return runs[sparsity[setting].transform("nunique") > 1]


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if value < 1 else f"{value:,.15g}"


def _comparison(setting: str, figures: str) -> Analysis:
    name = f"{setting}_comparison"
    return Analysis(
        name,
        f"CE increase against L0 and alive elements, by {LABELS[setting]} ({figures})",
        architecture_table if setting == "architecture" else partial(comparison_table, setting=setting),
        [Figure(name, partial(draw_comparison, setting=setting))],
        text=partial(comparison_text, setting=setting),
        decimals={"L0 from": 1, "L0 to": 1, "at L0": 1, "CE increase": 3},
    )


ANALYSES = (
    _comparison("architecture", "not in the paper"),
    _comparison("lr", "figs. 13-15"),
    _comparison("ratio", "fig. 16"),
    _comparison("n_samples", "fig. 17"),
    _comparison("seed", "fig. 18"),
)
