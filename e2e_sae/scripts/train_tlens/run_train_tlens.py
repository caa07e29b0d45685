"""Trains a small language model: `python run_train_tlens.py <config.yaml> [--set a.b=c] [--debug]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from e2e_sae.lazy import lazy_names
from e2e_sae.lm_training.config import LMConfig
from e2e_sae.scripts.yaml_command import yaml_command


def main(config_path_or_obj: Path | str | LMConfig, overrides: Sequence[str] = ()) -> Path:
    """Trains the model of a YAML file or an `LMConfig`, and returns the run's folder.

    Args:
        overrides: `dotted.key=value` each; for a YAML file only.
    """
    from e2e_sae.lm_training.run import run_lm_training

    config = config_path_or_obj
    return run_lm_training(config if isinstance(config, LMConfig) else LMConfig.from_file(config, overrides))


__getattr__ = lazy_names(
    __name__,
    {"Config": "e2e_sae.lm_training.config:LMConfig", "HookedTransformerPreConfig": "e2e_sae.legacy.loader"},
)


if __name__ == "__main__":
    sys.exit(yaml_command(main, "Train a small language model from scratch; demos/stdlib_gpt2/train.yaml is one."))
