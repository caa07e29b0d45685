"""Errors a user can cause or meet: each is one clear line (what was given, what was expected, what to do).

The command line turns a `UserError` into exit code 2 and a `RunFailed` into exit code 1, without a
traceback. Every class also derives from the builtin that Python code would expect to catch.
"""

import difflib
import shlex
import signal
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user asked for: a config, a path, a name, a data set."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that was named does not exist."""

    # FileNotFoundError formats (errno, strerror); these errors carry one finished sentence.
    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete, unsafe, or made for another model."""


class RunFailed(RuntimeError):
    """A run that started well and cannot go on: a non-finite loss, no memory left."""


class Interrupted(Exception):
    """A run that a signal stopped, after it had saved itself. The command line exits with 128 + `signum`."""

    def __init__(self, signum: int, *run_dirs: Path):
        """
        Args:
            signum: the signal that was received.
            run_dirs: folders that the run, or its members, can be resumed from; none if it writes nothing.
        """
        self.signum = signum
        self.run_dirs = run_dirs
        how = f"; go on with: e2e-sae train --resume {shlex.join(map(str, run_dirs))}" if run_dirs else ""
        super().__init__(f"interrupted by {signal.Signals(signum).name}{how}")

    @property
    def run_dir(self) -> Path | None:
        """The first folder."""
        return self.run_dirs[0] if self.run_dirs else None


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Returns up to `n` candidates that are spelled most like `name`, best first."""
    pool = list(candidates)
    close = difflib.get_close_matches(name, pool, n=n, cutoff=0.5)
    return close or [c for c in pool if name.lower() in c.lower() or c.lower() in name.lower()][:n]


def did_you_mean(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """Returns ` Did you mean 'x' or 'y'?` for the nearest candidates, or an empty string."""
    close = nearest(name, candidates, n)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
