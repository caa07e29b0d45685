"""How SAEs under comparison look in figures: colours by type of run, line styles by what else differs, shared legends.

Tables have the columns `compared.KEYS`; a panel is one hook point of one language model.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from e2e_sae.run_types import COLOURS, MORE_COLOURS

CLEAN = {"color": "#333333", "linestyle": "-", "linewidth": 2.5}
"""Line of the clean activations."""
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)), (0, (8, 3, 2, 3)))
"""Line styles, the plainest first."""
CLEAN_LABEL = "clean"
"""Label of the clean activations, which have no type."""
MANY_LINES = 8
"""A panel with more lines is split by architecture."""
_N_LEGEND = 6
"""Most labels of a legend that stand beside each other."""


def line_looks(table: Any, panel: Any = None) -> dict[str, dict[str, Any]]:
    """Returns matplotlib's options of each label's lines: colour by `run_type`, style by the rest of the label.

    Args:
        table: all rows: a type has the same colour everywhere, and a variant the same style, if the styles suffice.
        panel: rows of the panel whose lines are to differ where they do not; None: all of them.
    """
    others = [kind for kind in table["run_type"].dropna().unique() if kind not in COLOURS]
    colours = {**COLOURS, **{kind: MORE_COLOURS[n % len(MORE_COLOURS)] for n, kind in enumerate(others)}}
    pairs = _pairs(table)
    variants = list(dict.fromkeys(_variant(*pair) for pair in pairs))
    if panel is not None and (len(variants) > len(LINES) or not set(panel["label"]) <= set(table["label"])):
        pairs = _pairs(panel)
        variants = list(dict.fromkeys(_variant(*pair) for pair in pairs))
    of_kind = {kind: [_variant(*pair) for pair in pairs if pair[1] == kind] for kind in colours}
    looks: dict[str, dict[str, Any]] = {}
    for label, kind in pairs:
        order = variants if len(variants) <= len(LINES) else of_kind[kind]
        line = LINES[order.index(_variant(label, kind)) % len(LINES)]
        looks[label] = {"color": colours[kind], "linestyle": line, "linewidth": 1.5}
    return looks


def lines_of(table: Any, panel: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields the rows of each label of a panel, in its order, and matplotlib's options of its line, `label` among them.

    Args:
        table: all rows, as in `line_looks`.
        panel: rows of the panel.
    """
    looks = line_looks(table, panel)
    for label, line in panel.groupby("label", sort=False):
        yield line, {"label": label, **(CLEAN if label == CLEAN_LABEL else looks[label])}


def panels_of(table: Any) -> list[tuple[str, Any]]:
    """Returns (title, rows) of every hook point of every language model, in the table's order."""
    places = table[["model_name", "sae_pos"]].drop_duplicates().itertuples(index=False)
    several = table["model_name"].nunique() > 1
    return [
        (
            f"{place.model_name}, {place.sae_pos}" if several else place.sae_pos,
            table[(table["model_name"] == place.model_name) & (table["sae_pos"] == place.sae_pos)],
        )
        for place in places
    ]


def line_panels(table: Any) -> list[tuple[str, Any]]:
    """Returns (title, rows) as `panels_of`; a hook point with more than `MANY_LINES` labels has a panel for each
    architecture, whose labels do not repeat it, with the rows of none (the clean activations) in all of them."""
    panels: list[tuple[str, Any]] = []
    for title, part in panels_of(table):
        architectures = part["architecture"].dropna().unique()
        if part["label"].nunique() <= MANY_LINES or len(architectures) < 2:
            panels.append((title, part))
            continue
        everywhere = part["architecture"].isna()
        for name in architectures:
            own = part[everywhere | (part["architecture"] == name)]
            panels.append((f"{title}, {name}", own.assign(label=own["label"].str.removeprefix(f"{name} "))))
    return panels


def n_columns(n_panels: int) -> int:
    """Returns how many panels stand side by side."""
    return 2 if n_panels <= 4 else 3


def grid(n_panels: int, n_columns: int, width: float, height: float, **shared: Any) -> tuple[Any, list[Any]]:
    """Returns a figure and the axes of its panels, row by row; axes that are not needed are taken away.

    Args:
        n_panels: how many panels.
        n_columns: panels in a row at most.
        width: of a panel, in inches.
        height: likewise.
        shared: `sharex`, `sharey` of matplotlib.
    """
    import matplotlib.pyplot as plt

    n_columns = min(n_columns, n_panels)
    n_rows = -(-n_panels // n_columns)
    size = width * n_columns, height * n_rows
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained", **shared)
    for ax in axes.flat[n_panels:]:
        ax.remove()
    kept = list(axes.flat[:n_panels])
    for ax in kept:  # shared ones have none above a row that is not full
        ax.tick_params(labelbottom=True, labelleft=True)
    return figure, kept


def legend_below(figure: Any, axes: Sequence[Any], title: str | None = None) -> None:
    """Adds one legend for all axes below them."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    longest = max((len(label) for label in found), default=1)
    columns = max(1, min(len(found), _N_LEGEND, int(figure.get_size_inches()[0] * 9 // (longest + 6))))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.22 * -(-len(found) // columns) + 0.3)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, title=title)


def for_readers(keys: Mapping[str, Any], several_models: bool) -> dict[str, Any]:
    """Returns the cells that say in a table for readers which SAE a line is about."""
    model = {"model": keys["model_name"]} if several_models else {}
    return {**model, "SAE at": keys["sae_pos"], "run": keys["label"]}


def _pairs(rows: Any) -> list[tuple[str, str]]:
    """Returns label and type of each line, each label once."""
    shown = rows[["label", "run_type"]].dropna().drop_duplicates("label")
    return list(shown.itertuples(index=False, name=None))


def _variant(label: str, run_type: str) -> str:
    return label.replace(run_type, "").strip(" ,")
