"""How alike directions are: within a dictionary, across seeds, across types of run (arXiv 2405.12241, section 3.3.3).

    largest cosine   of each alive latent's decoder direction with any (other) one of a dictionary: the paper's measure
    one to one       cosines of the pairs, each direction used once, with the largest sum (`similarity.one_to_one`):
                     where one direction is the nearest of many, the largest cosine counts it for each of them

Types are compared within one architecture, at one position of one language model. Where there are several runs of a
type, those that match at equal CE increase are compared.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from e2e_sae.analysis.bootstrap import mean_difference
from e2e_sae.analysis.dictionaries import Dictionary, across, dictionary, within
from e2e_sae.analysis.geometry_figures import draw_across, draw_against_sparsity, draw_within
from e2e_sae.analysis.item import Analysis, Figure, NotApplicable
from e2e_sae.analysis.matching import REFERENCE, SEED_PAIR, SETTINGS, in_order, main_runs, matched
from e2e_sae.analysis.study import Study
from e2e_sae.log import logger
from e2e_sae.progress import progress_bar

N_BINS = 50
"""Of histograms of cosines, from 0 to 1; what is below 0 is in the first one."""
PLACE = ["model_name", "sae_pos", "architecture"]
"""Columns whose values runs that are compared share."""
KEYS = [*PLACE, "layer", "run_type", "kind"]
ALL_BUT_SEED = [*KEYS, *SETTINGS, "d_sae", "k", "sparsity_coeff", "target_l0"]
"""Columns in which runs that differ in their seed alone are equal."""


def one_per_kind(table: Any) -> Any:
    """Returns one run for each kind and position: the first seed of each, or those that match at equal CE increase,
    in the order of layers and kinds.

    Raises:
        NotApplicable: they do not say what their CE increase is.
    """
    first = table.loc[table.sort_values("seed", kind="stable").drop_duplicates(ALL_BUT_SEED).index.sort_values()]
    has_several = first.duplicated(["model_name", "sae_pos", "kind"]).any()
    found = matched(table, by="CE") if has_several else first
    if found.empty:
        raise NotApplicable("it wants one run of each kind, or runs whose CE increase is known")
    order = {kind: n for n, kind in enumerate(in_order(found["kind"]))}
    return found.sort_values("kind", key=lambda kinds: kinds.map(order)).sort_values("layer", kind="stable")


def within_table(study: Study) -> Any:
    """Returns the histogram of each run's largest cosines with other directions of its dictionary, a row for each bin.

    `difference`, `low`, `high`: mean of the local run of the same place minus its own, with the bootstrap interval.
    """
    import pandas as pd

    parts: list[Any] = []
    for _, rows in one_per_kind(study.table).groupby(PLACE, sort=False, dropna=False):
        found = {row["id"]: (row, within(study, a).cosines) for row, a in _dictionaries(study, rows, at_least=2)}
        local = next((cosines for row, cosines in found.values() if row["run_type"] == REFERENCE), None)
        for row, cosines in found.values():
            facts: dict[str, Any] = {"n_alive": len(cosines), "mean": _mean(cosines)}
            if local is not None and row["run_type"] != REFERENCE:
                facts |= mean_difference(local.numpy(), cosines.numpy(), seed=study.seed)._asdict()
            parts.append(_histograms({"share": cosines}).assign(**_keys(row, ["id", "L0", "CE_increase"]), **facts))
    if not parts:
        raise NotApplicable("it wants SAEs with at least two alive latents")
    return pd.concat(parts, ignore_index=True)


def sparsity_table(study: Study) -> Any:
    """Returns the mean of the largest cosines within the dictionary of each run of the frontiers, with its L0 and CE
    increase."""
    import pandas as pd

    rows = main_runs(study.table)
    if not rows.duplicated(["model_name", "sae_pos", "kind"]).any():
        raise NotApplicable("it wants several runs of a kind")
    bar = progress_bar(_dictionaries(study, rows, at_least=2), total=len(rows), desc="dictionaries")
    return pd.DataFrame(
        [
            {
                **_keys(row, ["id", "seed", "L0", "CE_increase"]),
                "n_alive": len(a),
                "mean": _mean(within(study, a).cosines),
            }
            for row, a in bar
        ]
    )


def seeds_table(study: Study) -> Any:
    """Returns how near the dictionaries of runs are that are equal in everything but their seed, a row for each bin.

    Of two runs, the one with the smaller seed is A. `shown`: the pair is in the figure. A column `seed_pair` of the
    table of runs says instead which are compared, and all are shown.
    """
    import pandas as pd

    named = study.table.dropna(subset=[SEED_PAIR]) if SEED_PAIR in study.table else study.table.head(0)
    alike = (
        study.table.groupby(ALL_BUT_SEED, sort=False, dropna=False)
        if named.empty
        else named.groupby([SEED_PAIR, "sae_pos"])
    )
    groups = [rows.drop_duplicates("seed").sort_values("seed") for _, rows in alike]
    groups = [rows for rows in groups if len(rows) > 1]
    if not groups:
        raise NotApplicable("it wants runs that are equal in everything but their seed")
    means = [{name: rows[name].mean() for name in ("L0", "CE_increase")} for rows in groups]
    heads = pd.DataFrame([{**rows.iloc[0], **mean} for rows, mean in zip(groups, means, strict=True)])
    shown = set(heads["id"] if len(named) else one_per_kind(heads)["id"])
    parts: list[Any] = []
    for rows, mean in zip(progress_bar(groups, desc="pairs of seeds"), means, strict=True):
        facts = {**mean, "shown": rows.iloc[0]["id"] in shown}
        for (row, a), (other, b) in combinations(_dictionaries(study, rows, at_least=1), 2):
            seeds = {"seed_a": row["seed"], "seed_b": other["seed"]}
            parts.append(_compared(study, a, b).assign(**_keys(row), **seeds, **facts))
    return pd.concat(parts, ignore_index=True)


def types_table(study: Study) -> Any:
    """Returns how near each dictionary (A) is to the local one (B) of the same place, a row for each bin."""
    import pandas as pd

    parts: list[Any] = []
    for _, rows in one_per_kind(study.table).groupby(PLACE, sort=False, dropna=False):
        if {REFERENCE} < set(rows["run_type"]):
            found = list(_dictionaries(study, rows, at_least=1))
            local = [b for row, b in found if row["run_type"] == REFERENCE]
            for row, a in found:
                if local and row["run_type"] != REFERENCE:
                    facts = _keys(row, ["L0", "CE_increase"])
                    parts.append(_compared(study, a, local[0]).assign(**facts))
    if not parts:
        raise NotApplicable("it wants a local run and one of another type, at one position, of one architecture")
    return pd.concat(parts, ignore_index=True).assign(shown=True)


def within_text(table: Any) -> Any:
    """Returns the means and their differences, a row for each run."""
    rows = _lines(table)
    shown = _places(rows).assign(alive=rows["n_alive"], mean=rows["mean"])
    if "difference" in rows:
        shown["local - it"] = rows["difference"]
        shown["95 % interval"] = [_interval(low, high) for low, high in zip(rows["low"], rows["high"], strict=True)]
    return shown


def across_text(table: Any) -> Any:
    """Returns the means, a row for each pair of runs."""
    rows = _lines(table)
    shown = _places(rows).assign(**{name: rows[name] for name in ("L0", "CE_increase")})
    if "seed_a" in rows:
        shown["seeds"] = [f"{a}, {b}" for a, b in zip(rows["seed_a"], rows["seed_b"], strict=True)]
    return shown.assign(
        **{"alive, A": rows["n_a"], "alive, B": rows["n_b"], "largest cosine": rows["mean_largest"]},
        **{"one to one": rows["mean_one_to_one"], "nearest used again": rows["share_used_again"]},
    )


def _dictionaries(study: Study, rows: Any, at_least: int) -> Any:
    """Yields (row, dictionary) of the rows whose SAE has at least so many alive latents."""
    for row in rows.to_dict("records"):
        found = dictionary(study, row["id"], row["sae_pos"])
        if len(found) >= at_least:
            yield row, found
        else:
            logger.info(f"{row['source']}: left out, {len(found)} of its latents at {row['sae_pos']} are alive")


def _compared(study: Study, a: Dictionary, b: Dictionary) -> Any:
    """Returns the histograms of two dictionaries' cosines and what there is to say of them, a row for each bin."""
    found = across(study, a, b)
    return _histograms({"share_largest": found.cosines, "share_one_to_one": found.pair_cosines}).assign(
        id_a=a.run_id,
        id_b=b.run_id,
        n_a=len(a),
        n_b=len(b),
        mean_largest=_mean(found.cosines),
        mean_one_to_one=_mean(found.pair_cosines),
        share_used_again=1 - len(found.nearest.unique()) / len(a),
    )


def _histograms(values: Mapping[str, Float[Tensor, " n"]]) -> Any:
    import pandas as pd

    edges = torch.linspace(0, 1, N_BINS + 1, dtype=torch.float64)
    columns = {"cosine_from": edges[:-1], "cosine_to": edges[1:]}
    for name, cosines in values.items():
        bins = (cosines.double().clamp(0, 1) * N_BINS).long().clamp_max(N_BINS - 1)
        columns[name] = torch.bincount(bins, minlength=N_BINS).double() / len(cosines)
    return pd.DataFrame({name: column.numpy() for name, column in columns.items()})


def _keys(row: Mapping[str, Any], more: Sequence[str] = ()) -> dict[str, Any]:
    return {name: row[name] for name in [*KEYS, *more]}


def _mean(cosines: Float[Tensor, " n"]) -> float:
    return float(cosines.double().mean())


def _lines(table: Any) -> Any:
    """Returns a row for each histogram of a table."""
    ids = [name for name in ("id", "id_a", "id_b", "sae_pos") if name in table]
    return table.drop_duplicates(ids).reset_index(drop=True)


def _places(rows: Any) -> Any:
    shown = rows[["model_name", "sae_pos", "kind"]]
    shown = shown if rows["model_name"].nunique() > 1 else shown.drop(columns="model_name")
    return shown.rename(columns={"model_name": "model", "sae_pos": "SAE at"})


def _interval(low: float, high: float) -> str | None:
    return None if low != low else f"{low:.3f} to {high:.3f}"


_ABOUT = "cosines of decoder directions"
_DECIMALS = {"L0": 1}
ANALYSES = (
    Analysis(
        "within_similarity",
        f"{_ABOUT} with the nearest other one of the same dictionary (fig. 3a)",
        within_table,
        [Figure("within_similarity", draw_within)],
        within_text,
    ),
    Analysis(
        "within_similarity_all",
        f"{_ABOUT} within dictionaries against L0, CE increase and alive latents (fig. 7)",
        sparsity_table,
        [Figure("within_similarity_all", draw_against_sparsity)],
    ),
    Analysis(
        "cross_seed_similarity",
        f"{_ABOUT} with those of another seed: nearest, and one to one (fig. 3b)",
        seeds_table,
        [Figure("cross_seed_similarity", draw_across)],
        across_text,
        _DECIMALS,
    ),
    Analysis(
        "cross_type_similarity",
        f"{_ABOUT} with those of the local run: nearest, and one to one (figs. 3c and 8)",
        types_table,
        [Figure("cross_type_similarity", draw_across)],
        across_text,
        _DECIMALS,
    ),
)
