"""The config helpers of `e2e_sae.utils` of the paper's library: read, change, save beside a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel
from torch import nn

from e2e_sae.base_config import BaseConfig, deep_update, read_yaml
from e2e_sae.checkpoint.files import new_file, write_pickled, write_text
from e2e_sae.legacy.errors import LegacyAssertion

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(config_path_or_obj: Path | str | ConfigT, config_model: type[ConfigT]) -> ConfigT:
    """Returns the config of a `.yaml` file, or the config itself if it already is one.

    Raises:
        LegacyAssertion: no such file, or not a `.yaml`.
        UserError: its values are not valid.
    """
    if isinstance(config_path_or_obj, config_model):
        return config_path_or_obj
    if not isinstance(config_path_or_obj, str | Path):
        raise LegacyAssertion(f"expected a path or a {config_model.__name__}, got {type(config_path_or_obj).__name__}")
    path = Path(config_path_or_obj)
    if path.suffix != ".yaml":
        raise LegacyAssertion(f"config '{path}' must end in .yaml")
    if not path.is_file():
        raise LegacyAssertion(f"config '{path}' does not exist")
    if issubclass(config_model, BaseConfig):
        return config_model.from_file(path)
    return config_model(**read_yaml(path))


def replace_pydantic_model(model: ConfigT, *updates: Mapping[str, Any]) -> ConfigT:
    """Returns a config with nested values replaced: mappings merge, everything else (lists, None) replaces."""
    values = model.model_dump()
    for update in updates:
        values = deep_update(values, update)
    return type(model)(**values)


def save_module(
    config_dict: Mapping[str, Any],
    save_dir: Path,
    module: nn.Module,
    model_filename: str,
    config_filename: str = "final_config.yaml",
) -> None:
    """Writes a module's state dict, and, if the folder did not exist, the config beside it."""
    if not save_dir.exists():
        save_dir.mkdir(parents=True)
        write_text(save_dir / config_filename, yaml.safe_dump(dict(config_dict)))
    with new_file(save_dir / model_filename) as temporary:
        write_pickled(temporary, module.state_dict())
