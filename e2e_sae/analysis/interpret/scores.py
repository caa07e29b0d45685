"""How well predictions of a latent's activity fit: three numbers, each 1 at best.

    balanced accuracy  (share of the true ones called true + share of the false ones called false) / 2;  chance: 1/2
    AUC                P(a true one is rated above a false one), ties half;  chance: 1/2
    correlation        Pearson's r over all tokens of all contexts together (Bills et al. 2023);  chance: 0

For yes-or-no answers AUC and balanced accuracy are the same number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Score(NamedTuple):
    """One score of one latent."""

    scorer: str
    measure: str
    """`balanced accuracy`, `AUC` or `correlation`."""
    score: float
    """NaN where nothing could be scored."""
    n_examples: int
    """Contexts it is about."""
    n_failed: int
    """Contexts that are missing, because no answer about them could be read."""


def balanced_accuracy(truth: Sequence[bool], predicted: Sequence[bool]) -> float:
    """Returns the balanced accuracy; NaN where all are true, or none is.

    >>> balanced_accuracy([True, True, False, False], [True, False, False, False])
    0.75
    """
    if all(truth) or not any(truth):
        return float("nan")
    right = [p == t for t, p in zip(truth, predicted, strict=True)]
    shares = [np.mean([r for t, r in zip(truth, right, strict=True) if t == kind]) for kind in (True, False)]
    return float(np.mean(shares))


def auc(truth: Sequence[bool], rating: Sequence[float]) -> float:
    """Returns the area under the ROC curve; NaN where all are true, or none is.

    >>> auc([True, True, False], [2.0, 1.0, 1.0])
    0.75
    """
    if all(truth) or not any(truth):
        return float("nan")
    is_true = np.asarray(truth)
    above, below = np.asarray(rating)[is_true][:, None], np.asarray(rating)[~is_true][None]
    return float(((above > below) + 0.5 * (above == below)).mean())


def correlation(acts: Sequence[float], predicted: Sequence[float]) -> float:
    """Returns the correlation; 0 for a prediction that is the same everywhere, NaN for such activations.

    >>> round(correlation([0.0, 0.0, 3.0], [0.0, 0.0, 7.0]), 6)
    1.0
    """
    x, y = np.asarray(acts, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if not len(x) or np.ptp(x) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(y) else 0.0
