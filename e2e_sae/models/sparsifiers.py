"""Import path of the paper's library: see `legacy/sparsifiers.py` and `saes/codebook.py`."""

from e2e_sae.legacy.sparsifiers import SAE
from e2e_sae.saes.codebook import Codebook

__all__ = ["SAE", "Codebook"]
