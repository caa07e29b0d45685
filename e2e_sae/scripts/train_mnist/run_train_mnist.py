"""Trains an MLP on images: `python run_train_mnist.py [config.yaml] [--set a.b=c] [--debug]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from e2e_sae.mlp_training.config import MLPConfig as Config
from e2e_sae.scripts.yaml_command import yaml_command

DEFAULT_CONFIG = Path(__file__).with_name("mnist.yaml")


def main(config_path_or_obj: Path | str | Config = DEFAULT_CONFIG, overrides: Sequence[str] = ()) -> Path:
    """Trains the MLP of a YAML file or a `Config`, and returns the run's folder.

    Args:
        overrides: `dotted.key=value` each; for a YAML file only.
    """
    from e2e_sae.mlp_training.train_mlp import train_mlp

    config = config_path_or_obj
    return train_mlp(config if isinstance(config, Config) else Config.from_file(config, overrides))


if __name__ == "__main__":
    sys.exit(yaml_command(main, "Train an MLP on images.", DEFAULT_CONFIG))
