"""The stopwatch counts what it is to count, on a clock of the test's own."""

import time

import pytest

from e2e_sae.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_it_runs_only_where_it_is_to_run(clock: list[float]) -> None:
    watch = Stopwatch(5.0)
    clock[0] += 1
    with watch.running():
        clock[0] += 2
        assert watch.seconds == 7
        with watch.stopped():
            clock[0] += 4
            assert watch.seconds == 7
        clock[0] += 8
    clock[0] += 16
    assert watch.seconds == 15
    with watch.stopped():
        clock[0] += 32
    clock[0] += 64
    assert watch.seconds == 15


def test_an_error_stops_it_too(clock: list[float]) -> None:
    watch = Stopwatch()

    def fail() -> None:
        with watch.running():
            clock[0] += 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock[0] += 2
    assert watch.seconds == 1
