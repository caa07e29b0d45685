"""Tables for readers: Markdown and LaTeX, with the same cells."""

from collections.abc import Mapping
from typing import Any

_ESCAPED = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}


def as_markdown(table: Any, decimals: Mapping[str, int]) -> str:
    """Returns a pandas table as a Markdown table.

    Args:
        table: the cells; NaN and None are shown as a dash.
        decimals: of columns; not named: 3 for numbers with a fraction.
    """
    rows = _cells(table, decimals)
    lines = [_line([str(name) for name in table.columns]), "|---" * len(table.columns) + "|", *map(_line, rows)]
    return "\n".join(lines) + "\n"


def as_latex(table: Any, decimals: Mapping[str, int]) -> str:
    """Returns a pandas table as a LaTeX `tabular` with booktabs' rules; see `as_markdown`."""
    kinds = "".join("r" if table[name].dtype.kind in "fiu" else "l" for name in table.columns)
    header = [str(name) for name in table.columns]
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in [header, *_cells(table, decimals)]]
    body = [lines[0], r"\midrule", *lines[1:]]
    return "\n".join([rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _cells(table: Any, decimals: Mapping[str, int]) -> list[list[str]]:
    return [
        [_cell(value, decimals.get(str(name), 3)) for name, value in zip(table.columns, row, strict=True)]
        for row in table.itertuples(index=False)
    ]


def _cell(value: Any, decimals: int) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _escaped(text: str) -> str:
    return "".join(_ESCAPED.get(c, c) for c in text).replace("–", "--")
