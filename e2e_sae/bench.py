"""`e2e-sae bench`: finds the benchmarks, which stand beside the library in a clone and inside it in an installation."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from e2e_sae.errors import MissingFileError
from e2e_sae.settings import REPO_ROOT


def bench(arguments: Sequence[str]) -> int:
    """Runs the benchmarks' command line and returns its exit code.

    Raises:
        MissingFileError: neither a wheel's copy nor the repository's `benchmarks/` is there.
    """
    if importlib.util.find_spec("e2e_sae.benchmarks") is not None:
        package = "e2e_sae.benchmarks"
    elif (REPO_ROOT / "benchmarks" / "cli.py").is_file():
        package = "benchmarks"
        sys.path.insert(0, str(REPO_ROOT))
    else:
        raise MissingFileError(f"there are no benchmarks in '{REPO_ROOT}': install e2e_sae again")
    cli: Any = importlib.import_module(f"{package}.cli")
    return cli.main(arguments, prog="e2e-sae bench")
