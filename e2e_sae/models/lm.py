"""Loading the frozen language model: from the hub, from a Hugging Face folder, or from a legacy `.pt` file.

The result is a TransformerLens `HookedTransformer` (3.x) or `TransformerBridge` (4.x, compatibility mode), in
eval mode, with frozen parameters, and with the weight processing that the config asks for. A local model
never asks the network for anything. Custom TransformerLens models and their `.pt` files: `lm_custom.py`.
"""

import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from e2e_sae.errors import CheckpointError, MissingFileError, UserError, did_you_mean
from e2e_sae.models.lean import lazy_copies, own_memory_, settle_
from e2e_sae.models.lm_config import LMConfig, ProcessingConfig
from e2e_sae.models.lm_custom import CONFIG_NAME, load_legacy_lm
from e2e_sae.models.tlens import first_line, hooked_classes, quietly, resolve_model_class, tlens_version
from e2e_sae.models.tokenizers import find_local_tokenizer, placeholder_tokenizer
from e2e_sae.types import torch_dtype

# What Hugging Face and TransformerLens raise for a model they cannot load. Torch's lack of memory is a
# RuntimeError too, and is let through before.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    RuntimeError,
)


class LMFacts(NamedTuple):
    """What the rest of the library needs to know about a language model."""

    n_layers: int
    """Number of blocks."""
    d_model: int
    """Width of the residual stream."""
    d_vocab: int
    """Number of token ids the embedding knows."""
    n_ctx: int
    """Longest sequence, in tokens."""
    device: torch.device
    """Where the parameters are."""
    dtype: torch.dtype
    """Dtype of the parameters."""
    class_name: str
    """`HookedTransformer` or `TransformerBridge`."""


def load_lm(config: LMConfig, device: str = "cpu") -> nn.Module:
    """Returns the frozen language model that the config names.

    Args:
        config: which model, which class, which weight processing, which dtype.
        device: `cpu`, `cuda`, `cuda:1`, ..., or `auto` (CUDA where there is one).

    Raises:
        UserError: the model, its architecture, the class or the device cannot be had.
        CheckpointError: the weights are damaged, do not fit, or hold pickled code.
    """
    place = resolve_device(device)
    model_class = resolve_model_class(config.tlens_model_class)
    path = config.tlens_model_path
    with quietly(keep_progress=path is None), lazy_copies():
        if path is None:
            model = _load_from_hub(config, model_class, place)
        elif path.is_dir():
            model = _load_from_folder(path, config, model_class, place)
        else:
            model = load_legacy_lm(path, model_class)
        model = move_lm(model, place, torch_dtype(config.dtype))
    freeze_(model)
    settle_(model)
    return model


def model_facts(model: nn.Module) -> LMFacts:
    """Returns sizes, place and dtype of a `HookedTransformer` or `TransformerBridge`."""
    cfg: Any = model.cfg
    parameter = next(iter(model.parameters()))
    return LMFacts(
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        d_vocab=int(cfg.d_vocab),
        n_ctx=int(cfg.n_ctx),
        device=parameter.device,
        dtype=parameter.dtype,
        class_name=type(model).__name__,
    )


def is_bridge(model: nn.Module) -> bool:
    """Returns whether the model is a `TransformerBridge` (else a `HookedTransformer`)."""
    return hasattr(model, "original_model")


def move_lm(model: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Moves and casts the model in place, without TransformerLens' printed lines, and returns it."""
    facts = model_facts(model)
    mover: Any = model
    if device is not None and facts.device != device:
        mover.to(device, print_details=False)
    if dtype is not None and facts.dtype != dtype:
        mover.to(dtype, print_details=False)
    return model


def freeze_(model: nn.Module) -> None:
    """Puts the model into eval mode and stops the gradients of all parameters, also those behind a bridge."""
    model.eval()
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    original: Any = getattr(model, "original_model", None)
    if isinstance(original, nn.Module):
        original.eval().requires_grad_(False)


def resolve_device(device: str) -> torch.device:
    """Returns the device of that name; `auto` means CUDA where there is one.

    Raises:
        UserError: no such device, or CUDA was asked for and is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"no device is called '{device}': expected 'cpu', 'cuda', 'cuda:0' or 'auto'") from None
    if place.type == "cuda":
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n_devices == 0:
            raise UserError(f"device '{device}' was asked for, but torch sees no CUDA device: use 'cpu' or 'auto'")
        # `cuda` and `cuda:0` differ in torch's comparison, and parameters report the latter.
        index = int(device.partition(":")[2] or torch.cuda.current_device())
        if index >= n_devices:
            raise UserError(f"device '{device}' was asked for, but torch sees {n_devices} CUDA device(s) only")
        return torch.device("cuda", index)
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' was asked for, but torch cannot use it here: use 'cpu' or 'auto'")
    return place


def _load_from_hub(config: LMConfig, model_class: Literal["hooked", "bridge"], device: torch.device) -> nn.Module:
    name = config.tlens_model_name
    assert name is not None
    if (Path(name) / "config.json").is_file():
        raise UserError(f"tlens_model_name '{name}' is a folder here: give it as tlens_model_path")
    version: dict[str, Any] = {"revision": config.revision} if config.revision is not None else {}
    step = {"checkpoint_index": config.checkpoint_index, "checkpoint_value": config.checkpoint_value}
    version |= {key: value for key, value in step.items() if value is not None}
    try:
        if model_class == "hooked":
            return hooked_classes().model.from_pretrained(
                name,
                device=str(device),
                dtype=torch_dtype(config.dtype),
                **config.processing.model_dump(),
                **version,
            )
        bridge = _boot(name, device, torch_dtype(config.dtype), version)
    except torch.OutOfMemoryError:
        raise
    except _LOAD_ERRORS as error:
        raise UserError(_hub_problem(name, error)) from None
    _process(bridge, config.processing, name)
    return bridge


def _boot(name: str, device: torch.device, dtype: torch.dtype, version: dict[str, Any]) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    def boot(**more: Any) -> Any:
        return TransformerBridge.boot_transformers(name, device=str(device), dtype=dtype, **version, **more)

    try:
        return boot()
    except (OSError, ValueError, ImportError) as error:
        if "tokenizer" not in str(error).lower():
            raise
    # A model without a usable tokenizer still runs on token ids.
    bridge = boot(tokenizer=placeholder_tokenizer())
    bridge.tokenizer = None
    return bridge


def _hub_problem(name: str, error: BaseException) -> str:
    text = str(error)
    what = f"model '{name}' cannot be loaded from the hub with TransformerLens {tlens_version()}"
    if "Valid official model names" in text or "not found. Valid" in text:
        return f"TransformerLens {tlens_version()} knows no model '{name}'.{_near_names(name)}"
    offline = [k for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(k, "0") not in ("", "0")]
    if isinstance(error, OSError) and offline:
        return f"{what}: it is not in the local cache, and {offline[0]} forbids the network.{_near_names(name)}"
    if isinstance(error, OSError):
        return f"{what}: check the name and the network ({first_line(error)}){_near_names(name)}"
    return f"{what}: {first_line(error)}"


def _near_names(name: str) -> str:
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    known = [*OFFICIAL_MODEL_NAMES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)]
    return "" if name in known else did_you_mean(name, known)


def _load_from_folder(
    folder: Path, config: LMConfig, model_class: Literal["hooked", "bridge"], device: torch.device
) -> nn.Module:
    settings = _read_folder_config(folder)
    # Processing wants single precision at least: half-precision models are cast once that is done.
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    # In a list, to be handed over: a name would keep it alive while its weights are processed.
    hf_model = [_load_hf_weights(folder, dtype).to(device)]
    own_memory_(hf_model[0])
    tokenizer = find_local_tokenizer(folder)
    try:
        if model_class == "hooked":
            return _hooked_from_hf(folder, settings, hf_model.pop(), tokenizer, config.processing)
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(
            str(folder),
            hf_model=hf_model.pop(),
            tokenizer=tokenizer or placeholder_tokenizer(),
            device=str(device),
            dtype=dtype,
        )
    except torch.OutOfMemoryError:
        raise
    except _LOAD_ERRORS as error:
        raise UserError(_unsupported(folder, settings, error)) from None
    if tokenizer is None:
        bridge.tokenizer = None
    _process(bridge, config.processing, str(folder))
    return bridge


def _read_folder_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        legacy = sorted(folder.glob("*.pt")) if (folder / CONFIG_NAME).is_file() else []
        hint = f": for the legacy model give the file, '{legacy[-1]}'" if legacy else ""
        raise MissingFileError(f"'{folder}' is no Hugging Face model folder, it has no config.json{hint}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"'{path}' is damaged: {first_line(error)}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"'{path}' is damaged: expected a JSON object")
    return settings


def _load_hf_weights(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        # Eager attention, because the others never compute the scores that hooks may ask for.
        auto: Any = AutoModelForCausalLM
        hf_model, report = auto.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors, pickle, torch and transformers each have errors of their own here
        if "architecture" in str(error) or "Unrecognized" in str(error):
            raise UserError(f"'{folder}' holds no language model transformers knows: {first_line(error)}") from None
        if "weights only load failed" in str(error).lower():
            raise CheckpointError(
                f"the weights in '{folder}' hold pickled code besides tensors and were refused: use safetensors"
            ) from None
        raise CheckpointError(f"the weights in '{folder}' cannot be read: {first_line(error)}") from None
    # transformers would start a missing tensor at random, and go on.
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"the weights in '{folder}' are incomplete: {', '.join(missing[:3])} missing")
    return hf_model.eval()


def _hooked_from_hf(
    folder: Path, settings: dict[str, Any], hf_model: Any, tokenizer: Any, processing: ProcessingConfig
) -> Any:
    """Builds a HookedTransformer from a loaded model: 3.x has no public way from a folder."""
    loading: Any = importlib.import_module("transformer_lens.loading_from_pretrained")
    # Folders saved by transformers 5 leave n_ctx out for GPT-2, and TransformerLens reads it.
    settings = {"n_ctx": settings["n_positions"]} | settings if "n_positions" in settings else settings
    with _neutral_folder() as copy:
        (copy / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        cfg = loading.get_pretrained_model_config(
            str(copy),
            hf_cfg=hf_model.config.to_dict(),
            fold_ln=processing.fold_ln,
            device=str(hf_model.device),
            dtype=hf_model.dtype,
        )
        weights = [loading.get_pretrained_state_dict(str(copy), cfg, hf_model=hf_model, dtype=hf_model.dtype)]
    del hf_model  # its weights are in `weights`
    cfg.model_name = folder.name
    cfg.tokenizer_name = None
    processing = processing.model_copy(update=dict.fromkeys(_impossible_options(cfg), False))
    model = hooked_classes().model(cfg, tokenizer, move_to_device=False)
    # Handed over without a name (nor `**`, which would hold it): freed once it is processed.
    model.load_and_process_state_dict(
        weights.pop(),
        fold_ln=processing.fold_ln,
        center_writing_weights=processing.center_writing_weights,
        center_unembed=processing.center_unembed,
        fold_value_biases=processing.fold_value_biases,
        refactor_factored_attn_matrices=processing.refactor_factored_attn_matrices,
    )
    model.move_model_modules_to_device()
    return model


@contextmanager
def _neutral_folder() -> Iterator[Path]:
    """A temporary folder whose path names no model family: TransformerLens 3 reads families off the path."""
    with tempfile.TemporaryDirectory(prefix="lm-") as folder:
        family = next((word for word in ("llama", "gemma") if word in folder.lower()), None)
        if family is not None:
            raise UserError(
                f"the temporary folder '{folder}' has '{family}' in its path, which TransformerLens"
                f" {tlens_version()} would take for the architecture: set TMPDIR to another place"
            )
        yield Path(folder)


def _impossible_options(cfg: Any) -> list[str]:
    """Returns the options that would change this family's outputs (HookedTransformer's own rule)."""
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    options: list[str] = []
    if cfg.original_architecture in POST_NORM_ARCHITECTURES:
        options += ["fold_ln", "center_writing_weights"]
    if (getattr(cfg, "output_logits_soft_cap", None) or -1.0) > 0:
        options.append("center_unembed")
    return options


def _process(bridge: Any, processing: ProcessingConfig, source: str) -> None:
    try:
        bridge.enable_compatibility_mode(
            disable_warnings=True, no_processing=processing.is_raw, **processing.model_dump()
        )
    except torch.OutOfMemoryError:
        raise
    except _LOAD_ERRORS as error:
        raise UserError(
            f"TransformerLens {tlens_version()} cannot process the weights of '{source}' as asked: "
            f"{first_line(error)} Options: {processing.model_dump()}"
        ) from None


def _unsupported(folder: Path, settings: dict[str, Any], error: BaseException) -> str:
    architecture = ", ".join(settings.get("architectures") or ["an unnamed architecture"])
    return f"TransformerLens {tlens_version()} cannot load {architecture} from '{folder}': {first_line(error)}"
