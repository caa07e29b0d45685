"""Figures of lines between runs: what they cost against how sparse they are, one panel of two axes for each group.

The CE increase falls upwards, as in the paper (arXiv 2405.12241, figs. 1 and 4): up is better. Axes are logarithmic
where what they show spans more than `SPAN`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from e2e_sae.analysis.looks import LINES, grid, legend_below
from e2e_sae.analysis.matching import in_papers_order
from e2e_sae.run_types import COLOURS, MARKERS, MORE_COLOURS

LABELS = {
    "L0": "L0 (active latents per token)",
    "alive_dict_elements": "alive dictionary elements",
    "CE_increase": "CE increase (nats/token)",
    "mean_grad_norm": "mean gradient norm",
}
"""What axes are called."""
SPAN = 30
"""An axis is logarithmic where the largest value is so many times the smallest."""
_N_ROWS = 4
"""So many panels stand below each other; more stand in two columns."""
_TITLE = 40
"""Characters of a title's line."""

Looks = Mapping[Any, Mapping[str, Any]]
"""matplotlib's options of each line."""


def looks_of_types(run_types: Sequence[str]) -> Looks:
    """Returns colours and markers of types of run: the paper's types have their own."""
    others = [name for name in run_types if name not in COLOURS]
    more = {name: MORE_COLOURS[n % len(MORE_COLOURS)] for n, name in enumerate(others)}
    return {name: {"color": {**COLOURS, **more}[name], "marker": MARKERS.get(name, "s")} for name in run_types}


def looks_of_names(names: Sequence[Any]) -> Looks:
    """Returns colours of names without an order: the palette, and then again with another line and marker."""
    palette = [*COLOURS.values(), *MORE_COLOURS]
    return {
        name: {
            "color": palette[n % len(palette)],
            "linestyle": LINES[n // len(palette) % len(LINES)],
            "marker": "o" if n < len(palette) else "D",
        }
        for n, name in enumerate(names)
    }


def looks_of_numbers(numbers: Sequence[Any]) -> Looks:
    """Returns colours of numbers in rising order: from dark to light."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    last = max(1, len(numbers) - 1)
    return {number: {"color": shades(0.9 * n / last), "marker": "o"} for n, number in enumerate(sorted(numbers))}


def draw_costs(
    panels: Sequence[tuple[str, Any]],
    line: str,
    looks: Looks,
    xs: Sequence[str] = ("L0", "alive_dict_elements"),
    *,
    joined: bool = True,
    legend_title: str | None = None,
) -> Any:
    """Returns a figure with two axes for each panel: the CE increase against each of `xs`.

    Args:
        panels: title and runs.
        line: column by whose values runs are joined, each seed's in the order of x, the first one's in full colour.
        looks: of each value, in the legend's order.
        xs: columns.
        joined: whether there are lines.
        legend_title: what the values are.
    """
    n_side = 1 if len(panels) <= _N_ROWS else 2
    figure, axes = grid(len(panels) * len(xs), n_side * len(xs), 3.9, 3.1)
    shown = {name: [v for _, runs in panels for v in runs[name].dropna()] for name in (*xs, "CE_increase")}
    for n, (title, runs) in enumerate(panels):
        row = axes[n * len(xs) : (n + 1) * len(xs)]
        for ax, x in zip(row, xs, strict=True):
            for value, look in looks.items():
                _draw_line(ax, runs[runs[line] == value], x, str(value), look, joined)
            ax.set(xlabel=LABELS[x], ylabel=f"{LABELS['CE_increase']}\nup is better")
            ax.set_title(title, fontsize="medium")
            for axis, name in ((ax.xaxis, x), (ax.yaxis, "CE_increase")):
                if spans_decades(shown[name]):
                    make_logarithmic(axis)
            if x == "alive_dict_elements" and ax.get_xscale() == "linear":
                in_thousands(ax.xaxis)
            ax.invert_yaxis()
    legend_below(figure, axes, legend_title)
    return figure


def _draw_line(ax: Any, runs: Any, x: str, label: str, look: Mapping[str, Any], joined: bool) -> None:
    options = {"markersize": 5, "linewidth": 1.3, **look} | ({} if joined else {"linestyle": "none"})
    for n, (_, of_seed) in enumerate(runs.dropna(subset=[x, "CE_increase"]).groupby("seed", sort=True)):
        points = of_seed.sort_values(x)
        first = {"label": label} if n == 0 else {"alpha": 0.5}
        ax.plot(points[x], points["CE_increase"], **options, **first)


def spans_decades(values: Any) -> bool:
    """Says whether values (a list or a column) are all above 0 and the largest is `SPAN` times the smallest."""
    return bool(len(values)) and min(values) > 0 and max(values) / min(values) >= SPAN


def make_logarithmic(axis: Any) -> None:
    """Makes an axis logarithmic, with plain numbers at 1, 2, 3 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def in_thousands(axis: Any) -> None:
    """Makes an axis of large numbers show few of them, as 20k."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if max(map(abs, axis.get_view_interval())) >= 10_000:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))


def panels_by(table: Any, columns: Sequence[str]) -> list[tuple[str, Any]]:
    """Returns (title, runs) for each combination of values, in `in_papers_order`; a title says what is not the same
    everywhere, and where the SAE is."""
    found: list[tuple[str, Any]] = []
    several = [column for column in columns if column == "sae_pos" or table[column].nunique() > 1]
    for key, runs in in_papers_order(table).groupby(list(columns), sort=False, dropna=False):
        names = dict(zip(columns, key, strict=True))
        title = ", ".join(str(names[column]) for column in several)
        found.append((title if len(title) <= _TITLE else title.replace(", ", ",\n"), runs))
    return found
