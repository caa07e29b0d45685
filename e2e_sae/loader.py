"""Import path of the paper's library: see `legacy/loader.py`."""

from e2e_sae.legacy.loader import load_pretrained_saes, load_tlens_model

__all__ = ["load_pretrained_saes", "load_tlens_model"]
