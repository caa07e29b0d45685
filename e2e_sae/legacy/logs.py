"""`e2e_sae.log.setup_logger` of the paper's library."""

import logging
from pathlib import Path

from e2e_sae.log import log_to_console, logger


def setup_logger(logfile: Path | str | None = None) -> logging.Logger:
    """Returns the package's logger, which then prints to the console and writes warnings to `logfile`.

    Only this package's messages: the root logger stays as it is.
    """
    log_to_console()
    if logfile is not None:
        Path(logfile).parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(logfile, encoding="utf-8")
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
        logger.addHandler(handler)
    return logger
