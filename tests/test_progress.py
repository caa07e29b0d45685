"""Progress bars in a log file."""

import pytest

from e2e_sae.log import log_to_console, logger
from e2e_sae.progress import progress_bar


def test_a_log_file_gets_the_outer_bar_only_and_messages_on_lines_of_their_own(capsys: pytest.CaptureFixture[str]):
    handlers, propagate = logger.handlers, logger.propagate
    log_to_console()
    try:
        for _ in progress_bar(range(2), desc="outer"):
            list(progress_bar(range(3), desc="inner", inner=True))
        logger.info("done")
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    out = capsys.readouterr().out
    assert "outer" in out
    assert "inner" not in out
    assert "done" in out.splitlines()
