"""Runs at equal cost or equal sparsity: the nearest of each kind, and frontiers read off between the runs.

The frontier of some runs in x (L0 or alive elements) and the CE increase is their lower envelope: the runs that no
other one beats with fewer x and no higher CE increase, joined by straight lines. Between its ends the CE increase
falls strictly, so that it can be read in both directions, whatever the runs that are beaten do.

Runs that differ in more than their sparsity do not lie on one frontier: see `main_runs`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from e2e_sae.run_types import COLOURS
from e2e_sae.saes import SAEConfig

Measure = Literal["CE", "L0", "alive"]
COLUMNS: dict[Measure, str] = {"CE": "CE_increase", "L0": "L0", "alive": "alive_dict_elements"}
"""The table's column of each measure."""
REFERENCE = "local"
"""The type that the others are compared with."""
PLACE = ["model_name", "sae_pos"]
"""What runs have in common that are compared."""
SETTINGS = ["lr", "ratio", "n_samples", "kl_coeff", "in_to_orig_coeff", "out_to_in_coeff"]
"""What runs of one frontier have in common besides their kind; what differs is the sparsity, and the seed."""
IS_MAIN = "is_main"
"""Column of tables in which somebody has chosen the runs of the frontiers."""
MATCHED = "matched_{}"
"""Columns, one for each measure, of tables in which somebody has chosen the runs that are alike in it."""
SEED_PAIR = "seed_pair"
"""Column of tables in which somebody has chosen the runs that are compared across seeds: a number for each pair."""
REACH = 0.1
"""How far, as a share of it, a target may lie beyond the runs of a kind that is still compared."""
MIN_VALUE = 1e-6
"""Smaller ones, and negative CE increases, are as near to each other as can be."""
N_POINTS = 20
"""Points that the summary number is the mean over (the paper's code)."""


class Frontier(NamedTuple):
    """A lower envelope."""

    x: Any
    """Rising (numpy)."""
    ce: Any
    """CE increase at each x, falling."""

    def ce_at(self, x: Any) -> Any:
        """Returns the CE increase at these x; NaN beyond the ends."""
        return np.interp(x, self.x, self.ce, left=np.nan, right=np.nan)

    def x_at(self, ce: Any) -> Any:
        """Returns the x with this CE increase; NaN beyond the ends."""
        return np.interp(ce, self.ce[::-1], self.x[::-1], left=np.nan, right=np.nan)


def frontier(x: Any, ce: Any) -> Frontier:
    """Returns the lower envelope of points; those with a NaN are left out."""
    x, ce = np.asarray(x, dtype=float), np.asarray(ce, dtype=float)
    kept = ~(np.isnan(x) | np.isnan(ce))
    order = np.lexsort((ce[kept], x[kept]))
    x, ce = x[kept][order], ce[kept][order]
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], ce[:-1]])) if len(ce) else ce
    is_best = ce < best_before
    return Frontier(x[is_best], ce[is_best])


def main_runs(table: Any) -> Any:
    """Returns the runs that lie on the frontiers: of each kind at each place those with the `SETTINGS` that most of its
    runs have; between settings of equally many runs, those with the most samples, then the lower mean CE increase.

    The others are for the comparisons of these settings alone, as in the paper. A column `is_main` says it instead.
    """
    if IS_MAIN in table and table[IS_MAIN].any():
        return table[table[IS_MAIN]]
    kept: list[Any] = []
    for _, runs in table.groupby([*PLACE, "kind"], sort=False, dropna=False):
        settings = [tuple(row) for row in runs[SETTINGS].fillna(0.0).itertuples(index=False)]
        by_setting = {setting: runs[[other == setting for other in settings]] for setting in dict.fromkeys(settings)}
        kept.append(max(by_setting.values(), key=_precedence))
    return table.loc[[index for runs in kept for index in runs.index]].sort_index()


def matched(table: Any, by: Measure) -> Any:
    """Returns comparable runs: one row for each kind at each place, with `target` and `distance` to it.

    The target is the value of a run of the reference (the paper's local SAEs; else local SAEs; else the kind with the
    most runs): of the one that most kinds reach, and of several such, of the one that they come nearest to: the
    largest ratio between it and the nearest run of each is the smallest. A kind reaches it if it is between its runs,
    or no more than `REACH` beyond them. Of each such kind the run nearest to the target is taken; of a kind with one
    run, that one. Only runs of one seed are looked at, the first that most kinds have (of kinds without it all runs):
    SAEs that begin alike stay alike. Where a column `matched_CE` (`_L0`, `_alive`) names runs of a place, these are
    taken, and the target is their median.

    Args:
        table: of runs.
        by: what is to be equal.
    """
    column, chosen_before = COLUMNS[by], MATCHED.format(by)
    measured = main_runs(table.dropna(subset=[*dict.fromkeys([column, "L0", "CE_increase"])]))
    targets: dict[Any, float] = {}
    for _, runs in measured.groupby(PLACE, sort=False, dropna=False):
        known = runs[runs[chosen_before]] if chosen_before in runs else runs.head(0)
        runs = runs if len(known) else _of_one_seed(runs)
        target = float(known[column].median()) if len(known) else _target(runs, column)
        for kind, own in runs.groupby("kind"):
            named = known[known["kind"] == kind]
            if len(named) or len(own) == 1 or _reaches(own[column], target):
                targets[((named if len(named) else own)[column] - target).abs().idxmin()] = target
    chosen = in_papers_order(measured.loc[list(targets)].assign(target=list(targets.values())))
    return chosen.assign(distance=chosen[column] - chosen["target"]).reset_index(drop=True)


def at_equal_L0(table: Any, L0s: Sequence[int | float]) -> Any:
    """Returns the CE increase of each kind, place and seed at these L0, read off its frontier; NaN beyond its ends."""
    return _read_off(table, {"L0": L0s}, lambda front: front.ce_at(L0s), "CE_increase")


def L0_at_equal_CE(table: Any, CE_increases: Sequence[int | float]) -> Any:
    """Returns the L0 of each kind, place and seed at these CE increases, read off its frontier; NaN beyond its ends."""
    return _read_off(table, {"CE_increase": CE_increases}, lambda front: front.x_at(CE_increases), "L0")


def common_level(table: Any, column: str) -> float:
    """Returns the value of a run that most kinds have on both sides: of several such, the one in the middle."""
    ranges = [(own.min(), own.max()) for _, own in table.groupby("kind")[column]]
    values = np.sort(table[column].unique())
    n_reached = np.array([sum(low <= value <= high for low, high in ranges) for value in values])
    best = values[n_reached == n_reached.max()]
    return float(best[(len(best) - 1) // 2])


def summary_numbers(table: Any) -> Any:
    """Returns what share of the local SAEs' CE increase each type has at the same L0, and at as many alive elements.

        share = mean over 20 evenly spaced x of CE(type, x) / CE(local, x)

    on frontiers, over the x that both of them reach; local SAEs of the same architecture, place and seed. (The paper's
    code has fixed ranges: L0 50 to 300, 23k to 35k alive.)

    Returns:
        A row for each type and x: `share`, its mean over seeds; `spread`, their standard deviation, NaN for one seed;
        `seeds`, how many; `from` and `to`, the range, the narrowest over the seeds; `x_share`: the mean share of
        local's x that the type needs for the same CE increase, likewise.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    main = main_runs(table)
    for key, runs in main.groupby([*PLACE, "architecture"], sort=False, dropna=False):
        for kind in in_order(runs["run_type"]):
            for x in ("L0", "alive"):
                shares = list(_shares(runs, kind, COLUMNS[x]))
                if kind == REFERENCE or not shares:
                    continue
                of_ce, of_x = ([getattr(share, name) for share in shares] for name in ("of_ce", "of_x"))
                head = {**dict(zip([*PLACE, "architecture"], key, strict=True)), "layer": runs["layer"].iloc[0]}
                spread = float(np.std(of_ce, ddof=1)) if len(shares) > 1 else float("nan")
                row = {"run_type": kind, "x": x, "share": float(np.mean(of_ce)), "spread": spread}
                ends = {"from": max(share.low for share in shares), "to": min(share.high for share in shares)}
                x_share = float(np.nanmean(of_x)) if not np.isnan(of_x).all() else float("nan")
                rows.append({**head, **row, "seeds": len(shares), **ends, "x_share": x_share})
    return in_papers_order(pd.DataFrame(rows)) if rows else pd.DataFrame()


def in_papers_order(table: Any) -> Any:
    """Returns a table's rows by model, layer, architecture (the paper's first) and type of run, in `in_order`."""
    types, architectures = in_order(table["run_type"]), sorted(set(table["architecture"]), key=_papers_first)
    keys = [name for name in ("model_name", "layer", "sae_pos") if name in table]
    ranks = {"architecture_rank": table["architecture"].map(architectures.index)}
    ranks["type_rank"] = table["run_type"].map(types.index)
    return table.assign(**ranks).sort_values([*keys, *ranks], kind="stable").drop(columns=list(ranks))


def in_order(kinds: Any) -> list[str]:
    """Returns the different ones, the paper's types first, in its order, then by the type they end in."""
    names = dict.fromkeys(kinds)
    order = {name: n for n, name in enumerate(COLOURS)}
    return sorted(names, key=lambda name: (name not in order, order.get(name.rpartition(" ")[2], len(order)), name))


def _papers_first(architecture: str) -> tuple[bool, str]:
    return architecture != SAEConfig().architecture, architecture


class _Share(NamedTuple):
    of_ce: float
    of_x: float
    low: float
    high: float


def _shares(runs: Any, kind: str, column: str) -> Iterator[_Share]:
    """Yields the shares of each seed that both the kind and local SAEs have."""
    for _, of_seed in runs.groupby("seed", sort=True):
        own, local = (
            frontier(some[column], some["CE_increase"])
            for some in (of_seed[of_seed["run_type"] == kind], of_seed[of_seed["run_type"] == REFERENCE])
        )
        if not len(own.x) or not len(local.x):
            continue
        low, high = max(own.x[0], local.x[0]), min(own.x[-1], local.x[-1])
        if low > high:
            continue
        at = np.linspace(low, high, N_POINTS)
        ratios = own.ce_at(at) / local.ce_at(at)
        costs = np.linspace(max(own.ce[-1], local.ce[-1]), min(own.ce[0], local.ce[0]), N_POINTS)
        x_ratios = own.x_at(costs) / local.x_at(costs)
        of_x = float(x_ratios.mean()) if costs[0] <= costs[-1] else float("nan")
        yield _Share(float(ratios.mean()), of_x, float(low), float(high))


def _read_off(table: Any, given: dict[str, Sequence[int | float]], read: Any, column: str) -> Any:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    ((name, values),) = given.items()
    for key, runs in main_runs(table).groupby([*PLACE, "kind", "seed"], sort=False, dropna=False):
        found = read(frontier(runs["L0"], runs["CE_increase"]))
        head = dict(zip([*PLACE, "kind", "seed"], key, strict=True))
        rows += [{**head, name: value, column: result} for value, result in zip(values, found, strict=True)]
    return pd.DataFrame(rows)


def _of_one_seed(runs: Any) -> Any:
    """Returns of each kind the runs of the first seed that most kinds have; of kinds without it all runs."""
    n_kinds = runs.groupby("seed")["kind"].nunique()
    is_seed = runs["seed"] == n_kinds.index[n_kinds == n_kinds.max()].min()
    return runs[is_seed | ~runs["kind"].isin(runs["kind"][is_seed])]


def _target(runs: Any, column: str) -> float:
    """Returns the value that the runs at one place are matched at."""
    is_local = runs["run_type"] == REFERENCE
    is_papers = is_local & (runs["architecture"] == SAEConfig().architecture)
    most = runs["kind"] == runs["kind"].value_counts().index[0]
    reference = next(runs[chosen] for chosen in (is_papers, is_local, most) if chosen.any())
    values = np.sort(reference[column].unique())
    by_kind = [own[column] for _, own in runs.groupby("kind")]
    reached = [[own for own in by_kind if _reaches(own, value)] for value in values]
    ranks = [
        (-len(kinds), max(_distance(own, value) for own in kinds), abs(value - reference[column].median()))
        for value, kinds in zip(values, reached, strict=True)
    ]
    return float(values[ranks.index(min(ranks))])


def _reaches(values: Any, target: Any) -> bool:
    slack = REACH * abs(target)
    return bool(values.min() - slack <= target <= values.max() + slack)


def _distance(values: Any, target: Any) -> float:
    """Returns how far the nearest of the values is from the target, as a logarithm of their ratio."""
    return float(np.abs(np.log(np.maximum(values, MIN_VALUE) / max(target, MIN_VALUE))).min())


def _precedence(runs: Any) -> tuple[int, float, float]:
    n_samples = runs["n_samples"].fillna(0.0).max()
    return len(runs), float(n_samples), -float(runs["CE_increase"].fillna(np.inf).mean())
