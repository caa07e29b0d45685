"""The three scores: by hand, and by what must hold."""

import math
import random

import pytest

from e2e_sae.analysis.interpret.scores import auc, balanced_accuracy, correlation


def test_balanced_accuracy_is_the_mean_of_both_shares() -> None:
    truth = [True, True, True, False, False]
    # 2 of 3 and 1 of 2 are right.
    assert balanced_accuracy(truth, [True, True, False, True, False]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert balanced_accuracy(truth, [not t for t in truth]) == 0.0


def test_always_the_same_answer_is_chance_however_many_are_true() -> None:
    assert balanced_accuracy([True] * 9 + [False], [True] * 10) == 0.5


def test_auc_counts_pairs() -> None:
    # Pairs (true, false): 3 > 2, 3 > 1, 1 < 2, 1 = 1.
    assert auc([True, False, True, False], [3.0, 2.0, 1.0, 1.0]) == (1 + 1 + 0 + 0.5) / 4


def test_auc_of_yes_and_no_is_balanced_accuracy() -> None:
    rng = random.Random(0)
    truth = [True, False] + [rng.random() < 0.3 for _ in range(30)]
    predicted = [rng.random() < 0.5 for _ in truth]
    assert auc(truth, [float(p) for p in predicted]) == pytest.approx(balanced_accuracy(truth, predicted))


def test_correlation_is_that_of_all_tokens_and_ignores_scale() -> None:
    acts, predicted = [0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 10.0, 2.0]
    # Means 3/4 and 3; products of deviations 9/4 - 3/4 + 35/4 + 3/4 = 11, squares 11/4 and 68.
    assert correlation(acts, predicted) == pytest.approx(11 / (11 / 4 * 68) ** 0.5)
    assert correlation([7 * a for a in acts], [1 + 0.1 * p for p in predicted]) == pytest.approx(
        correlation(acts, predicted)
    )


def test_a_constant_prediction_explains_nothing() -> None:
    assert correlation([0.0, 1.0], [3.0, 3.0]) == 0.0


def test_what_cannot_be_scored_is_nan() -> None:
    assert math.isnan(balanced_accuracy([], []))
    assert math.isnan(balanced_accuracy([True], [True]))
    assert math.isnan(auc([False, False], [0.0, 1.0]))
    assert math.isnan(correlation([], []))
    assert math.isnan(correlation([2.0, 2.0], [0.0, 1.0]))
