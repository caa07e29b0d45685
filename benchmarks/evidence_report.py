"""`python -m benchmarks.evidence_report RUNS...`: figures and tables from the finished runs of `benchmarks.evidence`.

evidence.csv         a row for each run
grid.png, grid.md    every architecture in every recipe, runs of the first seed and of equal length
seeds.md             recipes of which there are several seeds: mean and standard deviation
lengths.png, .md     recipes of which there are several lengths: against tokens and against seconds
"""

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import BY_K, BY_PENALTY, START
from e2e_sae.analysis.lines import LABELS, looks_of_names
from e2e_sae.analysis.looks import LINES, grid, legend_below
from e2e_sae.analysis.produce import save_figure, write_table
from e2e_sae.analysis.runs import runs_table
from e2e_sae.analysis.texts import as_markdown
from e2e_sae.checkpoint.files import write_text
from e2e_sae.log import log_to_console
from e2e_sae.run_types import COLOURS, MORE_COLOURS
from e2e_sae.scripts.exit_codes import run_command

RECIPES = {
    "local": "local",
    "e2e": "e2e",
    "e2e+ds": "e2e+ds",
    "e2e+local": "KL + MSE",
    "local then e2e+local": "local then KL",
}
"""Types of run -> recipes of `benchmarks.evidence`."""
ARCHITECTURES = (*BY_PENALTY, *BY_K)
MEASURES = ["L0", "alive_dict_elements", "CE_increase", "kl", "quality_explained_var", "last_explained_var"]
"""Columns of what came of a run. `last_explained_var`: of the last block's output."""
SETTINGS = ["model_name", "recipe", "architecture", "l0_wanted", "seed", "n_tokens", "seconds", "members"]


def evidence_table(sources: Sequence[Path]) -> Any:
    """Returns the pandas table of the finished runs: `SETTINGS`, `MEASURES`."""
    table = runs_table([str(source) for source in sources])
    layers = sorted(int(c.rpartition("-")[2]) for c in table if c.startswith("quality_explained_var_layer-"))
    last = [f"quality_explained_var_layer-{i}" for i in layers]
    table = table.assign(
        recipe=table["run_type"].map(RECIPES),
        l0_wanted=table["k"].fillna(table["target_l0"]),
        last_explained_var=table[last].ffill(axis=1).iloc[:, -1],
    )
    return table[[*SETTINGS, *MEASURES]].sort_values([*SETTINGS], ignore_index=True)


def of_grid(table: Any) -> Any:
    """Returns the runs of the grid: those of the first seed, each once."""
    first = table[table["seed"] == table["seed"].min()]
    return first.drop_duplicates(["recipe", "architecture", "l0_wanted"])


def draw_grid(table: Any) -> Any:
    """Draws the CE increase against L0 (above) and alive latents, a column for each recipe."""
    names = [name for name in START if (table["recipe"] == name).any()]
    kinds = [kind for kind in ARCHITECTURES if (table["architecture"] == kind).any()]
    palette = [*COLOURS.values(), *MORE_COLOURS, "black"]
    figure, axes = grid(2 * len(names), len(names), 3.3, 3.3, sharey=True)
    for n, recipe in enumerate(names):
        for i, kind in enumerate(kinds):
            own = table[(table["recipe"] == recipe) & (table["architecture"] == kind)].sort_values("L0")
            for ax, x in ((axes[n], "L0"), (axes[n + len(names)], "alive_dict_elements")):
                style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "color": palette[i]}
                ax.plot(own[x], own["CE_increase"], label=kind, linestyle=LINES[kind in BY_K], **style)
                ax.set(xlabel=LABELS[x], yscale="log")
        axes[n].set_title(recipe)
    for ax in (axes[0], axes[len(names)]):
        ax.set_ylabel(LABELS["CE_increase"])
    legend_below(figure, axes)
    return figure


def grid_text(table: Any) -> Any:
    """Returns the CE increases, with the L0 reached in brackets: a row for each architecture, a column for each
    recipe."""
    import pandas as pd

    names = [name for name in START if (table["recipe"] == name).any()]
    rows: list[dict[str, str]] = []
    for kind in ARCHITECTURES:
        own = table[table["architecture"] == kind].sort_values("l0_wanted")
        cells = {
            name: ", ".join(f"{run.CE_increase:.3f} ({run.L0:.0f})" for run in own[own["recipe"] == name].itertuples())
            for name in names
        }
        if any(cells.values()):
            rows.append({"architecture": kind, **cells})
    return pd.DataFrame(rows)


def seeds_text(table: Any) -> Any:
    """Returns mean and standard deviation over seeds, a row for each recipe and architecture with several."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for (recipe, kind, wanted, _), runs in table.groupby(["recipe", "architecture", "l0_wanted", "n_tokens"]):
        if runs["seed"].nunique() > 1:
            cells = {name: _spread(runs[column], digits) for name, (column, digits) in _SHOWN.items()}
            row = {"architecture": kind, "recipe": recipe, "L0 asked": int(wanted), "seeds": len(runs), **cells}
            rows.append({"order": runs["CE_increase"].mean(), **row})
    return pd.DataFrame(rows).sort_values("order").drop(columns="order") if rows else None


_SHOWN = {
    "L0": ("L0", 1),
    "CE increase": ("CE_increase", 3),
    "alive": ("alive_dict_elements", 0),
    "explained variance at the SAE": ("quality_explained_var", 2),
    "after the last block": ("last_explained_var", 2),
}


def _spread(values: Any, digits: int) -> str:
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def of_lengths(table: Any) -> Any:
    """Returns the runs of the first seed, of recipes of which there are several lengths at one L0, with `name`; with
    `seconds` where a run of their recipe was trained alone: a token costs what it cost there; and with `on_target`:
    whether they reached the L0 asked for."""
    named = table.assign(
        name=table["architecture"] + ", " + table["recipe"], per_token=table["seconds"] / table["n_tokens"]
    )
    costs = named[named["members"] == 1].groupby("name")["per_token"].median()
    runs = named[named["seed"] == named["seed"].min()].sort_values("members", kind="stable", na_position="first")
    runs = runs.drop_duplicates(["name", "l0_wanted", "n_tokens"])
    several = runs.groupby(["name", "l0_wanted"])["n_tokens"].transform("nunique") > 1
    missed = (runs["L0"] / runs["l0_wanted"] - 1).abs() > TOLERANCE
    runs = runs.assign(seconds=runs["n_tokens"] * runs["name"].map(costs), on_target=~missed)
    return runs[several].sort_values(["name", "n_tokens"], ignore_index=True)


def draw_lengths(table: Any) -> Any:
    """Draws the CE increase against tokens and against seconds of training, a line for each recipe, of the runs that
    reached the L0 asked for."""
    from matplotlib.ticker import LogLocator, NullFormatter

    table = table[table["on_target"]].assign(thousands=table["n_tokens"] / 1e3)
    figure, axes = grid(2, 2, 5.0, 4.0, sharey=True)
    for name, look in looks_of_names(list(dict.fromkeys(table["name"]))).items():
        own = table[table["name"] == name]
        for ax, x in zip(axes, ("thousands", "seconds"), strict=True):
            ax.plot(own[x], own["CE_increase"], label=name, markersize=4, **look)
    for ax, label in zip(axes, ("training tokens (thousands)", "seconds of training"), strict=True):
        ax.set(xlabel=label, xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel(LABELS["CE_increase"])
    legend_below(figure, axes)
    return figure


def lengths_text(table: Any) -> Any:
    """Returns a row for each recipe: what a token costs, the CE increase at each length, and what share of the longest
    `REFERENCE` run's tokens and seconds it needs for the same CE increase (`reach`, over the runs on target)."""
    import pandas as pd

    reference = table[table["name"] == REFERENCE].sort_values("n_tokens").iloc[-1]
    rows: list[dict[str, Any]] = []
    for name, runs in table.groupby("name"):
        on_target = runs[runs["on_target"]]
        at = {f"{run.n_tokens / 1e3:,.0f}k tokens": _with_l0(run) for run in runs.itertuples()}
        needs = {
            f"{what} for {reference['CE_increase']:.3f}": _share(
                reach(on_target[x], on_target["CE_increase"], reference["CE_increase"]), reference[x]
            )
            for what, x in (("tokens", "n_tokens"), ("seconds", "seconds"))
        }
        per_mtoken = 1e6 * float((runs["seconds"] / runs["n_tokens"]).iloc[0])
        rows.append({"": name, "s per million tokens": per_mtoken, **at, **needs})
    return pd.DataFrame(rows)


def _with_l0(run: Any) -> str:
    return f"{run.CE_increase:.3f}" + ("" if run.on_target else f" (L0 {run.L0:.0f})")


TOLERANCE = 0.1
"""A run whose L0 is further from what was asked for has missed it, and is not compared."""
REFERENCE = "relu, e2e+ds"
"""The paper's recommended recipe, whose cost the others' is told in."""


def reach(x: Any, ce: Any, wanted: float) -> float:
    """Returns where a falling curve of points first comes down to a CE increase, in a straight line between logarithms.

    Args:
        x: rising.
        ce: at each x.
        wanted: the CE increase.

    Returns:
        The x; NaN if the curve ends above it; minus the first x if it is below from the first point on.
    """
    points = list(zip(map(float, x), map(float, ce), strict=True))
    if not points:
        return math.nan
    if points[0][1] <= wanted:
        return -points[0][0]
    for (x0, ce0), (x1, ce1) in itertools.pairwise(points):
        if ce1 <= wanted:
            share = math.log(ce0 / wanted) / math.log(ce0 / ce1)
            return x0 * (x1 / x0) ** share
    return math.nan


def _share(reached: float, of: float) -> str:
    if math.isnan(reached):
        return "not reached"
    return f"{'< ' if reached < 0 else ''}{abs(reached) / of:.2f}"


def write_report(sources: Sequence[Path], out: Path) -> list[Path]:
    """Writes the report and returns its files."""
    table = evidence_table(sources)
    out.mkdir(parents=True, exist_ok=True)
    files = [write_table(table, out / "evidence.csv")]
    lengths, usual = of_lengths(table), table[table["n_tokens"] == table["n_tokens"].mode().iloc[0]]
    parts: Mapping[str, tuple[Any, Callable[[Any], Any] | None, Callable[[Any], Any]]] = {
        "grid": (of_grid(usual), draw_grid, grid_text),
        "seeds": (usual, None, seeds_text),
        "lengths": (lengths, draw_lengths, lengths_text),
    }
    for name, (rows, draw, text) in parts.items():
        shown = None if rows.empty else text(rows)
        if shown is None:
            continue
        files.append(out / f"{name}.md")
        write_text(files[-1], as_markdown(shown, {"s per million tokens": 0}))
        if draw is not None:
            files += save_figure(draw, rows, out / name)
    return files


def main() -> int:
    """Writes the report, and prints its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence_report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of sweeps")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    log_to_console()

    def report() -> None:
        for file in write_report(args.runs, args.out):
            print(file.read_text() if file.suffix == ".md" else file)

    return run_command(report, debug=False)


if __name__ == "__main__":
    raise SystemExit(main())
