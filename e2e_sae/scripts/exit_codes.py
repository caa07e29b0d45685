"""What a command ends with: the one place where exceptions become exit codes and one-line messages.

| code | meaning |
|------|---------|
| 0    | done |
| 1    | the run failed: a non-finite loss, out of memory, an internal error |
| 2    | the user's mistake, no permission to write, or a full disk |
| 130  | Ctrl-C |
| 143  | SIGTERM |

Imports nothing heavy: torch's errors are recognised by name and text.
"""

import errno
import signal
import sys
import traceback
from collections.abc import Callable

from e2e_sae.errors import Interrupted, RunFailed, UserError

DONE = 0
FAILED = 1
USER_ERROR = 2

OUT_OF_MEMORY_ADVICE = (
    "use a smaller batch_size (effective_batch_size keeps the gradient the same) or dict_size_to_input_ratio"
)

# EFBIG is what a file-size limit gives; to the user it is one more disk that takes no more.
_DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}
# How CUDA, MPS and the CPU allocator word it when they raise a plain RuntimeError.
_OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "mps backend out of memory",
)


def run_command(command: Callable[[], object], debug: bool) -> int:
    """Runs a command and returns its exit code; whatever it raised is one message on stderr.

    Args:
        command: does the work; its result is ignored.
        debug: show the traceback above the message.
    """
    try:
        command()
        return DONE
    # The process ends here whatever happened, and nothing is swallowed: every exception becomes a message.
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        code, message = describe_failure(error)
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        return code


def describe_failure(error: BaseException) -> tuple[int, str]:
    """Returns the exit code and the message for what a command raised."""
    if isinstance(error, UserError):
        return USER_ERROR, f"error: {error}"
    if isinstance(error, Interrupted):
        return 128 + error.signum, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if _is_out_of_memory(error):
        return FAILED, f"error: out of memory ({_first_line(error)}): {OUT_OF_MEMORY_ADVICE}"
    if isinstance(error, RunFailed):
        return FAILED, f"error: {error}"
    if _has_errno(error, _DISK_FULL_ERRNOS):
        where = f" (writing '{error.filename}')" if isinstance(error, OSError) and error.filename else ""
        return USER_ERROR, (
            f"error: disk full or over quota{where}: {_reason(error)}; what was saved before is intact, "
            "make room and run it again (a training goes on with: e2e-sae train --resume RUN_DIR)"
        )
    if _has_errno(error, _NO_PERMISSION_ERRNOS):
        where = f" '{error.filename}'" if isinstance(error, OSError) and error.filename else ""
        return (
            USER_ERROR,
            f"error: no permission{where}: {_reason(error)}; choose another folder or its rights",
        )
    return FAILED, (
        f"internal error: {type(error).__name__}: {_first_line(error)}; run again with --debug and report the traceback"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY_WORDS)


def _has_errno(error: BaseException, errnos: set[int]) -> bool:
    """Says whether the operating system gave one of these errors, also through a library's own exception."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in errnos
    # safetensors and other Rust libraries put the number into the text: "... (os error 28)".
    return any(f"os error {number})" in str(error) for number in errnos)


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
    return text[:1].lower() + text[1:]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
