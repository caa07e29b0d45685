"""The explainer and the scorer that need no language model, by hand."""

import pytest

from e2e_sae.analysis.interpret.examples import Context, LatentExamples, TokenMean
from e2e_sae.analysis.interpret.token_statistics import predicted, token_explanation, token_scores

TOKENS = [TokenMean(1, "a", 4.0, 20.0), TokenMean(2, "b", 1.0, 5.0), TokenMean(3, "c", 0.1, 0.5)]


def context(ids: tuple[int, ...], acts: tuple[float, ...]) -> Context:
    return Context(tuple("xabc"[i] for i in ids), ids, acts)


def test_tokens_below_the_mean_explain_nothing() -> None:
    assert token_explanation(TOKENS) == '"a" (mean 4, lift 20.0), "b" (mean 1, lift 5.0)'
    assert token_explanation(TOKENS[2:]) == "(no token stands out)"
    assert predicted(context((0, 1, 2, 3), (0.0,) * 4), TOKENS) == [0.0, 4.0, 1.0, 0.0]


def test_scores_are_those_of_looking_tokens_up() -> None:
    activating = [context((1, 0), (3.0, 0.0)), context((0, 0), (0.0, 1.0))]
    silent = [context((2, 0), (0.0, 0.0)), context((0, 3), (0.0, 0.0))]
    auc, correlation = token_scores(LatentExamples(5, [], activating, silent, TOKENS))
    # Greatest predictions: 4 and 0 where it is active, 1 and 0 where it is not.
    assert (auc.scorer, auc.measure, auc.score) == ("token lookup", "AUC", (1 + 1 + 0 + 0.5) / 4)
    # acts 3 0 0 1 and four 0, predicted 4 0 0 0 1 0 0 0: sum of products 12 - 8/4 * 5/4 ..., by the definition:
    n, sx, sy, sxy, sxx, syy = 8, 4, 5, 12, 10, 17
    expected = (n * sxy - sx * sy) / ((n * sxx - sx**2) * (n * syy - sy**2)) ** 0.5
    assert (correlation.measure, correlation.score) == ("correlation", pytest.approx(expected))
    assert (auc.n_examples, auc.n_failed) == (4, 0)
