"""The paper's own runs (arXiv 2405.12241): which they are, and which of them its figures and tables show.

`scripts/analysis/paper_runs.yaml` names them; their numbers come from W&B.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import PositiveFloat

from e2e_sae.analysis.matching import COLUMNS, IS_MAIN, MATCHED, SEED_PAIR, Measure
from e2e_sae.analysis.runs import runs_table
from e2e_sae.base_config import BaseConfig
from e2e_sae.run_types import COLOURS
from e2e_sae.settings import REPO_ROOT

FILE = REPO_ROOT / "e2e_sae" / "scripts" / "analysis" / "paper_runs.yaml"


class PaperProject(BaseConfig):
    """One W&B project."""

    project: str
    """`entity/project`."""
    max_L0: PositiveFloat
    """Runs with a larger L0 are left out."""
    main: list[dict[str, str | int | float]]
    """What runs of the frontiers have in the columns of the table: all of one of these."""
    max_main_L0: dict[int, PositiveFloat] = {}
    """The largest L0 on the frontier, by block."""
    words: list[str] = []
    """Runs with one of these in their name are not on the frontiers."""
    matched: dict[Measure, dict[int, dict[str, str]]] = {}
    """Run ids by what is equal, block, and type of run."""
    seed_pairs: list[tuple[str, str]] = []
    """Run ids that are compared across seeds."""


class PaperRuns(BaseConfig):
    """`paper_runs.yaml`."""

    colours: dict[str, str]
    """Of types of run, in the published figures."""
    projects: list[PaperProject]
    """Where the runs are."""


def papers_table(paper: PaperRuns) -> Any:
    """Returns the table of the paper's runs, with the columns that say which of them its figures and tables show.

    Raises:
        MissingFileError: W&B cannot be reached, or does not show them.
        UserError: W&B refused the key.
    """
    import pandas as pd

    tables = [chosen_as_published(runs_table([project.project]), project) for project in paper.projects]
    return pd.concat(tables, ignore_index=True)


def chosen_as_published(table: Any, project: PaperProject) -> Any:
    """Returns a project's runs without the ones that the paper leaves out, with `is_main`, `matched_<measure>` and
    `seed_pair`."""
    table = table[~(table["L0"] > project.max_L0)].reset_index(drop=True)
    columns = {
        MATCHED.format(measure): table["id"].isin(
            [run_id for ids in project.matched.get(measure, {}).values() for run_id in ids.values()]
        )
        for measure in COLUMNS
    }
    pair_of = {run_id: n for n, pair in enumerate(project.seed_pairs) for run_id in pair}
    table = table.assign(**columns, **{SEED_PAIR: table["id"].map(pair_of)})
    is_main = [_is_main(row, project) for row in table.to_dict("records")]
    return table.assign(**{IS_MAIN: is_main})


@contextmanager
def published_colours(paper: PaperRuns) -> Iterator[None]:
    """Draws types of run in the published figures' colours in this block."""
    ours = dict(COLOURS)
    COLOURS.update(paper.colours)
    try:
        yield
    finally:
        COLOURS.update(ours)


def _is_main(row: dict[str, Any], project: PaperProject) -> bool:
    if any(row[MATCHED.format(measure)] for measure in COLUMNS):
        return True
    is_plain = not any(word in row["name"] for word in project.words)
    is_sparse = not row["L0"] > project.max_main_L0.get(row["layer"], project.max_L0)
    return is_plain and is_sparse and any(all(row[k] == v for k, v in line.items()) for line in project.main)
