"""One named logger for the package. Handlers are attached by the commands, never at import."""

import logging
import sys

logger = logging.getLogger("e2e_sae")


def log_to_console(level: int = logging.INFO) -> None:
    """Sends progress (below WARNING) to stdout and warnings and errors to stderr.

    Calling it again replaces the handlers, so that a notebook which runs two trainings prints once.
    """
    out = logging.StreamHandler(sys.stdout)
    out.addFilter(lambda record: record.levelno < logging.WARNING)
    out.setFormatter(logging.Formatter("%(message)s"))
    err = logging.StreamHandler(sys.stderr)
    err.setLevel(logging.WARNING)
    err.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.handlers = [out, err]
    logger.setLevel(level)
    logger.propagate = False
