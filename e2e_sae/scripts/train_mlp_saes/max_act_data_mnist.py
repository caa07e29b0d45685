"""Finds what an MLP's dictionary elements react to: `python max_act_data_mnist.py [config.yaml] [--set a.b=c]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from e2e_sae.mlp_training.config import MaxActConfig as Config
from e2e_sae.mlp_training.config import MLPSAEsConfig
from e2e_sae.mlp_training.max_activations import MaxActData, save_max_acts
from e2e_sae.scripts.train_mlp_saes import train_mnist_saes
from e2e_sae.scripts.yaml_command import yaml_command

DEFAULT_CONFIG = Path(__file__).with_name("max_act_data_mnist.yaml")


def main(config_path_or_obj: Path | str | Config = DEFAULT_CONFIG, overrides: Sequence[str] = ()) -> MaxActData:
    """Does what a YAML file or a `Config` says, and returns the data and the folder they are saved in.

    Without `infer.model_name`, `train_mnist_saes.py`'s SAEs are trained first, with this config's seed and data.

    Args:
        overrides: `dotted.key=value` each; for a YAML file only.
    """
    config = config_path_or_obj
    config = config if isinstance(config, Config) else Config.from_file(config, overrides)
    if config.infer.model_name is None:
        infer = config.infer.model_copy(update={"model_name": _train_saes(config)})
        config = config.model_copy(update={"infer": infer})
    return save_max_acts(config)


def _train_saes(config: Config) -> Path:
    saes = MLPSAEsConfig.from_file(train_mnist_saes.DEFAULT_CONFIG)
    train = saes.train.model_copy(update={"save_dir": config.infer.save_dir})
    return train_mnist_saes.main(saes.model_copy(update={"seed": config.seed, "data": config.data, "train": train}))


if __name__ == "__main__":
    sys.exit(yaml_command(main, "Find what an MLP's dictionary elements react to.", DEFAULT_CONFIG))
