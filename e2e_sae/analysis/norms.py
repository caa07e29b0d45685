"""Norms and directions of what goes into an SAE and of what comes out (arXiv 2405.12241, figs. 10 and 11, table 5).

    ratio = ||a_hat|| / ||a||,   cos = a . a_hat / (||a|| ||a_hat||)

a: clean activation, a_hat: the SAE's output for it. Means are over tokens: of ratios, not a ratio of means.
"""

from typing import Any

from e2e_sae.analysis.compared import KEYS, compared_groups
from e2e_sae.analysis.item import Analysis, Figure
from e2e_sae.analysis.looks import for_readers, grid, legend_below, line_panels, lines_of, n_columns, panels_of
from e2e_sae.analysis.reconstructions import N_SAMPLED, reconstructions
from e2e_sae.analysis.study import Study

_PLACES = {"other": ("#949494", 6), "end of text": ("#de8f05", 16), "position 0": ("#d55e00", 16)}
"""Colour and area of a token's point."""
_MANY_TIMES = 30
"""Axes of norms are logarithmic where the largest is so many times the smallest."""


def norms_table(study: Study) -> Any:
    """Returns means by position (`measure` is `mean`) and sampled tokens (`token`) of every SAE."""
    import pandas as pd

    parts: list[Any] = []
    for group in compared_groups(study):
        for sae, found in reconstructions(study, group):
            means = {name: getattr(found, name) for name in ("norm_in", "norm_out", "ratio")}
            by_position = pd.DataFrame({"position": range(len(found.counts)), **means, "n": found.counts.long()})
            place, norm_in, norm_out = found.sampled[:, :3].T
            places = [list(N_SAMPLED)[int(n)] for n in place]
            tokens = pd.DataFrame({"place": places, "norm_in": norm_in, "norm_out": norm_out})
            tokens["ratio"] = tokens["norm_out"] / tokens["norm_in"]
            parts += [by_position.assign(**sae.keys, measure="mean"), tokens.assign(**sae.keys, measure="token")]
    columns = [*KEYS, "measure", "place", "position", "norm_in", "norm_out", "ratio", "n"]
    return pd.concat(parts, ignore_index=True)[columns]


def cosines_table(study: Study) -> Any:
    """Returns means by position (`measure` is `mean`) and a histogram over all tokens (`bin`) of every SAE."""
    import pandas as pd

    parts: list[Any] = []
    for group in compared_groups(study):
        for sae, found in reconstructions(study, group):
            by_position = pd.DataFrame(
                {"position": range(len(found.counts)), "cos": found.cos, "n": found.counts.long()}
            )
            width = 2 / len(found.cos_bins)
            lows = [-1 + width * n for n in range(len(found.cos_bins))]
            bins = pd.DataFrame({"low": lows, "high": [low + width for low in lows], "n": found.cos_bins})
            parts += [by_position.assign(**sae.keys, measure="mean"), bins.assign(**sae.keys, measure="bin")]
    return pd.concat(parts, ignore_index=True)[[*KEYS, "measure", "position", "low", "high", "cos", "n"]]


def first_and_later(table: Any, column: str) -> Any:
    """Returns for readers the mean of a column over tokens at position 0 and at later positions, a line each SAE."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    several = table["model_name"].nunique() > 1
    means = table[(table["measure"] == "mean") & (table["n"] > 0)]
    for keys, part in means.groupby(list(KEYS), sort=False):
        values: dict[str, float] = {}
        for name, chosen in (("position 0", part["position"] == 0), ("later positions", part["position"] > 0)):
            n = part["n"][chosen]
            values[name] = float((part[column][chosen] * n).sum() / n.sum()) if n.sum() else float("nan")
        rows.append({**for_readers(dict(zip(KEYS, keys, strict=True)), several), **values})
    return pd.DataFrame(rows)


def draw_norms(table: Any) -> Any:
    """Draws ||a_hat|| against ||a|| of sampled tokens, a panel for each SAE."""
    tokens = table[(table["measure"] == "token") & (table["norm_in"] > 0) & (table["norm_out"] > 0)]
    panels = [
        (f"{label}\n{title}", part[part["label"] == label])
        for title, part in panels_of(tokens)
        for label in part["label"].unique()
    ]
    n_runs = {part["label"].nunique() for _, part in panels_of(tokens)}
    n_side = n_runs.pop() if len(n_runs) == 1 and max(n_runs) <= 5 else 4
    figure, axes = grid(len(panels), n_side, 3.2, 3.2, sharex=True, sharey=True)
    both = tokens[["norm_in", "norm_out"]]
    ends = float(both.min().min()) / 1.1, float(both.max().max()) * 1.1
    scale = "log" if ends[1] > _MANY_TIMES * ends[0] else "linear"
    for (title, part), ax in zip(panels, axes, strict=True):
        ax.plot(ends, ends, color="black", linewidth=0.8, linestyle="--", label="equal norms")
        for place, (colour, area) in _PLACES.items():
            here = part[part["place"] == place]
            look = {"color": colour, "s": area, "linewidths": 0, "alpha": 0.6}
            if len(here):
                ax.scatter(here["norm_in"], here["norm_out"], **look, label=place)
        ax.set(xscale=scale, yscale=scale, xlim=ends, ylim=ends, xlabel="norm of the activation")
        ax.set_title(title, fontsize="small")
    figure.supylabel("L2 norm of the SAE's output")
    legend_below(figure, axes)
    return figure


def draw_ratios(table: Any) -> Any:
    """Draws the mean ratio of norms by position."""
    return _by_position(table, "ratio", "mean ratio of norms, output / input")


def draw_mean_cosines(table: Any) -> Any:
    """Draws the mean cosine by position."""
    return _by_position(table, "cos", "mean cosine of input and output")


def _by_position(table: Any, column: str, ylabel: str) -> Any:
    """Draws a mean by position, a panel for each hook point and a line for each SAE."""
    means = table[table["measure"] == "mean"]
    panels = line_panels(means)
    figure, axes = grid(len(panels), n_columns(len(panels)), 5.0, 3.4, sharey=True)
    for (title, part), ax in zip(panels, axes, strict=True):
        for line, look in lines_of(table, part):
            ax.plot(line["position"], line[column], **look)
        ax.set(xlabel="position in the row (tokens)", ylabel=ylabel, title=title)
    legend_below(figure, axes)
    return figure


def draw_cosines(table: Any) -> Any:
    """Draws the histograms of cosines, a panel for each hook point and a line for each SAE."""
    bins = table[table["measure"] == "bin"]
    panels = line_panels(bins)
    figure, axes = grid(len(panels), n_columns(len(panels)), 5.0, 3.4, sharex=True)
    for (title, part), ax in zip(panels, axes, strict=True):
        for line, look in lines_of(table, part):
            share = 100 * line["n"] / line["n"].sum()
            ax.stairs(share, [*line["low"], line["high"].iloc[-1]], **look)
        ax.set(xlabel="cosine of activation and SAE's output", ylabel="tokens (%)", title=title)
    axes[0].set_xlim(float(bins[bins["n"] > 0]["low"].min()) - 0.02, 1.02)
    legend_below(figure, axes)
    return figure


ANALYSES = (
    Analysis(
        "norms",
        "norms of the SAEs' inputs and outputs: scatter, by position, mean ratios (fig. 10, table 5)",
        norms_table,
        [Figure("norms", draw_norms), Figure("norms_by_position", draw_ratios)],
        lambda table: first_and_later(table, "ratio"),
        {"position 0": 2, "later positions": 2},
    ),
    Analysis(
        "cosines",
        "cosines of the SAEs' inputs and outputs: histogram, by position (fig. 11)",
        cosines_table,
        [Figure("cosines", draw_cosines), Figure("cosines_by_position", draw_mean_cosines)],
        lambda table: first_and_later(table, "cos"),
    ),
)
