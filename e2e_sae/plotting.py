"""The two kinds of figure of arXiv 2405.12241 from a table of runs (one row each), as calls of the paper's library.

`plot_per_layer_metric`: how well each later layer survives an SAE (figs. 2, 6, 12). `plot_facet`: one measure against
others, one line per kind of run (figs. 1, 4, 5, 13-18). Making the table is not done here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from e2e_sae.errors import UserError

LayerMetric = Literal["explained_var", "explained_var_ln", "recon_loss"]
# `int` is spelt out: type checks at run time tell 0 from 0.0.
Limits = tuple[int | float | None, int | float | None]
"""Both ends of an axis, the first one on the left or at the bottom; None: fitted to the data."""
Ticks = Sequence[int | float] | tuple[Sequence[int | float], Sequence[str]]
"""Positions, or (positions, labels)."""

STYLE = "seaborn-v0_8-darkgrid"
DPI = 400

_METRIC_LABELS: dict[LayerMetric, str] = {
    "explained_var": "explained variance",
    "explained_var_ln": "explained variance (layer-normalised)",
    "recon_loss": "reconstruction MSE",
}
# The paper's horizontal figure: GPT-2's layers, each panel about as wide as it has later layers.
_HORIZONTAL: dict[tuple[int, ...], tuple[float, ...]] = {(2, 6, 10): (3.0, 2.0, 1.2)}


class _Series(NamedTuple):
    """How one line looks."""

    label: str
    options: dict[str, Any]


def plot_per_layer_metric(
    df: Any,
    run_ids: Mapping[int, Mapping[str, str]],
    metric: LayerMetric,
    final_layer: int,
    run_types: Sequence[str],
    out_file: str | Path | None = None,
    ylim: Limits = (None, None),
    legend_label_cols_and_precision: Sequence[tuple[str, int]] | None = None,
    legend_title: str | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    horz_layout: bool = False,
    show_ax_titles: bool = True,
    save_svg: bool = True,
) -> list[Any]:
    """Draws, for each SAE layer, a metric at that and every later layer, one line per type of run.

    Args:
        df: pandas table, one row per run: `id`, and `{metric}_layer-{i}` for every layer shown.
        run_ids: SAE layer -> type of run -> id.
        final_layer: the last layer shown.
        run_types: the types to show, in the legend's order.
        out_file: where the figure is saved (its folder is made); None: it stays open for `plt.show()`.
        legend_label_cols_and_precision: columns whose value is added to a line's label, and its decimals.
        styles: type of run -> matplotlib's options of its line (`label`, `color`, `marker`, ...).
        horz_layout: panels side by side; for SAE layers 2, 6 and 10 only.
        save_svg: save an SVG beside the figure.

    Returns:
        The panels' matplotlib axes, in the order of their layers.

    Raises:
        UserError: a run or a column is not in the table, or the layout is for other layers.
    """
    layers = sorted(run_ids)
    if horz_layout and tuple(layers) not in _HORIZONTAL:
        raise UserError(f"horz_layout is for SAE layers {[list(key) for key in _HORIZONTAL]}, not for {layers}")
    _check_columns(df, ["id", *(column for column, _ in legend_label_cols_and_precision or [])])
    rows = {(layer, kind): _run_row(df, run_ids, layer, kind) for layer in layers for kind in run_types}
    with _figure(out_file, save_svg) as figure:
        if horz_layout:
            figure.set_size_inches(12, 4)
            grid = figure.subplots(1, len(layers), squeeze=False, width_ratios=_HORIZONTAL[tuple(layers)])
        else:
            figure.set_size_inches(6, 3.2 * len(layers))
            grid = figure.subplots(len(layers), 1, squeeze=False)
        panels: list[Any] = list(grid.flat)
        for layer, ax in zip(layers, panels, strict=True):
            shown = list(range(layer, final_layer + 1))
            columns = [f"{metric}_layer-{i}" for i in shown]
            _check_columns(df, columns)
            for kind in run_types:
                row, series = rows[layer, kind], _series(kind, styles)
                added = [f"{c}={row[c]:.{digits}f}" for c, digits in legend_label_cols_and_precision or []]
                label = f"{series.label} ({', '.join(added)})" if added else series.label
                ax.plot(shown, [row[column] for column in columns], label=label, **series.options)
            ax.set(xlabel="layer", ylim=ylim, xticks=shown)
            if not horz_layout or ax is panels[0]:
                ax.set_ylabel(_METRIC_LABELS[metric])
            if show_ax_titles:
                ax.set_title(f"SAE at layer {layer}")
            ax.legend(title=legend_title)
    return panels


def plot_facet(
    df: Any,
    xs: Sequence[str],
    y: str,
    facet_by: str,
    line_by: str,
    line_by_vals: Sequence[Any] | None = None,
    sort_by: str | None = None,
    xlabels: Sequence[str | None] | None = None,
    ylabel: str | None = None,
    suptitle: str | None = None,
    facet_vals: Sequence[Any] | None = None,
    xlims: Sequence[Limits | Mapping[Any, Limits] | None] | None = None,
    xticks: Sequence[Ticks | None] | None = None,
    yticks: Ticks | None = None,
    ylim: Limits | Mapping[Any, Limits] | None = None,
    styles: Mapping[Any, Mapping[str, Any]] | None = None,
    title: str | Mapping[Any, str] | None = None,
    legend_title: str | None = None,
    legend_pos: str = "lower right",
    axis_formatter: Callable[[Sequence[Any]], None] | None = None,
    out_file: str | Path | None = None,
    plot_type: Literal["line", "scatter"] | None = None,
    save_svg: bool = True,
) -> list[list[Any]]:
    """Draws y against each of `xs`: a row of panels per value of `facet_by`, a column per x, a line per `line_by`.

    Args:
        df: pandas table, one row per run.
        line_by_vals: values of `line_by` to show, in the legend's order, absent ones included; None: all there are.
        sort_by: column in whose order the points of a line are joined; None: `y`.
        xlabels, xlims, xticks: one per x; None: the column's name; fitted; matplotlib's.
        facet_vals: values of `facet_by` to show, from the top; None: all there are.
        ylim: like one of `xlims`: for all rows, or facet value -> limits. Descending limits turn the axis round.
        styles: value of `line_by` -> matplotlib's options of its line (`label`, `color`, `marker`, ...).
        title: of every row, or facet value -> title; None: the facet's name and value.
        legend_pos: matplotlib's `loc` of the legend, which is in the first panel.
        axis_formatter: called with each row's axes when everything is drawn.
        out_file: where the figure is saved (its folder is made); None: it stays open for `plt.show()`.
        plot_type: "scatter": points are not joined. None: "line".
        save_svg: save an SVG beside the figure.

    Returns:
        matplotlib's axes by row and column.

    Raises:
        UserError: a column is not in the table, or `xlabels`, `xlims` or `xticks` has another length than `xs`.
    """
    _check_columns(df, [*xs, y, facet_by, line_by, *([sort_by] if sort_by else [])])
    for name, given in (("xlabels", xlabels), ("xlims", xlims), ("xticks", xticks)):
        if given is not None and len(given) != len(xs):
            raise UserError(f"{name} has {len(given)} entries, expected one for each of xs={list(xs)}")
    facets = _values(df, facet_by) if facet_vals is None else list(facet_vals)
    kinds = _values(df, line_by) if line_by_vals is None else list(line_by_vals)
    if not facets:
        raise UserError(f"nothing to draw: column '{facet_by}' of the table has no values")
    joined = {"linestyle": "none"} if plot_type == "scatter" else {}
    rows: list[list[Any]] = []
    with _figure(out_file, save_svg) as figure:
        figure.set_size_inches(4.5 * len(xs), 3.4 * len(facets))
        if suptitle is not None:
            figure.suptitle(suptitle)
        for facet, part in zip(facets, figure.subfigures(len(facets), 1, squeeze=False).flat, strict=True):
            row: list[Any] = list(part.subplots(1, len(xs), sharey=True, squeeze=False)[0])
            part.suptitle(f"{facet_by} {facet}" if title is None else _for_facet(title, facet))
            here = df[df[facet_by] == facet]
            for kind in kinds:
                points, series = here[here[line_by] == kind].sort_values(sort_by or y), _series(kind, styles)
                for x, ax in zip(xs, row, strict=True):
                    ax.plot(points[x], points[y], label=series.label, **{**series.options, **joined})
            for i, (x, ax) in enumerate(zip(xs, row, strict=True)):
                ax.set_xlabel((xlabels[i] if xlabels else None) or x)
                _set_ticks(ax.set_xticks, xticks[i] if xticks else None)
                ax.set_xlim(_for_facet(xlims[i] if xlims else None, facet))
            row[0].set_ylabel(ylabel or y)
            _set_ticks(row[0].set_yticks, yticks)
            row[0].set_ylim(_for_facet(ylim, facet))
            if axis_formatter is not None:
                axis_formatter(row)
            rows.append(row)
        rows[0][0].legend(title=legend_title, loc=legend_pos)
    return rows


@contextmanager
def _figure(out_file: str | Path | None, save_svg: bool) -> Iterator[Any]:
    """Yields an empty figure in the paper's look; saves and closes it if it has a file."""
    import matplotlib.pyplot as plt

    with plt.style.context(STYLE):
        figure = plt.figure(layout="constrained")
        try:
            yield figure
            if out_file is not None:
                path = Path(out_file)
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=DPI)
                if save_svg:
                    figure.savefig(path.with_suffix(".svg"))
        except BaseException:
            plt.close(figure)
            raise
        if out_file is not None:
            plt.close(figure)


def _series(kind: Any, styles: Mapping[Any, Mapping[str, Any]] | None) -> _Series:
    options: dict[str, Any] = {"marker": "o", **(styles or {}).get(kind, {})}
    return _Series(str(options.pop("label", kind)), options)


def _run_row(df: Any, run_ids: Mapping[int, Mapping[str, str]], layer: int, kind: str) -> Any:
    if kind not in run_ids[layer]:
        raise UserError(f"run_ids has no '{kind}' for layer {layer}, only {sorted(run_ids[layer])}")
    found = df[df["id"] == run_ids[layer][kind]]
    if len(found) != 1:
        raise UserError(
            f"run '{run_ids[layer][kind]}' ({kind}, layer {layer}) is in {len(found)} rows of the table, expected one"
        )
    return found.iloc[0]


def _check_columns(df: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in df.columns]
    if missing:
        raise UserError(f"the table has no column {missing}; its columns are {list(df.columns)}")


def _values(df: Any, column: str) -> list[Any]:
    return sorted(df[column].dropna().unique().tolist())


def _for_facet(given: Any, facet: Any) -> Any:
    return given.get(facet) if isinstance(given, Mapping) else given


def _set_ticks(set_ticks: Callable[..., Any], ticks: Ticks | None) -> None:
    if ticks is None:
        return
    labelled = len(ticks) == 2 and not any(isinstance(part, int | float) for part in ticks)
    set_ticks(*ticks) if labelled else set_ticks(ticks)
