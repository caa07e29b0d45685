"""A stand-in for an OpenAI-compatible endpoint on loopback: what it answers follows from the request alone.

It reads the prompts as a model would have to: what is between the marks, which text has which number. Its explanation
is the first marked piece of text; a text is called active, its marks right, a token strong, where that piece is.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from e2e_sae.analysis.interpret.questions import MARKS

KEY = "a key"
"""The one key that is accepted."""
Reply = tuple[int, dict[str, str], str]
"""Status, headers and body."""


def key_of(body: Mapping[str, Any]) -> str:
    """Returns what tells one question from another."""
    return json.dumps(body, sort_keys=True)


def plain_answer(body: Mapping[str, Any]) -> str:
    """Returns what a simple-minded model answers to one of our questions."""
    instructions, content = body["messages"][0]["content"], body["messages"][1]["content"]
    if '"explanation"' in instructions:
        excerpt = json.loads(content.splitlines()[0].removeprefix("Excerpt 1: "))
        return json.dumps({"explanation": "the text " + json.dumps(_between_marks(excerpt)[0])})
    explanation = json.loads(content.splitlines()[0].removeprefix("Explanation: the text "))
    if '"activations"' in instructions:
        tokens = [line.partition(": ") for line in content.partition("Tokens:\n")[2].splitlines()]
        strong = {number: 10 for number, _, text in tokens if json.loads(text) and json.loads(text) in explanation}
        return "Here it is:\n```json\n" + json.dumps({"activations": strong}) + "\n```"
    texts = [json.loads(line.partition(": ")[2]) for line in content.splitlines() if re.match(r"Text \d+: ", line)]
    if MARKS[0] in instructions:
        return json.dumps({"answers": [int(explanation in _between_marks(text)) for text in texts]})
    return json.dumps({"answers": [int(explanation in text) for text in texts]})


def completion(text: str | None) -> Reply:
    """Returns a chat completion, as the API words it."""
    message = {"role": "assistant", "content": text, "refusal": None if text is not None else "no"}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "any",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
    return 200, {"content-type": "application/json"}, json.dumps(body)


def refusal(status: int, headers: dict[str, str] | None = None, code: str | None = None) -> Reply:
    """Returns an error, as the API words it."""
    body = {"error": {"message": "not like this", "type": "error", "param": None, "code": code}}
    return status, {"content-type": "application/json", **(headers or {})}, json.dumps(body)


class LoopbackEndpoint:
    """Use as a context manager; `url` is what `OPENAI_BASE_URL` has to be."""

    def __init__(self, answer: Callable[[Mapping[str, Any]], str | None] = plain_answer):
        self.answer = answer
        self.first_replies: list[Reply] = []
        """Given, one for each request, before it begins to answer."""
        self.n_before_hold: int | None = None
        """After so many answers it answers no more; None: it always does."""
        self.received: list[dict[str, Any]] = []
        """Bodies of requests."""
        self.times: list[float] = []
        """When they came."""
        self.answered: list[str] = []
        """Keys of the requests whose answer went out whole."""
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "LoopbackEndpoint":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What the user sets."""
        return {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": KEY}

    def release(self) -> None:
        """Lets held requests go, unanswered, and answers again."""
        self.n_before_hold = None
        self._released.set()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        """Waits for something to happen here."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited in vain, with {len(self.answered)} answers given"
            time.sleep(0.01)

    def _reply(self, body: dict[str, Any], key: str | None) -> Reply | None:
        with self._lock:
            self.received.append(body)
            self.times.append(time.monotonic())
            if key != f"Bearer {KEY}":
                return refusal(401)
            if self.first_replies:
                return self.first_replies.pop(0)
            is_held = self.n_before_hold is not None and len(self.answered) >= self.n_before_hold
            if not is_held:
                self.answered.append(key_of(body))
        if is_held:
            self._released.wait()
            return None
        return completion(self.answer(body))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                reply = endpoint._reply(body, self.headers["authorization"])
                if reply is None:
                    self.close_connection = True
                    return
                status, headers, text = reply
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def _between_marks(text: str) -> list[str]:
    return re.findall(f"{MARKS[0]}(.*?){MARKS[1]}", text, re.DOTALL)
