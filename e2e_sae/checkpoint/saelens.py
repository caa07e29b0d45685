"""SAELens folders: `cfg.json` beside `sae_weights.safetensors`, as in `neuronpedia/gpt2-small__res_*-ajt`.

W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec; read are both layouts of `cfg.json`, the flat one and (from
SAELens 6) the one with `metadata`. Only what can be represented exactly: the "standard" architecture, with

    latents = max(0, (x - b_dec) W_enc + b_enc)     x - b_dec: only with `apply_b_dec_to_input`
    recon   = latents W_dec + b_dec

The subtraction is folded into b_enc (b_enc - b_dec W_enc). SAELens does not normalise the decoder in forward passes and
we do: rows that are not of unit norm n are folded into the encoder (n W_enc, n b_enc, W_dec / n), which gives equal
reconstructions and latents scaled by n. Rows of norm 1 +- 1e-4 stay as they are, and are divided by it in every
forward pass.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from e2e_sae.checkpoint.files import read_json, read_tensors
from e2e_sae.checkpoint.records import StoredRun, StoredSAE, stored_relu_sae
from e2e_sae.errors import CheckpointError
from e2e_sae.log import logger
from e2e_sae.models.lm_config import ProcessingConfig
from e2e_sae.saes.base import PARAMETER_NAMES

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
PAPER_SUFFIX = "-ajt"
"""How Neuronpedia's names for the paper's SAEs end."""
_UNIT_NORM_TOLERANCE = 1e-4
"""Far above what float32 leaves of a normalisation (1e-7), far below any decoder that was not normalised."""
_MODEL_VERSION_KEYS = {"revision", "checkpoint_index", "checkpoint_value"}
_NONE = (None, "none", False)


def is_saelens_folder(folder: Path) -> bool:
    """Says whether a folder holds an SAE of SAELens."""
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def read_saelens(folder: Path) -> StoredRun:
    """Returns the SAE of a folder.

    Raises:
        CheckpointError: it is damaged, or cannot be represented exactly.
    """
    config = _flat(folder)
    _check_representable(folder, config)
    name = config["hook_name"]
    tensors = read_tensors(folder / WEIGHTS_FILE)
    missing = [parameter for parameter in PARAMETER_NAMES if parameter not in tensors]
    if missing:
        raise CheckpointError(f"'{folder}': the SAE at {name} lacks {', '.join(missing)}")
    # SAELens once wrote a factor of ones even where none was trained.
    factor = tensors.pop("scaling_factor", torch.ones(1))
    extra = sorted(tensors.keys() - set(PARAMETER_NAMES))
    if extra or not bool((factor == 1).all()):
        what = f"tensors {extra}" if extra else "a scaling factor on its latents"
        raise CheckpointError(f"'{folder}': the SAE at {name} has {what}, which cannot be represented here")
    info = stored_relu_sae(folder / WEIGHTS_FILE, name, tensors).info
    if config.get("apply_b_dec_to_input", True):
        tensors["b_enc"] = _without_input_bias(tensors)
    tensors |= _with_unit_rows(folder, tensors)
    run_config: dict[str, Any] = {
        "tlens_model_name": config.get("model_name"),
        "tlens_processing": _processing(folder, config).to_dict(),
        "saes": {"sae_positions": [name], "dict_size_to_input_ratio": info.d_sae / info.d_in},
    }
    return StoredRun(folder, {name: StoredSAE(info, tensors)}, None, run_config, None)


def _flat(folder: Path) -> dict[str, Any]:
    """Returns `cfg.json` with what stands under `metadata` on top, and older names of keys replaced."""
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, Mapping):
        raise CheckpointError(f"'{folder / CONFIG_FILE}' is damaged: expected a JSON object")
    metadata = config.get("metadata")
    flat = {**config, **(metadata if isinstance(metadata, Mapping) else {})}
    for old, new in [("hook_point", "hook_name"), ("hook_point_head_index", "hook_head_index")]:
        flat.setdefault(new, flat.get(old))
    return flat


def _check_representable(folder: Path, config: Mapping[str, Any]) -> None:
    if not isinstance(config["hook_name"], str):
        raise CheckpointError(f"'{folder / CONFIG_FILE}' does not say where the SAE sits: it has no hook_name")
    required: dict[str, tuple[Any, ...]] = {
        "architecture": (None, "standard"),
        "activation_fn_str": (None, "relu"),
        "activation_fn": (None, "relu"),
        "normalize_activations": _NONE,
        "reshape_activations": _NONE,
        "hook_head_index": (None,),
        "hook_name_out": (None, config["hook_name"]),
        "model_class_name": (None, "HookedTransformer"),
    }
    for key, allowed in required.items():
        if config.get(key) not in allowed:
            expected = " or ".join(str(value) for value in allowed if value not in (None, False)) or "none"
            raise CheckpointError(
                f"'{folder}' cannot be represented here: {key} is {config[key]!r} (expected: {expected})"
            )


def _processing(folder: Path, config: Mapping[str, Any]) -> ProcessingConfig:
    """Returns how the weights of the model were processed that the SAE was trained on.

    SAELens loads models without processing, but for `model_from_pretrained_kwargs`. The paper's SAEs were converted
    for it, and were trained with TransformerLens' defaults whatever the converter wrote there.
    """
    names = (folder.name, str(config.get("neuronpedia_id")))
    if any(name.endswith(PAPER_SUFFIX) for name in names):
        return ProcessingConfig()
    given = config.get("model_from_pretrained_kwargs") or {}
    version = sorted(given.keys() & _MODEL_VERSION_KEYS)
    if version:
        raise CheckpointError(
            f"'{folder}' belongs to another version of its model ({version[0]}={given[version[0]]!r})"
        )
    options = {key: bool(given.get(key, False)) for key in ProcessingConfig.model_fields}
    return ProcessingConfig(**options)


def _without_input_bias(tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns b_enc - b_dec W_enc, computed in float64: (x - b_dec) W_enc + b_enc = x W_enc + that."""
    b_enc, b_dec, W_enc = (tensors[name].double() for name in ("b_enc", "b_dec", "W_enc"))
    return (b_enc - b_dec @ W_enc).to(tensors["b_enc"].dtype)


def _with_unit_rows(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters with the norms of the decoder's rows moved into the encoder; nothing if they are 1."""
    norms = tensors["W_dec"].double().norm(dim=1)
    if bool(((norms - 1).abs() < _UNIT_NORM_TOLERANCE).all()):
        return {}
    logger.info(f"'{folder}': decoder rows are not of unit norm: their norms are moved into the encoder")
    dtype = tensors["W_dec"].dtype
    return {
        "W_enc": (tensors["W_enc"].double() * norms).to(dtype),
        "b_enc": (tensors["b_enc"].double() * norms).to(dtype),
        # A row of zeros stays one: its latent writes nothing.
        "W_dec": (tensors["W_dec"].double() / norms.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).to(dtype),
    }
