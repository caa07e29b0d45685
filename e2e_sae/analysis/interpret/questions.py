"""What is asked of language models about a latent, and how the answers are read. Every answer is one JSON object.

    explain   what do the marked tokens have in common?         {"explanation": "..."}
    detect    is the latent active anywhere in these texts?     {"answers": [0, 1, ...]}
    fuzz      are the marked tokens those where it is active?   {"answers": [0, 1, ...]}
    simulate  how active is it on each token, from 0 to 10?     {"activations": {"3": 10, ...}}

Detection and fuzzing: Paulo et al. 2024 (arXiv 2410.13928). Simulation, here without log probabilities: Bills et al.
2023 (https://openaipublic.blob.core.windows.net/neuron-explainer/paper/index.html).
An answer that does not fit is told so, up to `N_ATTEMPTS` attempts in all; then the question counts as failed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from e2e_sae.analysis.interpret.answers import Message, Request, Source
from e2e_sae.analysis.interpret.examples import Context

N_ATTEMPTS = 3
"""At an answer that can be read."""
SCALE = 10
"""Greatest activation as language models see it (Bills et al. 2023)."""
MARK_SHARE = 0.3
"""Tokens with at least this share of a context's greatest activation are marked (delphi's `threshold`)."""
MARKS = ("⟦", "⟧")
"""Around marked tokens; delphi's << and >> are part of program texts."""
MAX_EXPLANATION_WORDS = 25
"""Asked for: a line in a table."""

T = TypeVar("T")


class Malformed(Exception):
    """An answer that does not fit its question; the message says how."""


@dataclass(frozen=True)
class Question(Generic[T]):
    """What is asked, and how an answer is read."""

    messages: tuple[Message, ...]
    read: Callable[[Mapping[str, Any]], T]
    """Reads the JSON object of an answer; raises `Malformed`."""
    typical: str
    """An answer of usual length, for estimates."""


def ask(question: Question[T], source: Source, model: str, parameters: Mapping[str, Any]) -> T | None:
    """Returns a model's answer, or None if it gave none that fits in `N_ATTEMPTS` attempts."""
    messages = question.messages
    for _ in range(N_ATTEMPTS):
        text = source(Request(model, messages, parameters), question.typical).text
        try:
            return question.read(_json_object(text))
        except Malformed as reason:
            said = {"role": "assistant", "content": text or "(nothing)"}
            again = f"This answer cannot be used: {reason}. Answer again, with the JSON object alone."
            messages = (*messages, said, {"role": "user", "content": again})
    return None


def explain(contexts: Sequence[Context]) -> Question[str]:
    """Asks for an explanation of a latent from contexts in which it is active, the strongest first."""
    greatest = max(max(context.acts) for context in contexts)
    excerpts = [
        f"Excerpt {n}: {_quoted(marked(context, strong_tokens(context)))}\n"
        f"Strengths: {', '.join(_strengths(context, greatest))}"
        for n, context in enumerate(contexts, start=1)
    ]

    def read(answer: Mapping[str, Any]) -> str:
        explanation = answer.get("explanation")
        if not isinstance(explanation, str) or not explanation.strip():
            raise Malformed('"explanation" is to be a text')
        return " ".join(explanation.split())

    typical = json.dumps({"explanation": "word and " * (MAX_EXPLANATION_WORDS // 2)})
    return Question(_messages(_EXPLAIN, "\n\n".join(excerpts)), read, typical)


def detect(explanation: str, texts: Sequence[str]) -> Question[list[bool]]:
    """Asks in which texts a latent with this explanation is active."""
    return _yes_or_no(_DETECT, explanation, texts)


def fuzz(explanation: str, texts: Sequence[str]) -> Question[list[bool]]:
    """Asks in which texts the marked tokens are those on which a latent with this explanation is active."""
    return _yes_or_no(_FUZZ, explanation, texts)


def simulate(explanation: str, context: Context) -> Question[list[float]]:
    """Asks how active a latent with this explanation is on each token of a context, from 0 to `SCALE`."""
    n_tokens = len(context.texts)
    lines = [f"{i}: {_quoted(text)}" for i, text in enumerate(context.texts)]
    content = f"Explanation: {explanation}\n\nText: {_quoted(context.text)}\n\nTokens:\n" + "\n".join(lines)

    def read(answer: Mapping[str, Any]) -> list[float]:
        given = answer.get("activations")
        if not isinstance(given, dict):
            raise Malformed('"activations" is to be an object from token numbers to activations')
        activations = [0.0] * n_tokens
        for number, activation in given.items():
            if not number.isdecimal() or int(number) >= n_tokens:
                raise Malformed(f"tokens have the numbers 0 to {n_tokens - 1}, not {_quoted(number)}")
            if not _is_whole(activation) or not 0 <= activation <= SCALE:
                raise Malformed(f"activations are whole numbers from 0 to {SCALE}, not {json.dumps(activation)}")
            activations[int(number)] = float(activation)
        return activations

    # Estimates take a sixth of the tokens to be active.
    typical = json.dumps({"activations": {str(i): SCALE for i in range(0, n_tokens, 6)}})
    return Question(_messages(_SIMULATE, content), read, typical)


def strong_tokens(context: Context) -> list[int]:
    """Returns the numbers of the tokens that are marked in a context where the latent is active."""
    least = MARK_SHARE * max(context.acts)
    return [i for i, act in enumerate(context.acts) if act > 0 and act >= least]


def marked(context: Context, numbers: Sequence[int]) -> str:
    """Returns a context's text with marks around these tokens; neighbours share theirs.

    >>> marked(Context(("a", "b", "c", "d"), (0, 1, 2, 3), (0.0, 1.0, 1.0, 0.0)), [1, 2])
    'a⟦bc⟧d'
    """
    opening, closing = MARKS
    pieces: list[str] = []
    for i, text in enumerate(context.texts):
        is_in = i in numbers
        begins, ends = is_in and i - 1 not in numbers, is_in and i + 1 not in numbers
        pieces.append(opening * begins + text + closing * ends)
    return "".join(pieces)


def _yes_or_no(instructions: str, explanation: str, texts: Sequence[str]) -> Question[list[bool]]:
    content = f"Explanation: {explanation}\n\n" + "\n".join(
        f"Text {n}: {_quoted(text)}" for n, text in enumerate(texts, start=1)
    )

    def read(answer: Mapping[str, Any]) -> list[bool]:
        given = answer.get("answers")
        if not isinstance(given, list) or not all(one in (0, 1) for one in given):
            raise Malformed('"answers" is to be a list of 0 and 1')
        if len(given) != len(texts):
            raise Malformed(f'"answers" has {len(given)} entries, and there are {len(texts)} texts')
        return [bool(one) for one in given]

    return Question(_messages(instructions, content), read, json.dumps({"answers": [0] * len(texts)}))


def _messages(instructions: str, content: str) -> tuple[Message, ...]:
    return {"role": "system", "content": instructions}, {"role": "user", "content": content}


def _strengths(context: Context, greatest: float) -> list[str]:
    return [f"{_quoted(context.texts[i])} {round(SCALE * context.acts[i] / greatest)}" for i in strong_tokens(context)]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _json_object(text: str) -> Mapping[str, Any]:
    """Returns the first JSON object in a text: models like to wrap theirs in words and fences."""
    start = text.find("{")
    if start < 0:
        raise Malformed("there is no JSON object in it")
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        raise Malformed("what begins at the first brace is not JSON") from None
    return value


_LATENT = (
    "A sparse autoencoder was trained on the activations of a language model. One of its latents is being studied: on "
    "every token of a text the latent is either silent or active with some strength, and it sees that token and the "
    "text before it, never what follows. "
)
_EXPLAIN = _LATENT + (
    "You get excerpts in which it is active, as JSON strings. The tokens on which it is most active stand between "
    f"{MARKS[0]} and {MARKS[1]}; below each excerpt they are listed with their strength from 0 to {SCALE}. Find out "
    "what makes the latent active: the token itself, what it means, or what the text before it has led to. Say it in "
    f"at most {MAX_EXPLANATION_WORDS} words, as precisely as the excerpts allow, without speaking of latents, "
    f'excerpts or marks. Answer with one JSON object and nothing else: {{"explanation": "..."}}'
)
_DETECT = _LATENT + (
    "You get an explanation of what makes it active, and numbered texts as JSON strings. Decide for each text whether "
    "the latent is active on at least one of its tokens. Answer with one JSON object and nothing else: "
    '{"answers": [...]}, with one entry for each text in their order, 1 for active and 0 for silent.'
)
_FUZZ = _LATENT + (
    "You get an explanation of what makes it active, and numbered texts as JSON strings, in each of which some tokens "
    f"stand between {MARKS[0]} and {MARKS[1]}. Decide for each text whether the marked tokens are those on which the "
    'latent is active. Answer with one JSON object and nothing else: {"answers": [...]}, with one entry for each text '
    "in their order, 1 if the marks are right and 0 if they are wrong."
)
_SIMULATE = _LATENT + (
    "You get an explanation of what makes it active, and a text with its numbered tokens as JSON strings. Predict the "
    f"strength of the latent on each token as a whole number from 0 to {SCALE}; it is 0 on most. Answer with one JSON "
    'object and nothing else: {"activations": {"NUMBER": STRENGTH, ...}}, with the tokens of which the strength is '
    "not 0."
)
