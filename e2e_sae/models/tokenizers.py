"""A language model's tokenizer: found beside local weights, required only when text must be tokenised."""

from pathlib import Path
from typing import Any

from torch import nn

from e2e_sae.errors import UserError
from e2e_sae.log import logger
from e2e_sae.models.tlens import first_line

# A folder needs one of these: without them transformers makes an empty tokenizer for some families, silently.
_VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "tekken.json",
)


def find_local_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a folder, or None if there is none that loads; never asks a network."""
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # any tokenizer class may raise its own errors; running on token ids needs none
        logger.warning("the tokenizer in '%s' cannot be loaded: %s", folder, first_line(error))
        return None


def require_tokenizer(model: nn.Module) -> Any:
    """Returns the model's tokenizer; a legacy model's is fetched now, by the name its config gives.

    Raises:
        UserError: there is none.
    """
    owner: Any = model
    if owner.tokenizer is None:
        name = getattr(owner.cfg, "tokenizer_name", None)
        if name is None:
            raise UserError(
                f"text must be tokenised, but the language model '{owner.cfg.model_name}' has no tokenizer:"
                " set tokenizer_name in the data config, or use tokenised data"
            )
        set_tokenizer(model, _tokenizer_by_name(name))
    return owner.tokenizer


def set_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Gives the model a tokenizer the way its class prepares one (BOS, padding)."""
    owner: Any = model
    if hasattr(owner, "set_tokenizer"):
        owner.set_tokenizer(tokenizer)
        return
    from transformer_lens.model_bridge.sources import _bridge_builder

    builder: Any = _bridge_builder
    owner.tokenizer = builder.configure_tokenizer(tokenizer, owner.cfg)


def placeholder_tokenizer() -> Any:
    """Returns an empty tokenizer, for loaders that would ask the network for the missing one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    token = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({token: 0}, unk_token=token)),
        bos_token=token,
        eos_token=token,
        unk_token=token,
    )
    # TransformerLens would load it again by its name, were it not said to add BOS already.
    tokenizer.init_kwargs |= {"name_or_path": "none", "add_bos_token": True}
    return tokenizer


def _tokenizer_by_name(name: str) -> Any:
    from transformers import AutoTokenizer

    if Path(name).is_dir():
        tokenizer = find_local_tokenizer(Path(name))
        if tokenizer is None:
            raise UserError(f"text must be tokenised, but the folder '{name}' holds no usable tokenizer")
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"text must be tokenised, but the language model's tokenizer '{name}' cannot be found: {first_line(error)}"
        ) from None
