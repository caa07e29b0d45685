"""Progress goes to stdout, errors to stderr."""

import logging
from collections.abc import Iterator

import pytest

from e2e_sae.log import log_to_console, logger


@pytest.fixture(autouse=True)
def _restore_logger() -> Iterator[None]:
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def test_progress_goes_to_stdout_and_warnings_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_console()
    logger.info("step 1")
    logger.warning("same rows")
    logger.debug("unseen")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("step 1\n", "WARNING: same rows\n")


def test_calling_it_twice_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_console()
    log_to_console(logging.INFO)
    logger.info("once")
    assert capsys.readouterr().out == "once\n"
