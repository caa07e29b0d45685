import signal
import threading
from typing import Any

import pytest

from e2e_sae.interrupts import StopRequest, stop_requests
from tests.tiny_runs import console


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_request_that_names_it(signum: signal.Signals) -> None:
    with console() as said, stop_requests() as stop:
        assert not stop
        signal.raise_signal(signum)
        assert stop
        assert stop.signum == signum
    assert "press Ctrl-C again" in said[0]


def test_a_second_ctrl_c_stops_at_once() -> None:
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_of_before_are_back_afterwards_also_after_an_error() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError, match="inside"), stop_requests():
        _fail_while_signals_are_caught(before)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_than_the_main_one_trains_without_signals() -> None:
    seen: list[StopRequest] = []

    def train() -> None:
        with stop_requests() as stop:
            seen.append(stop)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not seen[0]
    assert signal.getsignal(signal.SIGINT) == before


def _fail_while_signals_are_caught(before: list[Any]) -> None:
    assert signal.getsignal(signal.SIGTERM) != before[1]
    raise RuntimeError("inside")
