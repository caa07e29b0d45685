"""An explainer and a scorer that ask no language model: a latent is explained by the tokens on which it is strongest.

    explanation   the tokens t with the greatest mean activation m(t), with their lift m(t) / m
    prediction    m(t) on those tokens, 0 on all others, whatever stands before them
    scores        AUC of the greatest prediction in a context: is the latent active in it?
                  correlation of predictions and activations over all tokens

Means are over the explaining half of the data (`examples.TokenMean`), scores over held-out contexts. It is a base line:
what a table of single tokens says of a latent. Its scores are not those of language models and stand apart from them.
"""

import json
from collections.abc import Sequence

from e2e_sae.analysis.interpret.examples import Context, LatentExamples, TokenMean
from e2e_sae.analysis.interpret.scores import Score, auc, correlation

NAME = "token statistics"
"""In the place of a model's."""
SCORER = "token lookup"


def token_explanation(tokens: Sequence[TokenMean]) -> str:
    """Returns the tokens as a text, those of a lift above 1.

    >>> token_explanation([TokenMean(5, " if", 2.5, 41.26), TokenMean(6, " the", 0.01, 0.1)])
    '" if" (mean 2.5, lift 41.3)'
    """
    named = [
        f"{json.dumps(t.text, ensure_ascii=False)} (mean {t.mean:.2g}, lift {t.lift:.1f})" for t in _strong(tokens)
    ]
    return ", ".join(named) or "(no token stands out)"


def predicted(context: Context, tokens: Sequence[TokenMean]) -> list[float]:
    """Returns the predicted activation on each token of a context."""
    means = {token.id: token.mean for token in _strong(tokens)}
    return [means.get(id, 0.0) for id in context.ids]


def token_scores(examples: LatentExamples) -> list[Score]:
    """Returns the scores of a latent's token explanation."""
    contexts = [*examples.activating, *examples.silent]
    truth = [True] * len(examples.activating) + [False] * len(examples.silent)
    predictions = [predicted(context, examples.tokens) for context in contexts]
    acts = [act for context in contexts for act in context.acts]
    flat = [value for prediction in predictions for value in prediction]
    return [
        Score(SCORER, "AUC", auc(truth, [max(prediction) for prediction in predictions]), len(contexts), 0),
        Score(SCORER, "correlation", correlation(acts, flat), len(contexts), 0),
    ]


def _strong(tokens: Sequence[TokenMean]) -> list[TokenMean]:
    return [token for token in tokens if token.lift > 1]
