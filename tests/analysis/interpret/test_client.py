"""The real client against an endpoint on loopback: patience, pace, and one clear line when it is in vain."""

import email.utils
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from e2e_sae.analysis.interpret import client
from e2e_sae.analysis.interpret.answers import Answer, Request
from e2e_sae.analysis.interpret.client import N_TRIES, Endpoint, Stopped, wait_before_retry
from e2e_sae.errors import RunFailed, UserError
from tests.analysis.interpret.loopback import KEY, LoopbackEndpoint, completion, refusal

REQUEST = Request("m", ({"role": "user", "content": "hello"},), {"temperature": 0})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackEndpoint]:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)
    with LoopbackEndpoint(answer=lambda body: "hi") as server:
        yield server


@pytest.fixture
def connect(server: LoopbackEndpoint) -> Iterator[Callable[..., Endpoint]]:
    """Returns an endpoint's client; its connections are closed afterwards."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(Endpoint(server.url, KEY, **options)))


def test_a_request_goes_out_as_it_is_and_comes_back_with_its_tokens(
    server: LoopbackEndpoint, connect: Callable[..., Endpoint]
) -> None:
    assert connect()(REQUEST) == Answer("hi", 100, 10)
    assert server.received == [{"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}]


def test_a_refusal_and_a_filter_are_answers_without_text(
    server: LoopbackEndpoint, connect: Callable[..., Endpoint]
) -> None:
    server.first_replies = [completion(None), refusal(400, code="content_filter")]
    endpoint = connect()
    assert [endpoint(REQUEST).text for _ in range(2)] == ["", ""]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_what_cannot_be_answered_now_is_asked_again(
    server: LoopbackEndpoint, connect: Callable[..., Endpoint], status: int
) -> None:
    server.first_replies = [refusal(status)] * 2
    assert connect()(REQUEST).text == "hi"
    assert len(server.received) == 3


def test_retry_after_is_waited_for_by_all(server: LoopbackEndpoint, connect: Callable[..., Endpoint]) -> None:
    server.first_replies = [refusal(429, {"retry-after": "0.4"})]
    endpoint = connect()
    endpoint(REQUEST)
    assert server.times[1] - server.times[0] >= 0.4
    endpoint._pace.hold(0.3)
    before = time.monotonic()
    endpoint(REQUEST)
    assert server.times[2] - before >= 0.29


@pytest.mark.parametrize("reply", [refusal(503), None])
def test_it_gives_up_after_so_many_tries(
    server: LoopbackEndpoint, connect: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch, reply: Any
) -> None:
    if reply is None:
        server.n_before_hold = 0
        server.release()
        monkeypatch.setattr(server, "answer", lambda body: 1 / 0)  # the connection breaks
        monkeypatch.setattr(server._server, "handle_error", lambda *_: None)
    server.first_replies = [reply] * 100 if reply else []
    with pytest.raises(RunFailed, match=f"gave no answer in {N_TRIES} tries.*every answer so far is kept"):
        connect()(REQUEST)
    assert len(server.received) == N_TRIES


def test_an_endpoint_that_wants_a_very_long_wait_ends_the_run(
    server: LoopbackEndpoint, connect: Callable[..., Endpoint]
) -> None:
    server.first_replies = [refusal(429, {"retry-after": "86400"})]
    with pytest.raises(RunFailed, match="asks to wait 86400 s"):
        connect()(REQUEST)


def test_waits_follow_the_headers_and_double_without_them() -> None:
    assert [wait_before_retry({}, n) for n in range(4)] == [1.0, 2.0, 4.0, 8.0]
    assert wait_before_retry({"retry-after-ms": "250", "retry-after": "9"}, 3) == 0.25
    assert wait_before_retry({"retry-after": "later"}, 1) == 2.0
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 98 <= wait_before_retry({"retry-after": date}, 0) <= 101
    assert wait_before_retry({"retry-after": email.utils.formatdate(0, usegmt=True)}, 0) == 0.0


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(401), "refuses the key in OPENAI_API_KEY: .*not like this"),
        (refusal(403), "refuses the key in OPENAI_API_KEY"),
        (refusal(404, code="model_not_found"), r"refuses requests for the model 'm' \(status 404\): .*not like this"),
        (refusal(400, code="unsupported_parameter"), r"refuses requests for the model 'm' \(status 400\)"),
        (refusal(429, code="insufficient_quota"), "has no quota left"),
        ((200, {"content-type": "text/html"}, "<html>"), "something else than chat completions: is OPENAI_BASE_URL"),
        ((200, {"content-type": "application/json"}, "{"), "something else than chat completions"),
    ],
)
def test_what_will_never_be_answered_is_said_at_once(
    server: LoopbackEndpoint, connect: Callable[..., Endpoint], reply: Any, message: str
) -> None:
    server.first_replies = [reply]
    with pytest.raises(UserError, match=message):
        connect()(REQUEST)
    assert len(server.received) == 1


def test_no_more_requests_go_out_than_are_allowed(server: LoopbackEndpoint, connect: Callable[..., Endpoint]) -> None:
    endpoint = connect(max_per_minute=600.0)
    for _ in range(4):
        endpoint(REQUEST)
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    # Ten a second; the time on the way differs a little.
    assert sum(gaps) >= 0.28


def test_when_the_run_ends_nothing_is_sent(server: LoopbackEndpoint, connect: Callable[..., Endpoint]) -> None:
    with pytest.raises(Stopped):
        connect()(REQUEST, lambda: True)
    assert server.received == []


def test_the_environment_names_endpoint_and_key(monkeypatch: pytest.MonkeyPatch, server: LoopbackEndpoint) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    with closing(Endpoint.from_environment()) as endpoint:
        assert endpoint(REQUEST).text == "hi"
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    with closing(Endpoint.from_environment()) as endpoint:
        assert endpoint.url == "https://api.openai.com/v1/"
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set: put it into .env"):
        Endpoint.from_environment()


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"openai, which is not installed: pip install 'e2e_sae\[interpret\]'"):
        Endpoint.from_environment()
