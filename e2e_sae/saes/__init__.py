"""SAE architectures by name."""

from e2e_sae.saes.base import SAE
from e2e_sae.saes.relu import ReluSAE

ARCHITECTURES: dict[str, type[SAE]] = {sae.architecture: sae for sae in (ReluSAE,)}
"""Every architecture by the name that checkpoints hold."""

__all__ = ["ARCHITECTURES", "SAE", "ReluSAE"]
