"""The table of a sweep and, made from the saved table alone, its figure: cost against sparsity.

The figure is that of arXiv 2405.12241, figs. 1 and 4: CE increase against L0 and against alive elements, CE increase
falling upwards, a row of panels for each place of the SAEs, a line for each type of run (and for each combination of
what a grid varies besides how sparse SAEs are to be). Runs of random and bayes sweeps are points without a line.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e_sae.checkpoint.files import write_text
from e2e_sae.group import flat_settings
from e2e_sae.log import logger
from e2e_sae.plotting import plot_facet
from e2e_sae.run_types import COLOURS, MARKERS, MORE_COLOURS
from e2e_sae.sweeps.plan import PlannedRun, short, short_names, shown
from e2e_sae.sweeps.run_folder import RunFolder

COEFF = "loss.sparsity.coeff"
"""Always a column."""
ALONG = ("loss.sparsity.target_l0", "saes.sae.k", "saes.sae.ks", COEFF)
"""The settings along a line of the figure: how sparse SAEs are to be."""
HIDDEN = ("position", "line", "is_joined", "number")
"""Columns of the table that are for the figure only."""
POSITIONS = "saes.sae_positions"
"""The setting that chooses the row of panels."""
LINE_STYLES = ("-", "--", ":", "-.")
"""Of a type's first, second, ... line."""
MORE_MARKERS = ("s", "D", "v", "P", "*", "h", "<", ">")
"""Of a type's lines that have a line style for the second, third, ... time."""
MAX_NUMBERED_LINES = 12
"""Points of more lines have no numbers beside them: they would hide each other."""
LABEL_SIDES = ((10, -9), (14, 0), (-8, 9))
"""Where a line's first, second, ... writes its numbers: a frontier that lies lower writes below itself. In points."""


def save_table(runs: Sequence[PlannedRun], folder: Path) -> Path:
    """Writes `sweep.csv`, a row for each run in the order of the plan, and returns its path.

    Of a run with several SAEs: `l0` (active latents per token) and `alive` (latents active at least once) are their
    sums, `explained_variance` is their mean; `ce_increase` and `kl`, nats per token, are what all of them cost
    together. All of it on held-out data, where there are some.
    """
    import pandas as pd

    settings = list(dict.fromkeys([COEFF, *(name for run in runs for name in run.varied)]))
    rows = [{**_row(run, settings, folder), "line": line} for run, line in zip(runs, _lines(runs), strict=True)]
    path = folder / "sweep.csv"
    write_text(path, pd.DataFrame(rows).to_csv(index=False))
    return path


def table_text(path: Path) -> str:
    """Returns the saved table for the screen: blanks where a run has no value."""
    import pandas as pd

    table = pd.read_csv(path).drop(columns=[*HIDDEN])
    table = table.rename(columns={old: new for new, old in short_names({name: name for name in table}).items()})
    formats = {"l0": "{:.1f}", "alive": "{:.0f}", "samples": "{:.0f}"}
    formats |= dict.fromkeys(("ce_increase", "kl", "explained_variance"), "{:.3f}")
    for column in table:
        shown = formats.get(str(column))
        table[column] = [
            "" if _is_missing(v) else shown.format(v) if shown else short(v) for v in table[column].tolist()
        ]
    return table.to_string(index=False)


def draw_pareto(table_file: Path, figure_file: Path) -> bool:
    """Draws the figure from a saved table; says whether there was anything to draw."""
    import matplotlib.pyplot as plt
    import pandas as pd

    table = pd.read_csv(table_file, dtype={"number": str}).dropna(subset=["l0", "alive", "ce_increase"])
    if table.empty:
        return False
    positions = list(dict.fromkeys(table["position"]))
    styles = _styles(table)
    rows = plot_facet(
        table,
        xs=["l0", "alive"],
        y="ce_increase",
        facet_by="position",
        facet_vals=positions,
        line_by="line",
        line_by_vals=list(styles),
        sort_by="l0",
        xlabels=["L0 (active latents per token)", "alive dictionary elements"],
        ylabel="CE increase (nats/token; up is better)",
        xlims=[{p: _around(table[table["position"] == p][x]) for p in positions} for x in ("l0", "alive")],
        ylim={p: _upside_down(table[table["position"] == p]["ce_increase"]) for p in positions},
        title={p: f"SAE at {p}" for p in positions},
        styles=styles,
    )
    is_numbered = len(styles) <= MAX_NUMBERED_LINES
    for position, row in zip(positions, rows, strict=True):
        here = table[table["position"] == position]
        for x, ax in zip(("l0", "alive"), row, strict=True):
            if is_numbered:
                _label_points(ax, here, x, styles)
    figure = plt.gcf()
    rows[0][0].get_legend().remove()
    handles, labels = rows[0][0].get_legend_handles_labels()
    # Inches, at matplotlib's 10 points: 0.07 a letter, 0.5 the line before a label, 0.22 a line of text.
    n_columns = max(1, min(len(labels), 4, int(10 / (0.5 + 0.07 * max(map(len, labels))))))
    legend_height = 0.4 + 0.22 * math.ceil(len(labels) / n_columns)
    figure.set_size_inches(10, 4.2 * len(positions) + legend_height)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=n_columns,
        title="numbers: sparsity coefficient, target L0 or k" if is_numbered else None,
    )
    temporary = figure_file.with_name(f".{figure_file.name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(figure_file)
    plt.close(figure)
    return True


def describe(run: PlannedRun, folder: RunFolder) -> str:
    """Returns a finished run's result in one line."""
    values = _measures(folder.summary())
    ce = f"CE increase {values['ce_increase']:.4f}, " if not math.isnan(values["ce_increase"]) else ""
    return f"{run.label}: {ce}L0 {values['l0']:.1f}, {values['alive']:.0f} alive"


def note_missing(path: Path) -> None:
    """Says which runs have finished without an evaluation."""
    import pandas as pd

    table = pd.read_csv(path)
    n = len(table[table["ce_increase"].isna() & (table["status"] == "finished")])
    if n:
        logger.info(
            f"note: {n} finished runs have no evaluation and are not in the figure: set eval_every_n_samples and "
            "eval_data (or train_data.holdout_fraction) in the base config"
        )


def _row(run: PlannedRun, settings: Sequence[str], sweep_dir: Path) -> dict[str, Any]:
    folder = RunFolder.of(run, sweep_dir)
    summary, plain = folder.summary(), run.config.to_dict()
    positions = _positions(summary) or [str(entry) for entry in run.config.saes.sae_positions]
    numbers = [short(value) for name, value in flat_settings(run.varied).items() if name in ALONG]
    return {
        "sweep": run.sweep,
        "type": run.type,
        "position": " + ".join(positions),
        **{name: _in_cell(_setting(run, plain, name)) for name in settings},
        **_measures(summary),
        "samples": summary.get("samples", math.nan),
        "status": folder.status,
        "is_joined": run.is_grid,
        "number": numbers[0] if numbers else short(_at(plain, COEFF)),
        "run_dir": str((folder.run_dir or folder.path).relative_to(sweep_dir)),
    }


def _setting(run: PlannedRun, plain: Mapping[str, Any], name: str) -> Any:
    """Returns what a run has of a setting that some runs vary; of a mapping that it does not vary, what it sets."""
    value = run.varied.get(name, _at(plain, name))
    if name in run.varied or not isinstance(value, Mapping):
        return value
    given = _at(run.config.model_dump(mode="json", exclude_unset=True), name)
    return flat_settings(given) if isinstance(given, Mapping) else None


def _in_cell(value: Any) -> Any:
    return short(value) if isinstance(value, list | Mapping) else value


def _measures(summary: Mapping[str, Any]) -> dict[str, float]:
    def values(stem: str) -> list[float]:
        found = [summary.get(f"{stem}/{name}") for name in _positions(summary)]
        return [math.nan if value is None else float(value) for value in found]

    def one(key: str) -> float:
        value = summary.get(key)
        return math.nan if value is None else float(value)

    l0, alive = values("sparsity/L_0_final"), values("sparsity/alive_dict_elements_final")
    variances = values("quality/eval/explained_variance")
    return {
        "l0": sum(l0) if l0 else math.nan,
        "alive": sum(alive) if alive else math.nan,
        "ce_increase": one("performance/eval/ce_increase"),
        "kl": one("loss/eval/logits_kl"),
        "explained_variance": sum(variances) / len(variances) if variances else math.nan,
    }


def _positions(summary: Mapping[str, Any]) -> list[str]:
    stem = "sparsity/L_0_final/"
    return [key.removeprefix(stem) for key in summary if key.startswith(stem)]


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _lines(runs: Sequence[PlannedRun]) -> list[str]:
    """Returns the name of the line that each run is on."""
    own: list[str] = []
    for run in runs:
        others = _besides_sparsity(run.varied) if run.is_grid else {}
        own.append(", ".join([run.type, *shown(others)]))
    sweeps: dict[str, set[str]] = {}
    for run, line in zip(runs, own, strict=True):
        sweeps.setdefault(line, set()).add(run.sweep)
    return [f"{run.sweep}: {line}" if len(sweeps[line]) > 1 else line for run, line in zip(runs, own, strict=True)]


def _besides_sparsity(varied: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is varied besides how sparse SAEs are to be, and where they are."""
    kept: dict[str, Any] = {}
    for name, value in varied.items():
        if isinstance(value, Mapping):
            value = {key: entry for key, entry in value.items() if f"{name}.{key}" not in ALONG}
        if name not in (*ALONG, POSITIONS) and value != {}:
            kept[name] = value
    return kept


def _styles(table: Any) -> dict[str, dict[str, Any]]:
    """Returns each line's look: the type's colour; for a type's next line the next line style, then the next marker."""
    kinds: dict[str, list[str]] = {}
    for line, kind in zip(table["line"], table["type"], strict=True):
        if line not in kinds.setdefault(kind, []):
            kinds[kind].append(line)
    known = [*(k for k in COLOURS if k in kinds), *(k for k in kinds if k not in COLOURS)]
    more = iter(MORE_COLOURS * len(kinds))
    styles: dict[str, dict[str, Any]] = {}
    for kind in known:
        colour, markers = COLOURS.get(kind) or next(more), dict.fromkeys([MARKERS.get(kind, "s"), *MORE_MARKERS])
        for n, line in enumerate(kinds[kind]):
            joined = bool(table[table["line"] == line]["is_joined"].iloc[0])
            styles[line] = {
                "color": colour,
                "marker": list(markers)[n // len(LINE_STYLES) % len(markers)],
                "linestyle": LINE_STYLES[n % len(LINE_STYLES)] if joined else "none",
            }
    return styles


def _label_points(ax: Any, table: Any, x: str, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes each point's number beside it, on a side that depends on its line."""
    from matplotlib.patheffects import withStroke

    sides = {line: LABEL_SIDES[n % len(LABEL_SIDES)] for n, line in enumerate(styles)}
    outline = [withStroke(linewidth=2, foreground=ax.get_facecolor())]
    for px, py, number, line in zip(table[x], table["ce_increase"], table["number"], table["line"], strict=True):
        colour = styles[line]["color"]
        ax.annotate(
            number, (px, py), xytext=sides[line], textcoords="offset points", ha="center", va="center",
            fontsize=8, color=colour, path_effects=outline,
        )  # fmt: skip


def _around(values: Any) -> tuple[float, float]:
    """Returns limits with room for the points' numbers."""
    low, high = float(values.min()), float(values.max())
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin


def _upside_down(costs: Any) -> tuple[float, float]:
    """Returns limits that have the greatest cost at the bottom and no cost at the top."""
    low, high = min(0.0, float(costs.min())), float(costs.max())
    margin = 0.08 * (high - low) or 0.1
    return high + margin, low - margin


def _is_missing(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
