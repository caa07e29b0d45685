"""Chat completions from any OpenAI-compatible endpoint, through the `openai` package: paced, and patient within bounds.

    OPENAI_BASE_URL     the endpoint; empty: OpenAI's own
    OPENAI_API_KEY      the key; servers that want none take any text

A request that cannot be answered now (429, 5xx, no connection) is sent again, up to `N_TRIES` times in all: after as
long as `Retry-After` says, else after 1, 2, 4, ... seconds; meanwhile no other request is sent either.
"""

import email.utils
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from e2e_sae.analysis.interpret.answers import Answer, Request
from e2e_sae.errors import RunFailed, UserError

OPENAI_URL = "https://api.openai.com/v1"
N_TRIES = 8
"""Of one request. The waits before the second to the last add up to two minutes where no `Retry-After` is given."""
FIRST_WAIT = 1.0
"""Seconds; doubled with each further try."""
LONGEST_WAIT = 600.0
"""Seconds. An endpoint that asks for more is out of quota for today: the run ends."""
TIMEOUT = 600.0
"""Seconds that one answer may take: the package's own default."""
_CANNOT_NOW = {408, 409, 425, 429}
_FILTERED = {"content_filter", "content_policy_violation"}
_OUT_OF_QUOTA = "insufficient_quota"


class Stopped(Exception):
    """The run is to end: no further request is sent."""


class Pace:
    """When the next request may be sent, for all threads together."""

    def __init__(self, max_per_minute: float | None):
        """
        Args:
            max_per_minute: requests; None: no limit.
        """
        self._interval = 60.0 / max_per_minute if max_per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self, is_stopped: Callable[[], bool]) -> None:
        """Returns when it is this thread's turn.

        Raises:
            Stopped: the run is to end.
        """
        while True:
            if is_stopped():
                raise Stopped
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._interval
                    return
                left = self._next - now
            time.sleep(min(left, 0.1))

    def hold(self, seconds: float) -> None:
        """Lets no request pass for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Endpoint:
    """An OpenAI-compatible endpoint; used from many threads."""

    def __init__(self, base_url: str, key: str, max_per_minute: float | None = None):
        """
        Args:
            base_url: where it is.
            key: the user's.
            max_per_minute: requests; None: no limit.
        """
        import openai

        self._client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=TIMEOUT)
        self._pace = Pace(max_per_minute)
        self.url = str(self._client.base_url)

    @classmethod
    def from_environment(cls, max_per_minute: float | None = None) -> "Endpoint":
        """Returns the endpoint that the environment names.

        Raises:
            UserError: there is no key, or the `openai` package is not installed.
        """
        if importlib.util.find_spec("openai") is None:
            raise UserError(
                "language models are asked through the package openai, which is not installed: "
                "pip install 'e2e_sae[interpret]' (or --offline, which asks none)"
            )
        key = os.environ.get("OPENAI_API_KEY")
        if not key:
            raise UserError(
                "OPENAI_API_KEY is not set: put it into .env or the environment (a server of your own, named by "
                "OPENAI_BASE_URL, takes any text; --offline needs none)"
            )
        return cls(os.environ.get("OPENAI_BASE_URL") or OPENAI_URL, key, max_per_minute)

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()

    def __call__(self, request: Request, is_stopped: Callable[[], bool] = lambda: False) -> Answer:
        """Returns a model's answer.

        Args:
            request: what is asked.
            is_stopped: whether the run is to end.

        Raises:
            UserError: the endpoint refuses the key, the model or the parameters.
            RunFailed: it did not answer, however often it was asked.
            Stopped: the run is to end.
        """
        import openai

        reason = ""
        for n_before in range(N_TRIES):
            self._pace.wait(is_stopped)
            try:
                return self._send(request)
            except openai.APIStatusError as error:
                if str(error.code) in _FILTERED:
                    return Answer("", 0, 0)
                if error.code == _OUT_OF_QUOTA or not _may_answer_later(error.status_code):
                    raise self._refusal(error, request.model) from None
                reason = f"status {error.status_code}"
                wait = wait_before_retry(error.response.headers, n_before)
            except (openai.APIResponseValidationError, ValueError):  # a body that is no JSON
                raise self._no_completion() from None
            except openai.APIConnectionError as error:
                reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
                wait = wait_before_retry({}, n_before)
            if wait > LONGEST_WAIT:
                raise RunFailed(f"{self.url} asks to wait {wait:.0f} s ({reason}): {_GO_ON}")
            self._pace.hold(wait)
        raise RunFailed(f"{self.url} gave no answer in {N_TRIES} tries, the last time: {reason}; {_GO_ON}")

    def _send(self, request: Request) -> Answer:
        values: dict[str, Any] = request.values
        completion: Any = self._client.chat.completions.create(**values)
        if not hasattr(completion, "choices"):
            raise self._no_completion()
        usage = completion.usage
        n_in, n_out = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (0, 0)
        # Servers differ in what they leave out.
        text = completion.choices[0].message.content if completion.choices else None
        return Answer(text or "", n_in, n_out)

    def _no_completion(self) -> UserError:
        return UserError(f"{self.url} answers with something else than chat completions: is OPENAI_BASE_URL right?")

    def _refusal(self, error: Any, model: str) -> UserError:
        said = " ".join(str(error.message).split())[:300]
        if error.status_code in (401, 403):
            return UserError(f"{self.url} refuses the key in OPENAI_API_KEY: {said}")
        if error.code == _OUT_OF_QUOTA:
            return UserError(f"the account of OPENAI_API_KEY at {self.url} has no quota left: {said}; {_GO_ON}")
        return UserError(f"{self.url} refuses requests for the model '{model}' (status {error.status_code}): {said}")


_GO_ON = "every answer so far is kept, the same command goes on from there"


def wait_before_retry(headers: Mapping[str, str], n_before: int) -> float:
    """Returns the seconds to wait before a request is sent again.

    Args:
        headers: of the answer; `retry-after-ms` and `Retry-After` (seconds, or a date) say how long.
        n_before: retries before this one.

    >>> wait_before_retry({"retry-after": "7"}, 0), wait_before_retry({}, 0), wait_before_retry({}, 3)
    (7.0, 1.0, 8.0)
    """
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) / per_second)
        except ValueError:
            date = email.utils.parsedate_tz(value)
            if date is not None:
                return max(0.0, email.utils.mktime_tz(date) - time.time())
    return FIRST_WAIT * 2**n_before


def _may_answer_later(status: int) -> bool:
    return status in _CANNOT_NOW or status >= 500
