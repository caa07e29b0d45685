"""Figures of `geometry.py`, from its tables alone: a panel for each position and architecture, a line for each type."""

from typing import Any

from e2e_sae.analysis.lines import LABELS, looks_of_types, panels_by
from e2e_sae.analysis.looks import grid, legend_below
from e2e_sae.analysis.matching import in_order

_PLACE = ["model_name", "sae_pos", "architecture"]
_N_COLUMNS = 4
_AGAINST = {**LABELS, "n_alive": LABELS["alive_dict_elements"]}


def draw_within(table: Any) -> Any:
    """Draws the histograms of largest cosines with other directions of the same dictionary."""
    return _histograms(table, {"share": ("", "-")}, "largest cosine with another direction")


def draw_across(table: Any) -> Any:
    """Draws the histograms of cosines with another dictionary, means over the pairs of runs that are shown."""
    lines = {"share_largest": ("", "-"), "share_one_to_one": (", one to one", ":")}
    bins = [*_PLACE, "layer", "run_type", "cosine_from", "cosine_to"]
    shown = table[table["shown"]].groupby(bins, sort=False, dropna=False)[list(lines)].mean().reset_index()
    return _histograms(shown, lines, "cosine with the other dictionary")


def draw_against_sparsity(table: Any) -> Any:
    """Draws the mean largest cosine of each run against its L0, CE increase and alive latents, where they are known."""
    against = [name for name in ("L0", "CE_increase", "n_alive") if table[name].notna().any()]
    panels, types = panels_by(table, _PLACE), in_order(table["run_type"])
    figure, axes = grid(len(panels) * len(against), len(against), 3.6, 3.0, sharey=True)
    for n, ax in enumerate(axes):
        (title, part), name = panels[n // len(against)], against[n % len(against)]
        for run_type, look in looks_of_types(types).items():
            here = part[part["run_type"] == run_type]
            ax.plot(here[name], here["mean"], linestyle="none", markersize=5, label=run_type, **look)
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel(_AGAINST[name])
    figure.supylabel("mean largest cosine within the dictionary")
    legend_below(figure, axes)
    return figure


def _histograms(table: Any, lines: dict[str, tuple[str, str]], xlabel: str) -> Any:
    """Draws columns of shares, each with what its lines are called after their type, and their style."""
    panels, types = panels_by(table, _PLACE), in_order(table["run_type"])
    figure, axes = grid(len(panels), _N_COLUMNS, 3.6, 3.0)
    for (title, part), ax in zip(panels, axes, strict=True):
        for run_type, look in looks_of_types(types).items():
            here = part[part["run_type"] == run_type]
            for column, (suffix, style) in lines.items() if len(here) else ():
                edges = [*here["cosine_from"], here["cosine_to"].iloc[-1]]
                options = {"color": look["color"], "linestyle": style, "linewidth": 1.4, "label": run_type + suffix}
                ax.stairs(100 * here[column], edges, **options)
        ax.set_title(title, fontsize="medium")
        ax.set(xlim=(0, 1), xlabel=xlabel)
    figure.supylabel("alive latents (%)")
    legend_below(figure, axes)
    return figure
