"""Gradient norms beside what came of the runs (arXiv 2405.12241, appendix C), and how long training took (table 6)."""

from typing import Any

from e2e_sae.analysis.item import Analysis, Figure, NotApplicable
from e2e_sae.analysis.lines import (
    LABELS,
    in_thousands,
    looks_of_types,
    make_logarithmic,
    panels_by,
    spans_decades,
)
from e2e_sae.analysis.looks import grid, legend_below
from e2e_sae.analysis.matching import PLACE, REFERENCE, in_order, in_papers_order, main_runs
from e2e_sae.analysis.performance import COLUMNS, measured, place_cells
from e2e_sae.analysis.study import Study
from e2e_sae.log import logger


def grad_norm_table(study: Study) -> Any:
    """Returns the runs of the frontiers that have a mean gradient norm: a row for each run and position.

    Raises:
        NotApplicable: none has one.
    """
    table = main_runs(measured(study.table)).dropna(subset=["mean_grad_norm"])
    if table.empty:
        raise NotApplicable("it wants runs that logged grad_norm (max_grad_norm in their config)")
    return table[COLUMNS].reset_index(drop=True)


def draw_grad_norms(table: Any) -> Any:
    """Draws alive elements and CE increase against the gradient norm, a panel for each position and architecture."""
    panels = panels_by(table, ["model_name", "sae_pos", "architecture"])
    figure, axes = grid(2 * len(panels), 2 if len(panels) <= 4 else 4, 3.9, 3.1)
    looks = looks_of_types(in_order(table["run_type"]))
    for n, (title, runs) in enumerate(panels):
        for ax, y in zip(axes[2 * n : 2 * n + 2], ("alive_dict_elements", "CE_increase"), strict=True):
            for kind, look in looks.items():
                own = runs[runs["run_type"] == kind]
                if len(own):
                    ax.plot(own["mean_grad_norm"], own[y], label=kind, linestyle="none", markersize=5, **look)
            ax.set(xlabel=LABELS["mean_grad_norm"], ylabel=LABELS[y])
            make_logarithmic(ax.xaxis)
            if spans_decades(table[y]):
                make_logarithmic(ax.yaxis)
            elif y == "alive_dict_elements":
                in_thousands(ax.yaxis)
            ax.set_title(title, fontsize="medium")
    legend_below(figure, axes)
    return figure


def grad_norm_text(table: Any) -> Any:
    """Returns for readers, by position and type, the gradient norms, and how they go with the number of alive elements
    (Spearman's rank correlation over the runs)."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for _, runs in panels_by(table, [*PLACE, "architecture", "run_type"]):
        ranks = runs[["mean_grad_norm", "alive_dict_elements"]].rank()
        varies = len(runs) > 2 and (ranks.nunique() > 1).all()
        rows.append(
            {
                **place_cells(table, runs.iloc[0]),
                "type": runs["run_type"].iloc[0],
                "runs": len(runs),
                "mean grad norm": runs["mean_grad_norm"].mean(),
                "rank correlation with alive": ranks.corr().iloc[0, 1] if varies else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def training_time_table(study: Study) -> Any:
    """Returns the training time by position and kind: a row for each, and for each number of runs trained together.

    `seconds` and `seconds_per_mtoken` (a million tokens) are medians over runs, of all runs that were trained together
    in one; `of_local`: times that of local SAEs of the same position, architecture and number. Runs that were trained
    together with another kind or position have no time of their own: they are left out.

    Raises:
        NotApplicable: no run has a time.
    """
    import pandas as pd

    table = study.table.dropna(subset=["seconds"]).drop_duplicates("id")
    if table.empty:
        raise NotApplicable("it wants runs whose training time is known (timing.json in their folders, or W&B's)")
    table = _timed_alone(table.assign(members=table["members"].fillna(1)))
    if table.empty:
        raise NotApplicable("it wants runs that were not trained together with others of another kind or position")
    table = table.assign(per_mtoken=1e6 * table["seconds"] / table["n_tokens"])
    rows: list[dict[str, Any]] = []
    keys = [*PLACE, "layer", "architecture", "run_type", "members"]
    for key, runs in table.groupby(keys, sort=False, dropna=False):
        row = dict(zip(keys, key, strict=True))
        medians = {"seconds": runs["seconds"].median(), "seconds_per_mtoken": runs["per_mtoken"].median()}
        rows.append({**row, "runs": len(runs), "n_tokens": runs["n_tokens"].median(), **medians})
    found = pd.DataFrame(rows)
    shared = [*PLACE, "architecture", "members"]
    local = found[found["run_type"] == REFERENCE].set_index(shared)["seconds_per_mtoken"].to_dict()
    own = found[shared].itertuples(index=False, name=None)
    references = [local.get(key, float("nan")) for key in own]
    found["of_local"] = found["seconds_per_mtoken"] / references
    return in_papers_order(found).reset_index(drop=True)


def _timed_alone(table: Any) -> Any:
    """Returns the runs whose time is that of one kind at one position; what trained together has one and the same."""
    together = table[table["members"] > 1].groupby(["seconds", "members"])
    kinds = {key: len(runs[[*PLACE, "kind"]].drop_duplicates()) for key, runs in together}
    own = [kinds.get(key, 1) == 1 for key in zip(table["seconds"], table["members"], strict=True)]
    if not all(own):
        logger.info(f"note: {own.count(False)} runs were trained together with other kinds: their times are left out")
    return table[own]


def training_time_text(table: Any) -> Any:
    """Returns the training times as readers see them."""
    import pandas as pd

    several = table["members"].max() > 1
    rows = [
        {
            **place_cells(table, row),
            "type": row["run_type"],
            **({"trained together": int(row["members"])} if several else {}),
            "runs": row["runs"],
            "million tokens": row["n_tokens"] / 1e6,
            "time": clock(row["seconds"]),
            "tokens/s": 1e6 / row["seconds_per_mtoken"],
            "times local": row["of_local"],
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows)


def clock(seconds: int | float) -> str:
    """Returns a time as hours and minutes, or minutes and seconds.

    >>> clock(13500), clock(135)
    ('3h45', '2m15')
    """
    minutes = round(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if seconds >= 3600 else f"{int(seconds) // 60}m{int(seconds) % 60:02d}"


ANALYSES = (
    Analysis(
        "grad_norms",
        "gradient norms beside alive elements and CE increase (appendix C)",
        grad_norm_table,
        [Figure("grad_norms", draw_grad_norms)],
        text=grad_norm_text,
        decimals={"rank correlation with alive": 2},
    ),
    Analysis(
        "training_time",
        "how long runs took, by type (table 6)",
        training_time_table,
        text=training_time_text,
        decimals={"million tokens": 1, "tokens/s": 0, "times local": 1},
    ),
)
