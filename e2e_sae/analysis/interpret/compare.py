"""How interpretable SAEs are beside each other, as in Table 4 and Fig. 9 of arXiv 2405.12241.

Difference of mean scores with its bootstrap interval (95 %) and two-sided bootstrap p value, both from 100,000
resamples; violins of the scores with the mean and its interval from Student's t:

    mean +- t(0.975; n - 1) s / sqrt(n)
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from e2e_sae.analysis.bootstrap import mean_difference, p_value
from e2e_sae.analysis.looks import line_looks

N_RESAMPLES = 100_000
"""The paper's, for Table 4."""
KINDS_OF_SCORE = ["explainer", "scored_by", "scorer", "measure"]
"""Columns of the table of scores; only scores that agree in them can be compared."""


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Returns the mean and its interval from Student's t; without ends for fewer than two values."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return Interval(float(np.mean(values)) if n else float("nan"), float("nan"), float("nan"))
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / n**0.5
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Interval(mean, mean - half, mean + half)


def mean_scores(scores: Any) -> Any:
    """Returns a table of mean scores, one row for each SAE and kind of score.

    Args:
        scores: one row for each latent and score, as `run.py` writes them.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for kind, part in scores.groupby(KINDS_OF_SCORE, sort=False):
        for label in scores["label"].unique():
            here = part[part["label"] == label]
            values, n_failed = here["score"].dropna().tolist(), int(here["n_failed"].sum())
            mean = t_interval(values)
            rows.append(
                {"label": label, **dict(zip(KINDS_OF_SCORE, kind, strict=True)), "n": len(values)}
                | mean._asdict()
                | {"n_failed": n_failed}
            )
    return pd.DataFrame(rows)


def differences(scores: Any, seed: int = 0) -> Any:
    """Returns a table of the differences of mean scores, one row for each pair of SAEs and kind of score.

    Pairs are of SAEs at the same hook point of the same model; where there are none, of all. The first of a pair is
    the one that comes first in the table.

    Args:
        scores: one row for each latent and score.
        seed: of the bootstrap.
    """
    import pandas as pd

    saes = scores.drop_duplicates("label")
    places = {row.label: (row.model_name, row.sae_pos) for row in saes.itertuples()}
    pairs = list(combinations(places, 2))
    pairs = [(a, b) for a, b in pairs if places[a] == places[b]] or pairs
    rows: list[dict[str, Any]] = []
    for kind, part in scores.groupby(KINDS_OF_SCORE, sort=False):
        for first, second in pairs:
            a, b = (part.loc[part["label"] == label, "score"].dropna().to_numpy() for label in (first, second))
            if not (len(a) and len(b)):
                continue
            difference = mean_difference(b, a, N_RESAMPLES, seed)
            rows.append(
                {"sae_pos": places[first][1] if places[first] == places[second] else None}
                | {"first": first, "second": second, **dict(zip(KINDS_OF_SCORE, kind, strict=True))}
                | {"n_first": len(a), "n_second": len(b), **difference._asdict()}
                | {"p": p_value(b, a, N_RESAMPLES, seed)}
            )
    return pd.DataFrame(rows)


def table_4(differences: Any) -> Any:
    """Returns the table of differences as readers see it, laid out as the paper's Table 4."""
    import pandas as pd

    return pd.DataFrame(
        {
            "hook point": differences["sae_pos"],
            "difference": [f"{row.second} - {row.first}" for row in differences.itertuples()],
            "score": [f"{row.scorer} ({row.measure})" for row in differences.itertuples()],
            "n": [f"{row.n_second}, {row.n_first}" for row in differences.itertuples()],
            "mean": differences["difference"].round(2),
            "95 % CI": [_interval(row.low, row.high) for row in differences.itertuples()],
            "p": [f"{p:.2g}" for p in differences["p"]],
        }
    )


def draw_violins(scores: Any) -> Any:
    """Draws the distribution of every kind of score for each SAE, with the mean and its interval (Fig. 9)."""
    import matplotlib.pyplot as plt

    kinds = list(scores.groupby(KINDS_OF_SCORE, sort=False))
    saes = scores.drop_duplicates("label")["label"].tolist()
    looks = line_looks(scores)
    figure = plt.figure(figsize=(max(4.0, 1.0 + 0.9 * len(saes)) * len(kinds), 4.6), layout="constrained")
    for ax, (kind, part) in zip(figure.subplots(1, len(kinds), squeeze=False).flat, kinds, strict=True):
        names = dict(zip(KINDS_OF_SCORE, kind, strict=True))
        for x, label in enumerate(saes):
            values = part.loc[part["label"] == label, "score"].dropna().tolist()
            if values:
                _violin(ax, x, values, looks[label]["color"])
        ax.set_xticks(range(len(saes)), saes, rotation=30, ha="right")
        ax.set_xlim(-0.6, len(saes) - 0.4)
        ax.set_ylabel(f"{names['measure']} per latent")
        scored_by = "" if names["scored_by"] == names["scorer"] else f" by {names['scored_by']}"
        ax.set_title(f"{names['scorer']}{scored_by}\nexplained by {names['explainer']}", fontsize="medium")
        if names["measure"] != "correlation":
            ax.axhline(0.5, color="0.5", linewidth=1, linestyle="--")
            ax.annotate(" chance", (1.0, 0.5), xycoords=("axes fraction", "data"), va="center", fontsize="small")
    return figure


def _violin(ax: Any, x: int, values: list[float], colour: str) -> None:
    body = ax.violinplot([values], positions=[x], widths=0.8, showextrema=False)["bodies"][0]
    body.set(facecolor=colour, edgecolor=colour, alpha=0.45)
    mean, low, high = t_interval(values)
    ends = [[mean - low], [high - mean]] if low == low else None
    ax.errorbar([x], [mean], yerr=ends, fmt="o", color="black", capsize=5, markersize=4)
    ax.annotate(f"n = {len(values)}", (x, 0.01), xycoords=("data", "axes fraction"), ha="center", fontsize="small")


def _interval(low: float, high: float) -> str:
    return "–" if low != low else f"[{low:.2f}, {high:.2f}]"
