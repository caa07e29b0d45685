"""Ctrl-C and SIGTERM as a request: the run ends after the step it is in, once everything is saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from e2e_sae.log import logger


class StopRequest:
    """Whether somebody has asked the run to end, and with which signal."""

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal; None while the run may go on."""

    def __bool__(self) -> bool:
        return self.signum is not None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; a second Ctrl-C stops at once, as usual."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals are the main thread's business
        return

    def on_signal(signum: int, _frame: FrameType | None) -> None:
        if request.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request.signum = signum
        logger.info("stopping after this step; press Ctrl-C again to stop at once without saving")

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
