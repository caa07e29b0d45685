"""Progress bars, all alike: on stdout, quiet in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """Returns a tqdm bar on stdout; where stdout is no terminal it prints about one line a minute."""
    interval = 0.2 if sys.stdout.isatty() else 60.0
    return tqdm(iterable, file=sys.stdout, mininterval=interval, dynamic_ncols=True, **options)
