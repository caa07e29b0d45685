"""Scores by stand-ins for models whose answers are known."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from e2e_sae.analysis.interpret.answers import Answer, Request, Source
from e2e_sae.analysis.interpret.examples import Context, LatentExamples
from e2e_sae.analysis.interpret.judge import SCORERS, Judge
from e2e_sae.scripts import interpret
from tests.analysis.interpret.loopback import plain_answer


def context(text: str, *, active_on: str = "") -> Context:
    """Returns a context of one token per character; the latent has activation 2 on one of them."""
    return Context(tuple(text), tuple(map(ord, text)), tuple(2.0 if c == active_on else 0.0 for c in text))


EXAMPLES = LatentExamples(
    latent=7,
    top=[context("we ask", active_on="k"), context("ok", active_on="k")],
    activating=[context(f"{c}k.{c}k", active_on="k") for c in "abcdefghijmn"],
    silent=[context(f"{c}s.{c}t!") for c in "abcdefghijmn"],
    tokens=[],
)
JUDGE = Judge(explainer="big", scorer="small")


def source_of(answer: Callable[[dict[str, Any]], str]) -> Source:
    return lambda request, typical: Answer(answer(request.values), 0, 0)


def test_a_model_that_sees_what_is_there_scores_1() -> None:
    source = source_of(plain_answer)
    explanation = JUDGE.explain(EXAMPLES, source)
    assert explanation == 'the text "k"'
    scores = JUDGE.scores(EXAMPLES, explanation, source)
    assert [(s.scorer, s.score, s.n_examples, s.n_failed) for s in scores] == [
        ("detection", 1.0, 24, 0), ("fuzzing", 1.0, 24, 0), ("simulation", pytest.approx(1.0), 24, 0),
    ]  # fmt: skip


def test_explainer_and_scorer_are_asked_each_their_own() -> None:
    models: list[tuple[str, bool]] = []

    def answer(body: dict[str, Any]) -> str:
        models.append((body["model"], '"explanation"' in body["messages"][0]["content"]))
        return plain_answer(body)

    explanation = JUDGE.explain(EXAMPLES, source_of(answer))
    JUDGE.scores(EXAMPLES, explanation or "", source_of(answer))
    assert set(models) == {("big", True), ("small", False)}


def test_a_model_that_always_says_yes_scores_chance() -> None:
    def answer(body: dict[str, Any]) -> str:
        return json.dumps({"answers": [1] * body["messages"][1]["content"].count("\nText ")})

    judge = Judge("big", "small", scorers=("detection", "fuzzing"))
    assert [score.score for score in judge.scores(EXAMPLES, "all", source_of(answer))] == [0.5, 0.5]


def test_only_the_wanted_scores_are_asked_for() -> None:
    scores = Judge("big", "small", scorers=("detection",)).scores(EXAMPLES, 'the text "k"', source_of(plain_answer))
    assert [score.scorer for score in scores] == ["detection"]


def test_wrong_marks_are_as_many_as_right_ones_and_in_silent_contexts() -> None:
    marks: list[tuple[bool, int]] = []

    def answer(body: dict[str, Any]) -> str:
        texts = [line for line in body["messages"][1]["content"].splitlines() if line.startswith("Text ")]
        marks.extend(("k" in text, text.count("⟦")) for text in texts)
        return plain_answer(body)

    Judge("big", "small", scorers=("fuzzing",)).scores(EXAMPLES, 'the text "k"', source_of(answer))
    # Both k of an active context are marked; two tokens of a silent one, which share marks where they are neighbours.
    assert sum(n for is_active, n in marks if is_active) == 2 * 12
    assert {n for is_active, n in marks if not is_active} == {1, 2}


def test_texts_come_shuffled_and_in_the_same_order_each_time() -> None:
    orders: list[list[str]] = [[], []]
    for order in orders:

        def answer(body: dict[str, Any], order: list[str] = order) -> str:
            order.append(body["messages"][1]["content"])
            return plain_answer(body)

        Judge("big", "small", scorers=("detection",)).scores(EXAMPLES, 'the text "k"', source_of(answer))
    assert orders[0] == orders[1]
    assert len(orders[0]) == 3
    first = plain_answer({"messages": [{"content": '"answers"'}, {"content": orders[0][0]}]})
    assert len(set(json.loads(first)["answers"])) == 2


@pytest.mark.parametrize("scorer", SCORERS)
def test_contexts_without_an_answer_are_left_out_and_counted(scorer: str) -> None:
    asked: list[str] = []

    def answer(body: dict[str, Any]) -> str:
        content = body["messages"][1]["content"]
        if content not in asked:
            asked.append(content)
        return "I cannot do that." if content == asked[0] else plain_answer(body)

    (score,) = Judge("big", "small", scorers=(scorer,)).scores(EXAMPLES, 'the text "k"', source_of(answer))
    assert score.n_failed == (1 if scorer == "simulation" else 10)
    assert score.score == pytest.approx(1.0)


@pytest.mark.parametrize("scorer", SCORERS)
def test_without_any_answer_there_is_no_score(scorer: str) -> None:
    (score,) = Judge("big", "small", scorers=(scorer,)).scores(EXAMPLES, "x", source_of(lambda body: "no"))
    assert math.isnan(score.score)
    assert score.n_failed == score.n_examples == 24


def test_without_any_answer_there_is_no_explanation() -> None:
    assert JUDGE.explain(EXAMPLES, source_of(lambda body: "no")) is None


def test_a_simulation_is_scored_over_all_tokens_together() -> None:
    examples = LatentExamples(
        1, [], [Context(("a", "b"), (0, 1), (0.0, 4.0)), Context(("c", "d"), (2, 3), (2.0, 0.0))], [context("ef")], []
    )
    answers = iter(['{"activations": {"1": 5}}', '{"activations": {"1": 5}}', '{"activations": {}}'])

    def source(request: Request, typical: str) -> Answer:
        return Answer(next(answers), 0, 0)

    (score,) = Judge("big", "small", scorers=("simulation",)).scores(examples, "x", source)
    # acts 0 4 2 0 0 0, predicted 0 5 0 5 0 0: means 1 and 5/3; sum of products 20 - 10, squares 20 - 6 and 50 - 50/3.
    assert score.score == pytest.approx(10 / (14 * (100 / 3)) ** 0.5)


def test_the_command_knows_every_scorer() -> None:
    assert interpret._SCORERS == SCORERS  # it is parsed before anything heavy is imported
