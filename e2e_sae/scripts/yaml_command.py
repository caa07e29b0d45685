"""The command line of a script that does what one YAML file says."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from e2e_sae.log import log_to_console
from e2e_sae.scripts.exit_codes import run_command


def yaml_command(
    main: Callable[[Path, Sequence[str]], object],
    description: str,
    default_config: Path | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses `CONFIG [--set KEY=VALUE] [--debug]`, calls `main(config, overrides)`, and returns the exit code.

    Args:
        default_config: YAML file that is used where none is given; None: one must be given.
        argv: arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=description)
    if default_config is None:
        parser.add_argument("config", type=Path, help="YAML file")
    else:
        shown = "YAML file (default: %(default)s)"
        parser.add_argument("config", nargs="?", type=Path, default=default_config, help=shown)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    log_to_console()
    return run_command(lambda: main(args.config, args.set), args.debug)
