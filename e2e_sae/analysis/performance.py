"""What SAEs cost against how sparse they are: the paper's main result (arXiv 2405.12241, figs. 1, 4, 5, tables 1-3)."""

from functools import partial
from typing import Any

from e2e_sae.analysis.item import Analysis, Figure, NotApplicable
from e2e_sae.analysis.lines import draw_costs, looks_of_types, panels_by
from e2e_sae.analysis.matching import (
    PLACE,
    SETTINGS,
    L0_at_equal_CE,
    Measure,
    at_equal_L0,
    common_level,
    in_order,
    in_papers_order,
    main_runs,
    matched,
    summary_numbers,
)
from e2e_sae.analysis.study import Study
from e2e_sae.log import logger

COLUMNS = [
    *("id", "model_name", "sae_pos", "layer", "architecture", "run_type", "kind", "seed"),
    *("sparsity_coeff", "target_l0", "k", "L0", "alive_dict_elements", "mean_grad_norm", "CE_increase"),
]
"""Of the table of runs, what these analyses show."""


def pareto_table(study: Study) -> Any:
    """Returns the runs of the frontiers: a row for each run and position.

    Raises:
        NotApplicable: none has a CE increase.
    """
    runs = measured(study.table)
    table = main_runs(runs)
    if len(table) < len(runs):
        logger.info(
            f"note: {len(runs) - len(table)} of {len(runs)} runs are in the comparisons only: they differ from most of "
            f"their kind in one of {', '.join(SETTINGS)}"
        )
    return table[COLUMNS].reset_index(drop=True)


def draw_pareto(table: Any) -> Any:
    """Draws CE increase against L0 and alive elements, a panel for each position and architecture."""
    panels = panels_by(table, ["model_name", "sae_pos", "architecture"])
    return draw_costs(panels, "run_type", looks_of_types(in_order(table["run_type"])))


def frontier_table(study: Study) -> Any:
    """Returns the summary numbers.

    Raises:
        NotApplicable: there are no local runs beside others of an architecture, or they have nothing in common.
    """
    table = summary_numbers(measured(study.table))
    if table.empty:
        raise NotApplicable("it wants local runs and others of one architecture whose L0 overlap")
    return table


def frontier_text(table: Any) -> Any:
    """Returns the summary numbers as readers see them, a line for each type: shares of what local SAEs have."""
    import pandas as pd

    rows: dict[Any, dict[str, Any]] = {}
    for row in table.to_dict("records"):
        key = tuple(row[name] for name in ("model_name", "sae_pos", "architecture", "run_type"))
        cells = rows.setdefault(key, {**place_cells(table, row), "type": row["run_type"]})
        what = "L0" if row["x"] == "L0" else "alive"
        cells[f"of local's CE increase at same {what}"] = _with_spread(row["share"], row["spread"])
        cells[f"{what} range"] = f"{row['from']:.0f}–{row['to']:.0f}"
        cells[f"of local's {what} at same CE increase"] = row["x_share"]
        if table["seeds"].max() > 1:
            cells["seeds"] = max(row["seeds"], cells.pop("seeds", 0))
    return pd.DataFrame(rows.values())


def matched_table(study: Study, by: Measure) -> Any:
    """Returns the runs that are equal in a measure; see `matching.matched`.

    Raises:
        NotApplicable: there are no two kinds that are.
    """
    table = matched(measured(study.table), by)
    if table["kind"].nunique() < 2:
        raise NotApplicable(f"it wants runs of two kinds at one position whose {by} can be equal")
    return table[[*COLUMNS, "target", "distance"]]


def matched_text(table: Any) -> Any:
    """Returns matched runs as the paper's tables 2 and 3 show them."""
    import pandas as pd

    rows = [
        {
            **place_cells(table, row),
            "type": row["run_type"],
            "sparsity": sparsity_text(row),
            "L0": row["L0"],
            "alive": row["alive_dict_elements"],
            "grad norm": row["mean_grad_norm"],
            "CE increase": row["CE_increase"],
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows)


def measured(table: Any) -> Any:
    """Returns the runs that have an L0 and a CE increase.

    Raises:
        NotApplicable: none has.
    """
    found = table.dropna(subset=["L0", "CE_increase"])
    if found.empty:
        raise NotApplicable(
            "it wants runs that were evaluated (eval_every_n_samples and eval_data, or train_data.holdout_fraction)"
        )
    return found


def place_cells(table: Any, row: Any) -> dict[str, Any]:
    """Returns the cells that say where SAEs are, without what is the same in the whole table."""
    names = {"model_name": "model", "sae_pos": "SAE at", "architecture": "architecture"}
    return {names[c]: row[c] for c in names if c == "sae_pos" or table[c].nunique() > 1}


def sparsity_text(row: Any) -> str:
    """Returns the setting that makes a run's SAEs sparse."""
    if row["k"] == row["k"]:
        return f"k = {row['k']:g}"
    if row["target_l0"] == row["target_l0"]:
        return f"L0 -> {row['target_l0']:g}"
    return f"λ = {row['sparsity_coeff']:g}"


def _with_spread(mean: float, spread: float, decimals: int = 2) -> str | None:
    if mean != mean:
        return None
    return f"{mean:.{decimals}f}" if spread != spread else f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


def interpolated_table(study: Study) -> Any:
    """Returns a row for each kind and position: its CE increase at an L0, and its L0 at a CE increase, both read off
    the frontiers of each seed (`matching.frontier`); NaN beyond them.

    Levels (`at_L0`, `at_CE_increase`) are those of `matching.common_level`. `CE_increase` and `L0`: means over seeds;
    `..._spread`: their standard deviations, NaN for one seed; `seeds`: how many reach the L0.

    Raises:
        NotApplicable: there are no two kinds at one position, or none has runs on both sides of a level.
    """
    import pandas as pd

    rows: list[Any] = []
    for key, runs in main_runs(measured(study.table)).groupby(PLACE, sort=False, dropna=False):
        if runs["kind"].nunique() < 2:
            continue
        at = {name: common_level(runs, name) for name in ("L0", "CE_increase")}
        columns = {"CE_increase": at_equal_L0(runs, [at["L0"]]), "L0": L0_at_equal_CE(runs, [at["CE_increase"]])}
        kinds = runs.drop_duplicates("kind").set_index("kind")[["layer", "architecture", "run_type"]]
        found = kinds.assign(
            **dict(zip(PLACE, key, strict=True)), **{f"at_{name}": level for name, level in at.items()}
        )
        for name, read in columns.items():
            by_kind = read.groupby("kind")[name]
            found[name], found[f"{name}_spread"] = by_kind.mean(), by_kind.std()
        found["seeds"] = columns["CE_increase"].groupby("kind")["CE_increase"].count()
        rows.append(found.dropna(subset=list(columns), how="all").reset_index())
    rows = [found for found in rows if len(found) > 1]
    if not rows:
        raise NotApplicable("it wants runs of two kinds at one position, with several sparsities each")
    return in_papers_order(pd.concat(rows, ignore_index=True)).reset_index(drop=True)


def interpolated_text(table: Any) -> Any:
    """Returns what was read off the frontiers as readers see it."""
    import pandas as pd

    rows = [
        {
            **place_cells(table, row),
            "type": row["run_type"],
            "at L0": row["at_L0"],
            "CE increase": _with_spread(row["CE_increase"], row["CE_increase_spread"], 3),
            "at CE increase": row["at_CE_increase"],
            "L0": _with_spread(row["L0"], row["L0_spread"], 1),
            "seeds": row["seeds"],
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows)


_TABLES: dict[Measure, tuple[str, str]] = {
    "CE": ("matched_ce", "runs of each kind with the same CE increase (tables 1 and 2)"),
    "L0": ("matched_l0", "runs of each kind with the same L0 (table 3)"),
    "alive": ("matched_alive", "runs of each kind with as many alive elements"),
}
_DECIMALS = {"L0": 1, "alive": 0, "grad norm": 2, "CE increase": 3}

ANALYSES = (
    Analysis(
        "pareto",
        "CE increase against L0 and alive elements (figs. 1, 4 and 5)",
        pareto_table,
        [Figure("pareto", draw_pareto)],
    ),
    Analysis(
        "frontier_summary",
        "share of local SAEs' CE increase at the same L0 and alive elements (section 3.1)",
        frontier_table,
        text=frontier_text,
        decimals=dict.fromkeys((f"of local's {what} at same CE increase" for what in ("L0", "alive")), 2),
    ),
    Analysis(
        "interpolated",
        "CE increase of each kind at the same L0, and L0 at the same CE increase, read off the frontiers",
        interpolated_table,
        text=interpolated_text,
        decimals={"at L0": 1, "seeds": 0},
    ),
    *(
        Analysis(name, about, partial(matched_table, by=by), text=matched_text, decimals=_DECIMALS)
        for by, (name, about) in _TABLES.items()
    ),
)
