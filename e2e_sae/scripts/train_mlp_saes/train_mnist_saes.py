"""Trains SAEs or codebooks on an MLP: `python train_mnist_saes.py [config.yaml] [--set a.b=c] [--debug]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from e2e_sae.mlp_training.config import MLPConfig
from e2e_sae.mlp_training.config import MLPSAEsConfig as Config
from e2e_sae.scripts.train_mnist import run_train_mnist
from e2e_sae.scripts.yaml_command import yaml_command

DEFAULT_CONFIG = Path(__file__).with_name("mnist_saes.yaml")


def main(config_path_or_obj: Path | str | Config = DEFAULT_CONFIG, overrides: Sequence[str] = ()) -> Path:
    """Trains the sparsifiers of a YAML file or a `Config`, and returns the run's folder.

    Without `saved_model_dir`, `run_train_mnist.py`'s MLP is trained first, with this config's seed and data.

    Args:
        overrides: `dotted.key=value` each; for a YAML file only.
    """
    from e2e_sae.mlp_training.train_sparsifiers import train_sparsifiers

    config = config_path_or_obj
    config = config if isinstance(config, Config) else Config.from_file(config, overrides)
    if config.saved_model_dir is None:
        config = config.model_copy(update={"saved_model_dir": _train_mlp(config)})
    return train_sparsifiers(config)


def _train_mlp(config: Config) -> Path:
    mlp = MLPConfig.from_file(run_train_mnist.DEFAULT_CONFIG)
    train = mlp.train.model_copy(update={"save_dir": config.train.save_dir})
    data = config.data or mlp.data
    return run_train_mnist.main(mlp.model_copy(update={"seed": config.seed, "data": data, "train": train}))


if __name__ == "__main__":
    sys.exit(yaml_command(main, "Train SAEs or codebooks on an MLP.", DEFAULT_CONFIG))
