"""One named logger for the package. Handlers are attached by the commands, never at import."""

import logging
import sys
from typing import Literal

from e2e_sae.lazy import lazy_names

logger = logging.getLogger("e2e_sae")


class _AboveBars(logging.Handler):
    """Prints a line above the progress bars that are on the screen, not into them."""

    def __init__(self, stream_name: Literal["stdout", "stderr"]):
        super().__init__()
        self._stream_name = stream_name

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # later than the parsing of a command line

        # Looked up for each line: a notebook or a test may have put another stream in its place.
        tqdm.write(self.format(record), file=getattr(sys, self._stream_name))


def log_to_console(level: int = logging.INFO) -> None:
    """Sends progress (below WARNING) to stdout and warnings and errors to stderr.

    Calling it again replaces the handlers, so that a notebook which runs two trainings prints once.
    """
    out = _AboveBars("stdout")
    out.addFilter(lambda record: record.levelno < logging.WARNING)
    out.setFormatter(logging.Formatter("%(message)s"))
    err = _AboveBars("stderr")
    err.setLevel(logging.WARNING)
    err.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.handlers = [out, err]
    logger.setLevel(level)
    logger.propagate = False


__getattr__ = lazy_names(__name__, {"setup_logger": "e2e_sae.legacy.logs"})
