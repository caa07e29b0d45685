"""The figure of `umaps.py`, from its table alone."""

from typing import Any

import numpy as np
from jaxtyping import Float

from e2e_sae.analysis.lines import looks_of_types, panels_by
from e2e_sae.analysis.looks import grid, legend_below, n_columns
from e2e_sae.analysis.matching import in_order

N_OUTLINED = 12
"""Regions with an outline and a number in each panel."""
_MAX_SHARE = 0.5
"""A region with a larger share of the latents is the bulk: an outline would be one round everything."""
_AXES = {"xlabel": "UMAP 1 (no unit)", "ylabel": "UMAP 2 (no unit)", "xticks": [], "yticks": []}


def draw_umaps(table: Any) -> Any:
    """Draws the points of each pair of runs, coloured by type, and the outlines of its first regions."""
    panels = panels_by(table, ["model_name", "sae_pos", "architecture", "pair"])
    figure, axes = grid(len(panels), n_columns(len(panels)), 5.0, 4.6)
    looks = looks_of_types(in_order(table["run_type"]))
    for (title, points), ax in zip(panels, axes, strict=True):
        _draw_points(ax, points, looks)
        for region in range(1, N_OUTLINED + 1):
            inside = points[points["region"] == region]
            if 2 < len(inside) <= _MAX_SHARE * len(points):
                _outline(ax, inside[["x", "y"]].to_numpy(dtype=float), region)
        ax.set_title(title, fontsize="medium")
        ax.set(**_AXES)
    legend_below(figure, axes)
    return figure


def draw_first_direction(table: Any) -> Any:
    """Draws the points of each pair of runs, coloured by cosine with the first principal direction, those with the
    greatest in size on top."""
    panels = panels_by(table, ["model_name", "sae_pos", "architecture", "pair"])
    figure, axes = grid(len(panels), n_columns(len(panels)), 5.0, 4.6)
    scale = float(table["cos_first_direction"].abs().max())
    drawn = None
    for (title, points), ax in zip(panels, axes, strict=True):
        ordered = points.sort_values("cos_first_direction", key=abs)
        shades = {"c": ordered["cos_first_direction"], "cmap": "coolwarm", "vmin": -scale, "vmax": scale}
        drawn = ax.scatter(ordered["x"], ordered["y"], s=_size(points), linewidths=0, rasterized=True, **shades)
        ax.set_title(title, fontsize="medium")
        ax.set(**_AXES)
    figure.colorbar(drawn, ax=axes, label="cosine with the first principal direction", shrink=0.8)
    return figure


def _size(points: Any) -> float:
    return float(np.clip(20_000 / len(points), 0.5, 12))


def _draw_points(ax: Any, points: Any, looks: Any) -> None:
    # Mixed, so that the type drawn last does not hide the other.
    mixed = points.sample(frac=1, random_state=0)
    colours = [looks[run_type]["color"] for run_type in mixed["run_type"]]
    ax.scatter(mixed["x"], mixed["y"], c=colours, s=_size(points), linewidths=0, alpha=0.7, rasterized=True)
    for run_type in in_order(points["run_type"]):
        ax.plot([], [], marker="o", linestyle="none", color=looks[run_type]["color"], label=run_type)


def _outline(ax: Any, xy: Float[np.ndarray, "n 2"], region: int) -> None:
    from scipy.spatial import ConvexHull, QhullError

    centre = xy.mean(0)
    try:
        hull = xy[ConvexHull(xy).vertices]
    except QhullError:  # all on a line
        hull = np.stack([xy[xy[:, 0].argmin()], xy[xy[:, 0].argmax()]])
    closed = centre + 1.08 * (np.concatenate([hull, hull[:1]]) - centre)
    ax.plot(closed[:, 0], closed[:, 1], color="black", linewidth=0.9)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    top = closed[closed[:, 1].argmax()]
    ax.annotate(str(region), top, fontsize="small", ha="center", va="bottom", bbox=box)
