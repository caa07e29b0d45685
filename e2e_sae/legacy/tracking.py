"""`init_wandb` of `e2e_sae.utils` of the paper's library."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from e2e_sae.config import Config
from e2e_sae.legacy.configs import replace_pydantic_model
from e2e_sae.wandb_tracker import start_wandb

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def init_wandb(config: ConfigT, project: str, sweep_config_path: Path | str | None = None) -> ConfigT:
    """Starts a W&B run, which `wandb.log` then writes to, and returns the config with a sweep's values in it.

    Where W&B cannot be started there is one warning, and the config comes back as it is.

    Args:
        sweep_config_path: accepted; a sweep's values come through `wandb agent`.
    """
    del sweep_config_path
    tracker = start_wandb(project)
    if tracker is None:
        return config
    config = replace_pydantic_model(config, tracker.sweep_values)
    if isinstance(config, Config):
        tracker.describe(config.run_name, config)
    return config
