"""Trains a small language model: `python run_train_tlens.py <config.yaml> [--set a.b=c] [--debug]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from e2e_sae.lazy import lazy_names
from e2e_sae.lm_training.config import LMConfig
from e2e_sae.log import log_to_console
from e2e_sae.scripts.exit_codes import run_command


def main(config_path_or_obj: Path | str | LMConfig, *, overrides: Sequence[str] = ()) -> Path:
    """Trains the model of a YAML file or an `LMConfig`, and returns the run's folder.

    Args:
        overrides: `dotted.key=value` each; for a YAML file only.
    """
    from e2e_sae.lm_training.run import run_lm_training

    config = config_path_or_obj
    return run_lm_training(config if isinstance(config, LMConfig) else LMConfig.from_file(config, overrides))


def command_line(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments, trains, and returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a small language model from scratch.")
    parser.add_argument("config", help="YAML file (demos/stdlib_gpt2/train.yaml is one)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    log_to_console()
    return run_command(lambda: main(args.config, overrides=args.set), args.debug)


__getattr__ = lazy_names(
    __name__,
    {"Config": "e2e_sae.lm_training.config:LMConfig", "HookedTransformerPreConfig": "e2e_sae.legacy.loader"},
)


if __name__ == "__main__":
    sys.exit(command_line())
