"""Bootstrap intervals and p values: scipy's, and what is known of normal samples."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from e2e_sae.analysis import bootstrap
from e2e_sae.analysis.bootstrap import mean_difference, p_value


def skewed(n: int, seed: int) -> np.ndarray:
    """Returns values of a skewed distribution, where BCa and percentile intervals differ."""
    return np.random.default_rng(seed).exponential(size=n)


def test_the_interval_is_scipys_for_the_same_resamples():
    a, b = skewed(25, 0), 0.5 * skewed(40, 1)
    rng = np.random.default_rng(3)
    drawn = bootstrap._resampled_means(a, 25, 2000, rng) - bootstrap._resampled_means(b, 40, 2000, rng)
    for confidence in (0.95, 0.8):
        made = SimpleNamespace(bootstrap_distribution=drawn)
        theirs = {
            method: stats.bootstrap(
                (a, b),
                lambda x, y, axis: x.mean(axis) - y.mean(axis),
                n_resamples=0,
                bootstrap_result=made,
                method=method,
                confidence_level=confidence,
            ).confidence_interval
            for method in ("BCa", "percentile")
        }
        ours = mean_difference(a, b, n_resamples=2000, seed=3, confidence=confidence)
        assert ours == pytest.approx((a.mean() - b.mean(), *theirs["BCa"]), rel=1e-12)
        assert abs(ours.high - theirs["percentile"].high) > 1e-3, "the correction shows in this sample"


def test_an_interval_of_large_normal_samples_is_the_normal_one():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 2.0, 4000), rng.normal(0.5, 1.0, 3000)
    found = mean_difference(a, b, n_resamples=4000)
    error = math.sqrt(a.var() / len(a) + b.var() / len(b))
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.15 * error)


def test_swapping_the_samples_turns_the_difference_round():
    a, b = skewed(30, 0), skewed(20, 1)
    one, other = mean_difference(a, b, 20_000), mean_difference(b, a, 20_000)
    assert one.difference == -other.difference
    assert one.low == pytest.approx(-other.high, abs=0.02)
    assert one.high == pytest.approx(-other.low, abs=0.02)


def test_the_same_seed_gives_the_same_interval_and_another_one_does_not():
    a, b = skewed(30, 0), skewed(20, 1)
    assert mean_difference(a, b, seed=1) == mean_difference(list(a), list(b), seed=1)
    assert mean_difference(a, b, seed=1) != mean_difference(a, b, seed=2)
    assert p_value(a, b, 1000, seed=1) == p_value(a, b, 1000, seed=1)


def test_equal_values_have_a_difference_and_no_interval():
    found = mean_difference([2.0, 2.0], [1.0])
    assert found.difference == 1
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_a_p_value_counts_how_often_the_pool_is_as_far_apart():
    # Of the 16 equally likely pairs of pairs from the pool {0, 0, 1, 1}, |difference| = 1 needs (0 0, 1 1) or the
    # reverse: 2 (1/4)^2 = 1/8.
    found = p_value([0.0, 0.0], [1.0, 1.0], n_resamples=40_000)
    assert found == pytest.approx(1 / 8, abs=0.01)


def test_a_p_value_agrees_with_a_t_test_for_normal_samples():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 1, 200), rng.normal(0.2, 1, 180)
    assert p_value(a, b, 20_000) == pytest.approx(stats.ttest_ind(a, b)[1], abs=0.015)


def test_samples_without_difference_have_p_1_and_no_p_is_0():
    assert p_value([1.0, 2.0], [2.0, 1.0], 500) == 1
    assert p_value([0.0] * 20, [1.0] * 20, 99) == pytest.approx(1 / 100)


def test_drawing_in_small_parts_changes_nothing_but_memory(monkeypatch: pytest.MonkeyPatch):
    a, b = skewed(30, 0), skewed(20, 1)
    whole = mean_difference(a, b, 20_000)
    monkeypatch.setattr(bootstrap, "_MAX_DRAWS", 64)
    parts = mean_difference(a, b, 20_000)
    assert parts.low == pytest.approx(whole.low, abs=0.02)
    assert parts.high == pytest.approx(whole.high, abs=0.02)


def test_an_empty_sample_is_named():
    with pytest.raises(ValueError, match="the sample b is empty"):
        mean_difference([1.0], [])
    with pytest.raises(ValueError, match="the sample a is empty"):
        p_value([], [1.0])
