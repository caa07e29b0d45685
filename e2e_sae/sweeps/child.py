"""The process of one run, or of several: `python -m e2e_sae.sweeps.child PARENT_PID N LOCK_1 ... LOCK_N PROGRAM ...`.

It runs the program as `python PROGRAM ARGUMENTS...` would, with two things around it: when the sweep's own process is
gone (killed, its terminal closed), the run gets a SIGTERM, which saves and ends it; and it waits for the locks of its
run folders, so that the next sweep does not write into a folder in which such an orphan is still saving.
"""

import os
import runpy
import signal
import sys
import threading
import time
from contextlib import ExitStack

from filelock import FileLock

LOOK_EVERY_S = 0.5
"""Seconds between two looks at the parent."""
ORPHAN_TIMEOUT_S = 600
"""How long an orphan may take to save itself; after that this run fails instead of waiting for ever."""


def main(arguments: list[str]) -> None:
    """Runs the program."""
    parent, n_locks, *rest = arguments
    locks, program = rest[: int(n_locks)], rest[int(n_locks) :]
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(FileLock(lock, timeout=ORPHAN_TIMEOUT_S))
        sys.argv = program
        sys.path[0] = os.path.dirname(os.path.abspath(program[0]))
        runpy.run_path(program[0], run_name="__main__")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:])
