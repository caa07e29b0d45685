"""End-to-end sparse autoencoders for language models, on TransformerLens (arXiv 2405.12241)."""

from typing import TYPE_CHECKING

from e2e_sae.lazy import lazy_names

if TYPE_CHECKING:
    from e2e_sae.config import Config
    from e2e_sae.models.sae_transformer import SAETransformer

__version__ = "3.0.0.dev0"
__all__ = ["Config", "SAETransformer"]

__getattr__ = lazy_names(__name__, {"Config": "e2e_sae.config", "SAETransformer": "e2e_sae.models.sae_transformer"})
