"""Explanations and scores of a latent by language models.

    detection   balanced accuracy of "is it active in this text?" on held-out contexts, active and silent ones
    fuzzing     balanced accuracy of "are the marked tokens the active ones?": active contexts with their strong tokens
                marked, and silent ones with as many tokens marked at random (as delphi does)
    simulation  correlation of predicted and true activations on all tokens of those contexts

A question whose answers cannot be read is left out of the score, and counted.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from e2e_sae.analysis.interpret.answers import Source
from e2e_sae.analysis.interpret.examples import Context, LatentExamples
from e2e_sae.analysis.interpret.questions import Question, ask, detect, explain, fuzz, marked, simulate, strong_tokens
from e2e_sae.analysis.interpret.scores import Score, balanced_accuracy, correlation
from e2e_sae.seeds import seed_for

SCORERS = ("detection", "fuzzing", "simulation")
N_TEXTS = 10
"""Texts in one question of detection and fuzzing."""


@dataclass(frozen=True)
class Judge:
    """Language models that explain and score."""

    explainer: str
    """Model."""
    scorer: str
    """Model."""
    scorers: tuple[str, ...] = SCORERS
    """Of `SCORERS`."""
    parameters: Mapping[str, Any] | None = None
    """Of every request, such as `temperature`."""
    seed: int = 0
    """Of the order of texts and of wrong marks."""

    def explain(self, examples: LatentExamples, source: Source) -> str | None:
        """Returns an explanation; None if no answer could be read."""
        return ask(explain(examples.top), source, self.explainer, self.parameters or {})

    def scores(self, examples: LatentExamples, explanation: str, source: Source) -> list[Score]:
        """Returns the scores of an explanation on held-out contexts."""
        of = {"detection": self._detection, "fuzzing": self._fuzzing, "simulation": self._simulation}
        return [of[name](examples, explanation, source) for name in self.scorers]

    def _detection(self, examples: LatentExamples, explanation: str, source: Source) -> Score:
        texts = [(context.text, True) for context in examples.activating]
        texts += [(context.text, False) for context in examples.silent]
        return self._classified("detection", texts, lambda some: detect(explanation, some), examples.latent, source)

    def _fuzzing(self, examples: LatentExamples, explanation: str, source: Source) -> Score:
        rng = random.Random(seed_for(self.seed, "marks", examples.latent))
        right = [strong_tokens(context) for context in examples.activating]
        texts = [(marked(c, numbers), True) for c, numbers in zip(examples.activating, right, strict=True)]
        for i, context in enumerate(examples.silent):
            n_marks = len(right[i % len(right)])
            texts.append((marked(context, rng.sample(range(len(context.texts)), n_marks)), False))
        return self._classified("fuzzing", texts, lambda some: fuzz(explanation, some), examples.latent, source)

    def _classified(
        self,
        name: str,
        texts: list[tuple[str, bool]],
        question: Callable[[Sequence[str]], Question[list[bool]]],
        latent: int,
        source: Source,
    ) -> Score:
        """Asks about texts, shuffled, `N_TEXTS` at a time, and scores what was answered."""
        random.Random(seed_for(self.seed, name, latent)).shuffle(texts)
        truth: list[bool] = []
        predicted: list[bool] = []
        for first in range(0, len(texts), N_TEXTS):
            some = texts[first : first + N_TEXTS]
            answers = ask(question([text for text, _ in some]), source, self.scorer, self.parameters or {})
            if answers is not None:
                truth += [is_true for _, is_true in some]
                predicted += answers
        score = balanced_accuracy(truth, predicted)
        return Score(name, "balanced accuracy", score, len(texts), len(texts) - len(truth))

    def _simulation(self, examples: LatentExamples, explanation: str, source: Source) -> Score:
        contexts: list[Context] = [*examples.activating, *examples.silent]
        acts: list[float] = []
        predicted: list[float] = []
        n_failed = 0
        for context in contexts:
            answer = ask(simulate(explanation, context), source, self.scorer, self.parameters or {})
            if answer is None:
                n_failed += 1
            else:
                acts += context.acts
                predicted += answer
        return Score("simulation", "correlation", correlation(acts, predicted), len(contexts), n_failed)
