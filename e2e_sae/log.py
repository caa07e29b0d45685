"""One named logger for the package. Handlers are attached by the commands, never at import."""

import logging
import sys
from typing import TextIO

logger = logging.getLogger("e2e_sae")


class _AboveBars(logging.StreamHandler[TextIO]):
    """Prints a line above the progress bars that are on the screen, not into them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # later than the parsing of a command line

        tqdm.write(self.format(record), file=self.stream)
        self.flush()


def log_to_console(level: int = logging.INFO) -> None:
    """Sends progress (below WARNING) to stdout and warnings and errors to stderr.

    Calling it again replaces the handlers, so that a notebook which runs two trainings prints once.
    """
    out = _AboveBars(sys.stdout)
    out.addFilter(lambda record: record.levelno < logging.WARNING)
    out.setFormatter(logging.Formatter("%(message)s"))
    err = _AboveBars(sys.stderr)
    err.setLevel(logging.WARNING)
    err.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.handlers = [out, err]
    logger.setLevel(level)
    logger.propagate = False
