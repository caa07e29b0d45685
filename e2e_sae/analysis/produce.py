"""`e2e-sae analyse`: makes analyses of a study, and writes what they give.

DIR/runs.csv         the table of runs
DIR/NAME.csv         an analysis' table; .md and .tex where it is one for readers
DIR/FIGURE.png .svg  its figures, made from the table alone
DIR/cache/           what took long to compute
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2e_sae.analysis.item import Analysis, NotApplicable
from e2e_sae.analysis.study import Study
from e2e_sae.analysis.texts import as_latex, as_markdown
from e2e_sae.checkpoint.files import make_out_folder, new_file, write_text
from e2e_sae.log import logger
from e2e_sae.plotting import STYLE

DPI = 200
"""Of the PNG files."""


def produce(study: Study, analyses: Sequence[Analysis], out: Path) -> dict[str, list[Path]]:
    """Makes analyses, one after another, and returns the files of each; one that does not apply has none.

    Args:
        study: the runs.
        analyses: in this order.
        out: folder, made if it is not there; files of an earlier time are written anew.
    """
    make_out_folder(out)
    write_table(study.table, out / "runs.csv")
    made: dict[str, list[Path]] = {}
    for n, analysis in enumerate(analyses, start=1):
        start = time.monotonic()
        try:
            table = analysis.compute(study)
        except NotApplicable as reason:
            logger.info(f"[{n}/{len(analyses)}] {analysis.name}: left out, {reason}")
            made[analysis.name] = []
            continue
        made[analysis.name] = _write(analysis, table, out)
        names = ", ".join(path.name for path in made[analysis.name] if path.suffix != ".svg")
        logger.info(f"[{n}/{len(analyses)}] {analysis.name}: {names} ({time.monotonic() - start:.1f} s)")
    return made


def _write(analysis: Analysis, table: Any, out: Path) -> list[Path]:
    files = [write_table(table, out / f"{analysis.name}.csv")]
    if analysis.text is not None:
        shown = analysis.text(table)
        for suffix, text in (("md", as_markdown), ("tex", as_latex)):
            files.append(out / f"{analysis.name}.{suffix}")
            write_text(files[-1], text(shown, analysis.decimals or {}))
    for figure in analysis.figures:
        files += save_figure(figure.draw, table, out / figure.name)
    return files


def write_table(table: Any, file: Path) -> Path:
    """Writes a pandas table as CSV, whole or not at all, and returns the file."""
    write_text(file, table.to_csv(index=False))
    return file


def save_figure(draw: Any, table: Any, stem: Path) -> list[Path]:
    """Draws a figure from a table, saves it as PNG and SVG, and returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.style.context(STYLE):
        figure = draw(table)
        files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
        for file in files:
            with new_file(file) as temporary:
                figure.savefig(temporary, dpi=DPI, format=file.suffix[1:])
        plt.close(figure)
    return files
