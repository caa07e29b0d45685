"""Reads the run folders of `run_train_mnist.py` and `train_mnist_saes.py`, the paper's library's ones too."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from e2e_sae.base_config import read_yaml
from e2e_sae.checkpoint.files import read_state_dict
from e2e_sae.checkpoint.run_dir import RunDir
from e2e_sae.data.images import DIGITS, ImageData
from e2e_sae.errors import CheckpointError, UserError
from e2e_sae.mlp_training.config import MLPSAEsConfig
from e2e_sae.models.mlp import MLP, MLPMod, insert_sparsifiers

_WEIGHT = re.compile(r"^layers\.(\d+)\.linear\.weight$")


class StoredMLP(NamedTuple):
    """A trained MLP."""

    mlp: MLP
    """Frozen."""
    data: str
    """What it was trained on."""


class StoredMLPMod(NamedTuple):
    """A trained MLP with trained sparsifiers."""

    mod: MLPMod
    """Frozen."""
    mlp: MLP
    """The MLP without sparsifiers; shares the layers."""
    data: str
    """What the sparsifiers were trained on."""


def load_mlp(run_dir: Path) -> StoredMLP:
    """Returns the MLP of a run folder, from its highest-numbered `.pt`.

    Raises:
        UserError: there is no such run, its files are damaged, or it holds no MLP.
    """
    values = read_yaml(RunDir.open(run_dir).config_file)
    path = latest_weights(run_dir)
    state = read_state_dict(path)
    weights = {int(m[1]): t for name, t in state.items() if (m := _WEIGHT.match(name)) and t.ndim == 2}
    if sorted(weights) != list(range(len(weights))) or not weights:
        raise CheckpointError(f"'{path}' holds no MLP: expected layers.0.linear.weight and so on, got {_some(state)}")
    input_size, *sizes = weights[0].shape[1], *(weights[i].shape[0] for i in range(len(weights)))
    mlp = MLP(sizes[:-1], input_size, sizes[-1], bias="layers.0.linear.bias" in state)
    _load_(mlp, state, path)
    return StoredMLP(mlp.requires_grad_(False).eval(), str(values.get("data", DIGITS)))


def load_mlp_mod(run_dir: Path) -> StoredMLPMod:
    """Returns the sparsifiers of a run folder in the MLP they were trained on.

    Raises:
        UserError: there is no such run, or a file of it or of its MLP is missing or damaged.
    """
    values = read_yaml(RunDir.open(run_dir).config_file)
    if "saved_model_dir" not in values:
        raise CheckpointError(f"'{run_dir}' holds no sparsifiers: expected a run of train_mnist_saes.py")
    # The images may have moved since; whoever opens them says so.
    config = MLPSAEsConfig.from_dict({**values, "data": None}, base_dir=run_dir)
    if config.saved_model_dir is None:
        raise CheckpointError(f"'{run_dir}' does not say which MLP its sparsifiers belong to: set saved_model_dir")
    mlp, data = load_mlp(config.saved_model_dir)
    mod = make_mlp_mod(mlp, config)
    path = latest_weights(run_dir)
    _load_(mod.sparsifiers, read_state_dict(path), path)
    return StoredMLPMod(mod.requires_grad_(False).eval(), mlp, str(values.get("data") or data))


def make_mlp_mod(mlp: MLP, config: MLPSAEsConfig) -> MLPMod:
    """Returns this MLP with new sparsifiers."""
    train = config.train
    if len(mlp.sizes) == 2:
        raise UserError(f"the MLP in '{config.saved_model_dir}' has no hidden layer: there is nothing to sparsify")
    return insert_sparsifiers(mlp, train.type_of_sparsifier, train.dict_eles_to_input_ratio, train.k or 0)


def latest_weights(run_dir: Path) -> Path:
    """Returns the `.pt` whose name ends with the highest number."""
    found = [(int(m[1]), path) for path in run_dir.glob("*.pt") if (m := re.search(r"(\d+)$", path.stem))]
    if not found:
        raise CheckpointError(f"'{run_dir}' holds no weights: expected epoch_<n>.pt")
    return max(found)[1]


def check_fits(mlp: MLP, data: ImageData, source: str) -> None:
    """Raises a UserError unless the images are of the size that the MLP takes."""
    if data.d_in != mlp.sizes[0]:
        height, width = data.height_width
        raise UserError(
            f"the MLP takes {mlp.sizes[0]} pixels and the images of '{source}' have {data.d_in} "
            f"({height}x{width}): set data to what it was trained on"
        )
    if data.n_classes > mlp.sizes[-1]:
        raise UserError(f"the MLP knows {mlp.sizes[-1]} classes and '{source}' has {data.n_classes}: set data")


def _load_(module: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        problem = " ".join(str(error).split()[:40])
        raise CheckpointError(f"'{path}' does not fit its final_config.yaml: {problem}") from None


def _some(state: dict[str, Tensor]) -> str:
    return ", ".join(list(state)[:3]) or "nothing"
