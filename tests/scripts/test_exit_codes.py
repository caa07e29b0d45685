"""Exceptions become exit codes and one-line messages."""

import errno
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from e2e_sae.errors import CheckpointError, Interrupted, MissingFileError, RunFailed, UserError
from e2e_sae.scripts.exit_codes import run_command


def _raiser(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("unknown config key 'lrr'"), 2, "error: unknown config key 'lrr'"),
        (MissingFileError("config 'a.yaml' does not exist"), 2, "error: config 'a.yaml' does not exist"),
        (CheckpointError("'samples_10' is damaged"), 2, "error: 'samples_10' is damaged"),
        (RunFailed("loss/train/sparsity is nan at step 3"), 1, "error: loss/train/sparsity is nan at step 3"),
        (MemoryError(), 1, "smaller batch_size"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            1,
            "dict_size_to_input_ratio",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
            1,
            "out of memory",
        ),
        (RuntimeError("CUDA error: out of memory"), 1, "smaller batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "disk full"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "what was saved before is intact"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "disk full or over quota"),
        (OSError(errno.EFBIG, "File too large"), 2, "disk full"),
        (RuntimeError("Error: I/O error: No space left on device (os error 28)"), 2, "disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: no permission 'out'"),
        (OSError(errno.EROFS, "Read-only file system", "out"), 2, "read-only file system"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(signal.SIGINT, Path("out/r")), 130, "e2e-sae train --resume out/r"),
        (Interrupted(signal.SIGTERM, Path("out/r")), 143, "interrupted by SIGTERM"),
        (KeyError("x"), 1, "internal error: KeyError: 'x'; run again with --debug"),
        (RuntimeError("two\nlines"), 1, "internal error: RuntimeError: two;"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_message_on_stderr_and_its_exit_code(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(_raiser(error), debug=False) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_command_that_returns_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: "a result", debug=False) == 0
    assert capsys.readouterr().err == ""


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_raiser(UserError("bad key")), debug=True) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: bad key\n")


def test_several_problems_are_several_lines_of_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_raiser(UserError("first\nsecond")), debug=False) == 2
    assert capsys.readouterr().err == "error: first\nsecond\n"
