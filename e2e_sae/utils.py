"""Import path of the paper's library, and nothing else: see `legacy/`."""

from e2e_sae.legacy.configs import load_config, replace_pydantic_model, save_module
from e2e_sae.legacy.hooks import filter_names, get_hook_shapes
from e2e_sae.legacy.numbers import set_seed, to_numpy
from e2e_sae.legacy.schedules import get_cosine_schedule_with_warmup, get_linear_lr_schedule
from e2e_sae.legacy.tracking import init_wandb
from e2e_sae.legacy.types import to_root_path

__all__ = [
    "filter_names",
    "get_cosine_schedule_with_warmup",
    "get_hook_shapes",
    "get_linear_lr_schedule",
    "init_wandb",
    "load_config",
    "replace_pydantic_model",
    "save_module",
    "set_seed",
    "to_numpy",
    "to_root_path",
]
