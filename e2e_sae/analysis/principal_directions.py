"""Principal directions of the residual stream, and how SAEs keep them (arXiv 2405.12241, figs. 21 to 23a).

Directions v_i: those of the clean activations (`clean_directions.py`), the one of the largest variance first. In GPT-2
that is the direction of the first position's outlier. Components: (x - mean of the clean activations) . v_i.

    measure              of         value                                            direction   besides
    explained_share      clean      share of the variance along v_i                  i
    cos_first_position   clean      cosine of v_i and the mean at position 0         i
    mean_component       clean, SAE mean component                                   0, 1, 2     position
    r                    SAE        Pearson's r of input's and output's components   i           place: 0 or later
    component            clean, SAE component of a sampled token                     0           its place
    decoder_cosine       SAE        active latents by the cosine of their decoder    0           low, high
                                    direction and v_0
"""

from typing import Any

from torch.nn.functional import cosine_similarity

from e2e_sae.analysis.clean_directions import Directions, clean_directions
from e2e_sae.analysis.compared import KEYS, ComparedSAE, Group, compared_groups
from e2e_sae.analysis.item import Analysis, Figure
from e2e_sae.analysis.looks import (
    CLEAN_LABEL,
    for_readers,
    grid,
    legend_below,
    line_panels,
    lines_of,
    n_columns,
    panels_of,
)
from e2e_sae.analysis.reconstructions import N_SAMPLED, N_SHOWN, Reconstruction, reconstructions
from e2e_sae.analysis.study import Study

COLUMNS = (*KEYS, "measure", "direction", "position", "place", "low", "high", "value")
FIRST, LATER = "position 0", "later positions"
"""Places over which r is taken."""
N_EDGES = 81
"""Of the histogram of components."""
_OUTLIER = 50
"""Axes become linear at first, then logarithmic, where the largest size is so many times the ordinary one."""
_PLACES = {"position 0": "#d55e00", "end of text": "#de8f05", "other": "#949494"}


def principal_directions_table(study: Study) -> Any:
    """Returns all measures of all hook points and SAEs, one number a line; rows of clean activations have no id."""
    import pandas as pd

    parts: list[Any] = []
    for group in compared_groups(study):
        directions, found = clean_directions(study, group.run_id, group.points), reconstructions(study, group)
        for point in group.points:
            here = [(sae, one) for sae, one in found if sae.point == point]
            parts += _of_clean(group, point, directions[point], here[0][1])
            parts += [part for sae, one in here for part in _of_sae(sae, one)]
    return pd.concat(parts, ignore_index=True).reindex(columns=[*COLUMNS])


def _of_clean(group: Group, point: str, directions: Directions, any_sae: Reconstruction) -> list[Any]:
    import pandas as pd

    keys = {"model_name": group.model_name, "sae_pos": point, "label": CLEAN_LABEL}
    numbers = range(len(directions.axes))
    first = directions.by_position[0]
    means = directions.components(directions.by_position)[:, :N_SHOWN]
    parts = [
        pd.DataFrame({"measure": "explained_share", "direction": numbers, "value": directions.shares}),
        pd.DataFrame(
            {
                "measure": "cos_first_position",
                "direction": numbers,
                "value": cosine_similarity(directions.axes, first, dim=-1),
            }
        ),
        *_mean_components(means),
        _sampled_components(any_sae, 3),
    ]
    return [part.assign(**keys) for part in parts]


def _of_sae(sae: ComparedSAE, found: Reconstruction) -> list[Any]:
    import pandas as pd

    n_bins = len(found.decoder_bins)
    parts = [
        *(
            pd.DataFrame({"measure": "r", "direction": range(len(r)), "place": place, "value": r})
            for place, r in ((FIRST, found.r_first), (LATER, found.r_later))
        ),
        *_mean_components(found.component),
        _sampled_components(found, 4),
        pd.DataFrame(
            {
                "measure": "decoder_cosine",
                "direction": 0,
                "low": [-1 + 2 * n / n_bins for n in range(n_bins)],
                "high": [-1 + 2 * (n + 1) / n_bins for n in range(n_bins)],
                "value": found.decoder_bins.double(),
            }
        ),
    ]
    return [part.assign(**sae.keys) for part in parts]


def _mean_components(means: Any) -> list[Any]:
    import pandas as pd

    return [
        pd.DataFrame({"measure": "mean_component", "direction": i, "position": range(len(means)), "value": means[:, i]})
        for i in range(means.shape[1])
    ]


def _sampled_components(found: Reconstruction, column: int) -> Any:
    import pandas as pd

    places = [list(N_SAMPLED)[int(n)] for n in found.sampled[:, 0]]
    return pd.DataFrame(
        {"measure": "component", "direction": 0, "place": places, "value": found.sampled[:, column].double()}
    )


def text(table: Any) -> Any:
    """Returns for readers: of every hook point direction 0's share, and how well every SAE keeps it and the others."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    several = table["model_name"].nunique() > 1
    for _, part in panels_of(table):
        clean = part[(part["label"] == CLEAN_LABEL) & (part["direction"] == 0)].groupby("measure")["value"].first()
        r = part[part["measure"] == "r"]
        for keys, of_sae in r.groupby(list(KEYS), sort=False):
            at = of_sae.set_index(["place", "direction"])["value"]
            rows.append(
                {
                    **for_readers(dict(zip(KEYS, keys, strict=True)), several),
                    "PC 0: share of variance": clean["explained_share"],
                    "cos with position 0": clean["cos_first_position"],
                    "PC 0: r at position 0": at[FIRST, 0],
                    "PC 0: r later": at[LATER, 0],
                    "other PCs: mean r later": at[LATER].drop(0).mean(),
                }
            )
    return pd.DataFrame(rows)


def draw_correlations(table: Any) -> Any:
    """Draws r over later positions by direction, and the share of variance along it (fig. 23a)."""
    panels = line_panels(table)
    figure, axes = grid(len(panels), n_columns(len(panels)), 5.4, 3.6, sharey=True)
    for (title, part), ax in zip(panels, axes, strict=True):
        share = part[part["measure"] == "explained_share"]
        ax.bar(share["direction"], share["value"], color="#bbbbbb", width=0.8, label="share of variance")
        r = part[(part["measure"] == "r") & (part["place"] == LATER)]
        for line, look in lines_of(table, r):
            ax.plot(line["direction"], line["value"], marker="o", markersize=3, **look)
        ax.set(xlabel="principal direction of the clean activations", title=title)
        ax.set_ylabel("r of input's and output's\ncomponents (positions > 0)")
    axes[0].set_ylim(min(0.0, float(table[table["measure"] == "r"]["value"].min())), 1.03)
    legend_below(figure, axes)
    return figure


def draw_positions(table: Any) -> Any:
    """Draws mean components along the first directions by position, clean and of every SAE's output."""
    means = table[table["measure"] == "mean_component"]
    panels = [
        (f"{title}\ndirection {direction:.0f}", part[part["direction"] == direction])
        for title, part in line_panels(means)
        for direction in part["direction"].unique()
    ]
    figure, axes = grid(len(panels), means["direction"].nunique(), 4.4, 3.3)
    for (title, part), ax in zip(panels, axes, strict=True):
        for line, look in lines_of(table, part):
            ax.plot(line["position"], line["value"], **look)
        if _has_outliers(part["value"]):
            ax.set_yscale("asinh", linear_width=_ordinary(part["value"]))
        ax.set(xlabel="position in the row (tokens)", ylabel="mean component")
        ax.set_title(title, fontsize="medium")
    legend_below(figure, axes)
    return figure


def draw_components(table: Any) -> Any:
    """Draws histograms of the clean component along direction 0 by the token's place (fig. 22)."""
    clean = table[(table["measure"] == "component") & (table["label"] == CLEAN_LABEL)]
    panels = panels_of(clean)
    figure, axes = grid(len(panels), n_columns(len(panels)), 5.0, 3.4)
    for (title, part), ax in zip(panels, axes, strict=True):
        for place, colour in _PLACES.items():
            values = part[part["place"] == place]["value"]
            if len(values):
                look = {"color": colour, "alpha": 0.65, "label": f"{place} ({len(values)} tokens)"}
                ax.hist(values, bins=_edges(part["value"]), weights=[100 / len(values)] * len(values), **look)
        if _has_outliers(part["value"]):
            ax.set_xscale("asinh", linear_width=_ordinary(part["value"]))
        ax.set_xlabel("component of the clean activation along direction 0")
        ax.set(ylabel="tokens of that place (%)", title=title)
        ax.legend(fontsize="small")
    return figure


def draw_decoders(table: Any) -> Any:
    """Draws histograms of the cosine of decoder directions with direction 0 (the colours of fig. 21)."""
    bins = table[table["measure"] == "decoder_cosine"]
    panels = line_panels(bins)
    figure, axes = grid(len(panels), n_columns(len(panels)), 5.0, 3.4, sharex=True)
    for (title, part), ax in zip(panels, axes, strict=True):
        for line, look in lines_of(table, part):
            ax.stairs(line["value"], [*line["low"], line["high"].iloc[-1]], **look)
        ax.set(xlabel="cosine of decoder direction and direction 0", ylabel="active latents", title=title)
    seen = bins[bins["value"] > 0]
    if len(seen):
        axes[0].set_xlim(float(seen["low"].min()) - 0.02, float(seen["high"].max()) + 0.02)
    legend_below(figure, axes)
    return figure


def _ordinary(values: Any) -> float:
    """Returns a size that half of the values are within."""
    return max(1e-6, float(values.abs().median()))


def _has_outliers(values: Any) -> bool:
    """Returns whether some values would leave the others no room on a linear axis."""
    return float(values.abs().max()) > _OUTLIER * _ordinary(values)


def _edges(values: Any) -> Any:
    """Returns the edges of a histogram's bins, of equal width on the axis."""
    import numpy as np

    if not _has_outliers(values):
        return np.linspace(values.min(), values.max(), N_EDGES)
    width = _ordinary(values)
    low, high = (float(np.arcsinh(end / width)) for end in (values.min(), values.max()))
    return width * np.sinh(np.linspace(low, high, N_EDGES))


ANALYSES = (
    Analysis(
        "principal_directions",
        "principal directions of the clean activations and how SAEs keep them (figs. 21, 22, 23a)",
        principal_directions_table,
        [
            Figure("principal_directions_r", draw_correlations),
            Figure("principal_directions_by_position", draw_positions),
            Figure("principal_directions_components", draw_components),
            Figure("principal_directions_decoders", draw_decoders),
        ],
        text,
    ),
)
