"""`e2e_sae.loader` of the paper's library: language models by name or `.pt`, SAEs from earlier runs."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import PositiveInt
from torch import nn

from e2e_sae.base_config import BaseConfig
from e2e_sae.checkpoint import load_run
from e2e_sae.hooks import sae_key
from e2e_sae.legacy.types import TorchDtype
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig
from e2e_sae.models.stored import copy_parameters
from e2e_sae.saes import SAE


class HookedTransformerPreConfig(BaseConfig):
    """The `tlens_config` of a custom TransformerLens model."""

    d_model: PositiveInt
    """Width of the residual stream."""
    n_layers: PositiveInt
    """Blocks."""
    n_ctx: PositiveInt
    """Longest sequence."""
    d_head: PositiveInt
    """Width of a head."""
    d_vocab: PositiveInt
    """Vocabulary."""
    act_fn: str
    """Name of the MLP's activation function."""
    dtype: TorchDtype | None
    """Type of the weights; null: float32."""
    tokenizer_name: str
    """A tokenizer on the hub, or its folder."""


def load_tlens_model(tlens_model_name: str | None, tlens_model_path: Path | str | None) -> nn.Module:
    """Returns a TransformerLens model, on CUDA if there is one, frozen.

    Args:
        tlens_model_name: a model on the hub, loaded with TransformerLens' default weight processing; or
        tlens_model_path: a `.pt` with `final_config.yaml` beside it, used as stored, or a Hugging Face folder.

    Raises:
        UserError: neither or both are given, or it cannot be loaded.
    """
    values = {"tlens_model_name": tlens_model_name, "tlens_model_path": tlens_model_path}
    return load_lm(LMConfig.from_dict(values), "auto")


def load_pretrained_saes(
    saes: nn.ModuleDict, pretrained_sae_paths: Iterable[Path | str], all_param_names: Sequence[str], retrain_saes: bool
) -> list[str]:
    """Copies stored SAEs over those at the same positions, and returns the names of the parameters left to train.

    Args:
        saes: by position with `.` replaced by `-`; changed in place.
        pretrained_sae_paths: files or run folders; where two have the same position, the later one wins, and
            positions that `saes` lacks are passed over.
        all_param_names: names that begin with the key of an SAE.
        retrain_saes: train the copied ones too.

    Raises:
        CheckpointError: a file is damaged, or an SAE has another shape.
    """
    copied: set[str] = set()
    for path in pretrained_sae_paths:
        for name, stored in load_run(path).saes.items():
            key = sae_key(name)
            if key in saes:
                sae = saes[key]
                assert isinstance(sae, SAE)
                copy_parameters(sae, stored, Path(path))
                copied.add(key)
    return [name for name in all_param_names if retrain_saes or name.partition(".")[0] not in copied]
