"""Import path of the paper's library: see `models/sae_transformer.py`."""

from e2e_sae.models.sae_transformer import SAETransformer

__all__ = ["SAETransformer"]
