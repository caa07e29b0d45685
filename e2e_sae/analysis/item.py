"""What an analysis is: a table computed from runs, and figures and texts made from that table alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e2e_sae.analysis.study import Study


class NotApplicable(Exception):
    """The runs have nothing for an analysis: it is left out, and the message says what it wants."""


@dataclass(frozen=True)
class Figure:
    """One figure of an analysis."""

    name: str
    """Stem of its files."""
    draw: Callable[[Any], Any]
    """Makes the matplotlib figure from the analysis' table (pandas)."""


@dataclass(frozen=True)
class Analysis:
    """One analysis: everything it makes is called `<name>*`."""

    name: str
    """What it is called on the command line, and its files."""
    about: str
    """One line: what it shows, and where the paper (arXiv 2405.12241) has it."""
    compute: Callable[["Study"], Any]
    """Makes its table (pandas), saved as `<name>.csv`; raises `NotApplicable` where the runs are too few."""
    figures: Sequence[Figure] = ()
    """Made from the table, saved as PNG and SVG."""
    text: Callable[[Any], Any] | None = None
    """Makes the table as the reader sees it, few and rounded columns, saved as Markdown and LaTeX; None: none."""
    decimals: Mapping[str, int] | None = None
    """Decimals of the columns of the text; None or missing: 3 for numbers with a fraction."""
