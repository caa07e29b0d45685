"""How long a run has trained: wall-clock time, without what is no training; it goes on where a run is resumed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Runs while it is in `running`, and not while it is in `stopped`."""

    def __init__(self, seconds: float = 0.0):
        """
        Args:
            seconds: what it has run before.
        """
        self._before = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """How long it has run, in all."""
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Lets it run for the length of the block."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops it for the length of the block, if it runs."""
        was_running = self._since is not None
        self._stop()
        try:
            yield
        finally:
            if was_running:
                self._since = time.perf_counter()

    def _stop(self) -> None:
        self._before, self._since = self.seconds, None
