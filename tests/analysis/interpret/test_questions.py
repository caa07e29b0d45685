"""What is asked, and what is read of the answers."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from e2e_sae.analysis.interpret.answers import Answer, Request
from e2e_sae.analysis.interpret.examples import Context
from e2e_sae.analysis.interpret.questions import (
    N_ATTEMPTS,
    Question,
    ask,
    detect,
    explain,
    fuzz,
    marked,
    simulate,
    strong_tokens,
)

CONTEXT = Context(("if", " x", ":", "\n"), (3, 4, 5, 6), (0.0, 2.0, 0.5, 8.0))
QUESTIONS: list[Question[Any]] = [
    explain([CONTEXT]),
    detect("colons", ["a", "b"]),
    fuzz("colons", ["a", "b"]),
    simulate("colons", CONTEXT),
]


class Answers:
    """Gives these answers, one after another, and remembers what was asked."""

    def __init__(self, *texts: str):
        self.texts = list(texts)
        self.requests: list[Request] = []

    def __call__(self, request: Request, typical: str) -> Answer:
        self.requests.append(request)
        return Answer(self.texts.pop(0), 0, 0)


def asked(question: Question[Any], *texts: str) -> Any:
    return ask(question, Answers(*texts), "model", {})


def test_tokens_of_a_good_share_of_the_maximum_are_marked() -> None:
    # 0.3 of 8 is 2.4.
    assert strong_tokens(CONTEXT) == [3]
    assert marked(CONTEXT, [1, 2]) == "if⟦ x:⟧\n"
    assert marked(CONTEXT, [0, 3]) == "⟦if⟧ x:⟦\n⟧"


def test_an_explanation_is_asked_for_with_marks_and_strengths_from_0_to_10() -> None:
    weak = Context(("a", "b"), (1, 2), (0.0, 4.0))
    content = explain([CONTEXT, weak]).messages[1]["content"]
    assert content.splitlines() == [
        'Excerpt 1: "if x:⟦\\n⟧"', 'Strengths: "\\n" 10', "", 'Excerpt 2: "a⟦b⟧"', 'Strengths: "b" 5',
    ]  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS, ids=["explain", "detect", "fuzz", "simulate"])
def test_the_typical_answer_can_be_read(question: Question[Any]) -> None:
    assert asked(question, question.typical) is not None


@pytest.mark.parametrize("question", QUESTIONS, ids=["explain", "detect", "fuzz", "simulate"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "I'm sorry, I cannot help with that.",
        "{",
        '{"else": 1}',
        "[0, 1]",
        "{" * 5000,
        json.dumps({key: None for key in ("explanation", "answers", "activations")}),
    ],
)
def test_what_is_no_answer_is_told_so_and_counts_as_none_in_the_end(question: Question[Any], text: str) -> None:
    answers = Answers(*[text] * N_ATTEMPTS)
    assert ask(question, answers, "model", {}) is None
    last = answers.requests[-1].messages
    assert len(answers.requests) == N_ATTEMPTS
    assert len({request.key for request in answers.requests}) == N_ATTEMPTS
    assert last[-2]["content"] == (text or "(nothing)")
    assert "cannot be used" in last[-1]["content"]


def test_a_later_attempt_counts() -> None:
    assert asked(QUESTIONS[1], "no", '{"answers": [1]}', 'So: {"answers": [1, 0]}. Done.') == [True, False]


@pytest.mark.parametrize("answers", [[1], [1, 0, 0], [1, 2], [1, "0"], "10", [1, None], [0.5, 0]])
def test_a_list_of_another_length_or_content_is_no_answer(answers: Any) -> None:
    assert asked(QUESTIONS[1], *[json.dumps({"answers": answers})] * N_ATTEMPTS) is None


def test_a_simulation_names_the_tokens_that_are_not_silent() -> None:
    assert asked(QUESTIONS[3], '{"activations": {"1": 3, "3": 10}}') == [0, 3, 0, 10]
    assert asked(QUESTIONS[3], '{"activations": {}}') == [0, 0, 0, 0]


@pytest.mark.parametrize("activations", [{"4": 1}, {"-1": 1}, {"x": 1}, {"0": 11}, {"0": -1}, {"0": 1.5}, {"0": True}])
def test_a_simulation_of_other_tokens_or_strengths_is_no_answer(activations: Mapping[str, Any]) -> None:
    assert asked(QUESTIONS[3], *[json.dumps({"activations": activations})] * N_ATTEMPTS) is None


def test_an_explanation_is_one_line() -> None:
    assert asked(QUESTIONS[0], '{"explanation": " ends\\n of lines "}') == "ends of lines"
    assert asked(QUESTIONS[0], *['{"explanation": "  "}'] * N_ATTEMPTS) is None


def test_parameters_are_part_of_the_request() -> None:
    answers = Answers('{"answers": [1, 0]}', '{"answers": [1, 0]}')
    ask(QUESTIONS[1], answers, "model", {"temperature": 0})
    ask(QUESTIONS[1], answers, "model", {"temperature": 1})
    assert answers.requests[0].values["temperature"] == 0
    assert answers.requests[0].key != answers.requests[1].key
