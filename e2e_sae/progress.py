"""Progress bars, all alike: on stdout, quiet in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, *, inner: bool = False, **options: Any) -> Any:
    """Returns a tqdm bar on stdout; where stdout is no terminal it prints about one line a minute.

    Args:
        iterable: what to go through; None: the caller updates the bar.
        inner: a passing bar below another one: it goes away when done, and is not shown in a log file.
        options: tqdm's.
    """
    is_terminal = sys.stdout.isatty()
    return tqdm(
        iterable,
        file=sys.stdout,
        mininterval=0.2 if is_terminal else 60.0,
        dynamic_ncols=True,
        leave=not inner,
        disable=inner and not is_terminal,
        **options,
    )
