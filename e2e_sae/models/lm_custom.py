"""Custom TransformerLens models: built from a `tlens_config`, and read from the paper's `.pt` files.

Such a file is the state dict of a `HookedTransformer`; `final_config.yaml` beside it has a `tlens_config`.
TransformerLens 3 loads it directly. On 4.x the same network is a native bridge, and TransformerLens' own
`convert_tl_checkpoint` translates the keys.
"""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from e2e_sae.base_config import read_yaml
from e2e_sae.checkpoint.files import UNPICKLING_ERRORS
from e2e_sae.errors import CheckpointError, MissingFileError, UserError
from e2e_sae.models.tlens import first_line, hooked_classes, tlens_version
from e2e_sae.models.tokenizers import find_local_tokenizer, set_tokenizer

CONFIG_NAME = "final_config.yaml"
"""The file beside a legacy `.pt` that says what network it is."""

_REQUIRED = ("d_model", "n_layers", "n_ctx", "d_head", "d_vocab", "act_fn")
# Buffers that old HookedTransformers stored with the weights and that follow from the config.
_BUFFERS = (".attn.mask", ".attn.IGNORE", ".attn.rotary_sin", ".attn.rotary_cos", ".attn.alibi")


def build_custom_lm(tlens_config: Mapping[str, Any], model_class: Literal["hooked", "bridge"]) -> nn.Module:
    """Returns a randomly initialised model, trainable, on the CPU, without tokenizer.

    Args:
        tlens_config: fields of TransformerLens' config: d_model, n_layers, n_ctx, d_head, d_vocab, act_fn,
            and what else its classes know. `tokenizer_name` is only noted.

    Raises:
        UserError: a required field is missing, or TransformerLens refuses the values.
    """
    missing = [key for key in _REQUIRED if tlens_config.get(key) is None]
    if missing:
        raise UserError(f"tlens_config lacks {', '.join(missing)}: expected {', '.join(_REQUIRED)}")
    fields = dict(tlens_config)
    tokenizer_name = fields.pop("tokenizer_name", None)
    fields["dtype"] = getattr(torch, str(fields.get("dtype") or "float32").removeprefix("torch."))
    fields["device"] = "cpu"
    try:
        if model_class == "hooked":
            classes = hooked_classes()
            model = classes.model(classes.config.from_dict(fields), move_to_device=False)
        else:
            from transformer_lens.model_bridge import TransformerBridge

            bridge_class: Any = TransformerBridge
            model = bridge_class.boot_native(fields, device="cpu", dtype=fields["dtype"])
            model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    except (TypeError, ValueError, AssertionError, NotImplementedError, KeyError) as error:
        raise UserError(f"TransformerLens {tlens_version()} refuses the tlens_config: {first_line(error)}") from None
    model.cfg.tokenizer_name = tokenizer_name
    return model


def load_legacy_lm(path: Path, model_class: Literal["hooked", "bridge"]) -> nn.Module:
    """Returns the model of a `.pt` state dict with its weights as stored: no processing.

    Raises:
        MissingFileError: there is no such file, or no `final_config.yaml` beside it.
        CheckpointError: the file is damaged, holds pickled code, or does not fit its config.
    """
    config_path = path.parent / CONFIG_NAME
    if not path.is_file():
        raise MissingFileError(f"language model '{path}' does not exist")
    if not config_path.is_file():
        raise MissingFileError(
            f"'{path}' needs the {CONFIG_NAME} it was saved with, and there is none in '{path.parent}'"
        )
    values = read_yaml(config_path)
    tlens_config = values.get("tlens_config")
    if not isinstance(tlens_config, dict):
        raise UserError(f"'{config_path}' has no 'tlens_config' block: it does not describe a language model")
    state_dict = read_state_dict(path)
    model = build_custom_lm(tlens_config, model_class)
    load_state_dict_(model, state_dict, source=path)
    cfg: Any = model.cfg
    cfg.model_name = path.name
    if cfg.tokenizer_name is not None:
        _attach_local_tokenizer(model, path.parent)
    return model


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a `.pt` file, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: the file is damaged, holds something else than named tensors, or pickled code.
    """
    damaged = f"'{path}' is damaged, or no torch file"
    try:
        with warnings.catch_warnings():
            # Torch warns about files of other pickle versions before it refuses them.
            warnings.simplefilter("ignore")
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch advises to load unsafely here: that advice is not passed on.
        if any(word in str(error).lower() for word in ("unsupported global", "unsupported class")):
            raise CheckpointError(
                f"'{path}' holds pickled code besides tensors and was refused: save a plain state dict"
            ) from None
        raise CheckpointError(damaged) from None
    except UNPICKLING_ERRORS as error:
        raise CheckpointError(f"{damaged}: {first_line(error)}") from None
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise CheckpointError(f"'{path}' holds no state dict: expected names and tensors")
    return cast(dict[str, Tensor], values)


def load_state_dict_(model: nn.Module, state_dict: Mapping[str, Tensor], source: Path) -> None:
    """Copies a HookedTransformer state dict into a custom model of either class.

    Raises:
        CheckpointError: tensors are missing, too many, or of other shapes; the message names them.
    """
    target: Any = model
    tensors = {key: value for key, value in state_dict.items() if not key.endswith(_BUFFERS)}
    try:
        if hasattr(target, "original_model"):
            from transformer_lens.utilities import tl_checkpoint_conversion as conversion

            tensors = conversion.convert_tl_checkpoint(tensors, target.cfg)
        expected = {k: tuple(v.shape) for k, v in target.state_dict().items() if not k.endswith(_BUFFERS)}
        problem = _misfit({key: tuple(value.shape) for key, value in tensors.items()}, expected)
        if problem is None:
            target.load_state_dict(tensors, strict=False)
    except ImportError:
        raise UserError(
            f"TransformerLens {tlens_version()} cannot load the legacy file '{source}' as a bridge:"
            " set tlens_model_class to 'auto'"
        ) from None
    except (RuntimeError, ValueError) as error:
        problem = first_line(error)
    if problem is not None:
        raise CheckpointError(f"'{source}' does not fit the tlens_config in its {CONFIG_NAME}: {problem}")


def _misfit(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str | None:
    wrong = [
        f"{k} is {list(given[k])}, expected {list(expected[k])}" for k in given if expected.get(k, given[k]) != given[k]
    ]
    missing = [f"{key} is missing" for key in expected if key not in given]
    extra = [f"{key} is not part of the model" for key in given if key not in expected]
    problems = wrong + missing + extra
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more if problems else None


def _attach_local_tokenizer(model: nn.Module, folder: Path) -> None:
    """Gives the model its tokenizer if that is a folder; a hub name waits until text must be tokenised."""
    cfg: Any = model.cfg
    for place in (folder / cfg.tokenizer_name, Path(cfg.tokenizer_name)):
        if place.is_dir():
            cfg.tokenizer_name = str(place.resolve())
            tokenizer = find_local_tokenizer(place)
            if tokenizer is not None:
                set_tokenizer(model, tokenizer)
            return
