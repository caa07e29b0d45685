"""End-to-end sparse autoencoders for language models, on TransformerLens (arXiv 2405.12241)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e2e_sae.config import Config
    from e2e_sae.models.sae_transformer import SAETransformer

__version__ = "3.0.0.dev0"
__all__ = ["Config", "SAETransformer"]

_HOMES = {"Config": "e2e_sae.config", "SAETransformer": "e2e_sae.models.sae_transformer"}


def __getattr__(name: str) -> Any:
    # Resolved on first use: `import e2e_sae` must not pay for torch and TransformerLens.
    if name not in _HOMES:
        raise AttributeError(f"module 'e2e_sae' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
