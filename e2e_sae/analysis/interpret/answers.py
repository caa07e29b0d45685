"""What is asked of language models and what they answer: every answer is a file, so that nothing is asked twice.

    FOLDER/ab/abcdef... .json     {"request": ..., "text": ..., "n_in": ..., "n_out": ...}

The name is the SHA-256 of the request: model, messages and parameters. A file is written as its answer arrives.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from e2e_sae.checkpoint.files import read_json, write_json

CHARACTERS_PER_TOKEN = 4
"""For estimates: OpenAI's rule of thumb for English (help.openai.com, "What are tokens and how to count them?")."""

Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


@dataclass(frozen=True)
class Request:
    """One chat completion."""

    model: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Further ones of the API, such as `temperature`."""

    @property
    def values(self) -> dict[str, Any]:
        """The API's arguments."""
        return {"model": self.model, "messages": [dict(message) for message in self.messages], **self.parameters}

    @cached_property
    def key(self) -> str:
        """SHA-256 of its content."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()


class Answer(NamedTuple):
    """What a model answered."""

    text: str
    """Empty where it refused."""
    n_in: int
    """Tokens of the request, as the endpoint counts them; 0 where it does not."""
    n_out: int
    """Tokens of the answer; likewise."""


Source = Callable[[Request, str], Answer]
"""Where answers come from: returns that to a request; the text is one of usual length, for an estimate."""


class StoredAnswers:
    """The answers in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def get(self, request: Request) -> Answer | None:
        """Returns the answer to a request, or None if it was never asked.

        Raises:
            CheckpointError: its file is damaged.
        """
        file = self._file(request)
        if not file.is_file():
            return None
        stored = read_json(file)
        return Answer(stored["text"], stored["n_in"], stored["n_out"])

    def put(self, request: Request, answer: Answer) -> None:
        """Keeps an answer."""
        file = self._file(request)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"request": request.values, **answer._asdict()})

    def _file(self, request: Request) -> Path:
        return self._folder / request.key[:2] / f"{request.key}.json"


class Asked:
    """Answers that are stored, and those of an endpoint, which are then stored; from any number of threads."""

    def __init__(self, stored: StoredAnswers, ask: Callable[[Request], Answer], tell: Callable[[], object]):
        """
        Args:
            stored: what was answered before.
            ask: asks an endpoint.
            tell: called for each answer.
        """
        self.n_asked = 0
        self.n_recalled = 0
        self.n_in = 0
        """Tokens of requests that were asked."""
        self.n_out = 0
        """Tokens of their answers."""
        self._stored = stored
        self._ask = ask
        self._tell = tell
        self._counting = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def __call__(self, request: Request, typical: str) -> Answer:
        with self._counting:
            lock = self._locks.setdefault(request.key, threading.Lock())
        with lock:  # of two that want the same, one asks
            answer = self._stored.get(request)
            is_new = answer is None
            if answer is None:
                answer = self._ask(request)
                self._stored.put(request, answer)
        with self._counting:
            self._count(answer, is_new)
        self._tell()
        return answer

    def _count(self, answer: Answer, is_new: bool) -> None:
        if not is_new:
            self.n_recalled += 1
            return
        self.n_asked += 1
        self.n_in += answer.n_in
        self.n_out += answer.n_out


class Estimate:
    """Asks nobody: answers that are stored, and typical ones in the place of those still to be asked, counted."""

    def __init__(self, stored: StoredAnswers):
        self.n_asked: Counter[str] = Counter()
        """Requests, by model."""
        self.n_in: Counter[str] = Counter()
        """Tokens of these requests, by model."""
        self.n_out: Counter[str] = Counter()
        """Tokens of their answers, by model."""
        self.n_recalled = 0
        """Requests that are answered already."""
        self._stored = stored

    def __call__(self, request: Request, typical: str) -> Answer:
        answer = self._stored.get(request)
        if answer is not None:
            self.n_recalled += 1
            return answer
        self.n_asked[request.model] += 1
        self.n_in[request.model] += sum(_n_tokens(message["content"]) for message in request.messages)
        self.n_out[request.model] += _n_tokens(typical)
        return Answer(typical, 0, 0)


def _n_tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)
