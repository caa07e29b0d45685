"""Bootstrap intervals and p values of a difference of two means (Efron and Tibshirani 1993, chapters 14 and 16).

    difference = mean(a) - mean(b)

Interval: bias-corrected and accelerated (BCa), as in `scipy.stats.bootstrap`, whose default it is and which the paper
(arXiv 2405.12241) uses with 1,000 resamples. With theta* the differences of resamples, Phi the normal distribution
function, and z = Phi^-1:

    z0   = z(share of theta* below the difference, ties half)
    acc  = 1/6 sum_s sum_i U_si^3 / n_s^3 / (sum_s sum_i U_si^2 / n_s^2)^(3/2),  s = a, b
    ends = the theta* at the shares  Phi(z0 + (z0 + z_q) / (1 - acc (z0 + z_q))),  q = 2.5 % and 97.5 %

U_si, the jackknife's influence of value i, is +-(x_i - mean) for a mean: nothing has to be left out in turn.
p value: both samples are drawn anew from the pool of the two, where there is no difference.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

N_RESAMPLES = 1000
"""The paper's, for intervals."""
CONFIDENCE = 0.95
"""The paper's."""
_MAX_DRAWS = 2**21
"""Values drawn at a time: 16 MB of indices, as much again of values."""

Sample = Sequence[float] | np.ndarray
"""Values of one sample, at least one."""


class Difference(NamedTuple):
    """A difference of two means and its interval."""

    difference: float
    """mean(a) - mean(b)."""
    low: float
    """Lower end; NaN where no interval can be had: all values of each sample are equal."""
    high: float
    """Upper end; likewise."""


def mean_difference(
    a: Sample, b: Sample, n_resamples: int = N_RESAMPLES, seed: int = 0, confidence: float = CONFIDENCE
) -> Difference:
    """Returns mean(a) - mean(b) with its BCa bootstrap interval.

    Args:
        a: one sample.
        b: the other one, not paired with it.
        n_resamples: how often both are drawn anew.
        seed: of the draws.
        confidence: share of such intervals that hold the true difference.

    Raises:
        ValueError: a sample is empty.
    """
    x, y = _values(a, "a"), _values(b, "b")
    difference = float(x.mean() - y.mean())
    rng = np.random.default_rng(seed)
    drawn = _resampled_means(x, len(x), n_resamples, rng) - _resampled_means(y, len(y), n_resamples, rng)
    low, high = _bca_ends(drawn, difference, _acceleration(x, y), confidence)
    return Difference(difference, low, high)


def p_value(a: Sample, b: Sample, n_resamples: int = 100_000, seed: int = 0) -> float:
    """Returns the two-sided bootstrap p value of mean(a) - mean(b), if both were drawn from the same pool.

        p = (1 + #{|theta*| >= |difference|}) / (1 + n_resamples)

    theta*: both samples drawn from a and b together, in their sizes, with replacement. (The one that is added counts
    the sample itself: p is never 0. Davison and Hinkley 1997, eq. 4.11.) The paper takes 100,000 resamples.

    Raises:
        ValueError: a sample is empty.
    """
    x, y = _values(a, "a"), _values(b, "b")
    pool, rng = np.concatenate([x, y]), np.random.default_rng(seed)
    drawn = _resampled_means(pool, len(x), n_resamples, rng) - _resampled_means(pool, len(y), n_resamples, rng)
    # Sums in another order differ in their last bits.
    tolerance = 1e-12 * np.abs(pool).max()
    n_as_far = np.count_nonzero(np.abs(drawn) >= abs(x.mean() - y.mean()) - tolerance)
    return float((1 + n_as_far) / (1 + n_resamples))


def _values(sample: Sample, name: str) -> Float[np.ndarray, " n"]:
    values = np.asarray(sample, dtype=np.float64).reshape(-1)
    if not len(values):
        raise ValueError(f"the sample {name} is empty: a mean needs at least one value")
    return values


def _resampled_means(
    values: Float[np.ndarray, " n"], size: int, n_resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, " n_resamples"]:
    """Returns the means of `n_resamples` draws of `size` values with replacement."""
    n_rows = max(1, _MAX_DRAWS // size)
    parts = [min(n_rows, n_resamples - start) for start in range(0, n_resamples, n_rows)]
    return np.concatenate([values[rng.integers(len(values), size=(n, size))].mean(1) for n in parts])


def _acceleration(x: Float[np.ndarray, " n_x"], y: Float[np.ndarray, " n_y"]) -> float:
    influences = [x - x.mean(), y.mean() - y]
    cubes = sum(float((u**3).sum()) / len(u) ** 3 for u in influences)
    squares = sum(float((u**2).sum()) / len(u) ** 2 for u in influences)
    return cubes / (6 * squares**1.5) if squares else float("nan")


def _bca_ends(
    drawn: Float[np.ndarray, " n_resamples"], difference: float, acceleration: float, confidence: float
) -> tuple[float, float]:
    from scipy.special import ndtr, ndtri

    z0 = ndtri((np.count_nonzero(drawn < difference) + np.count_nonzero(drawn <= difference)) / (2 * len(drawn)))
    z = z0 + ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
    shares = ndtr(z0 + z / (1 - acceleration * z))
    if not np.isfinite(shares).all():
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, shares)
    return float(low), float(high)
