"""A codebook: an activation becomes the sum of the codes that point most nearly its way.

Tamkin, Taufeeque and Goodman 2023 (arXiv 2310.17230, section 2), in the form of the paper's library, which uses
it on MLPs only (`models/mlp.py`). It has no latents that a loss could act on, hence it is no `SAE` architecture.

    similarity_j = x . C_j / (||x|| ||C_j||),   recon = sum of C_j over the k largest similarities
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from e2e_sae.errors import UserError


class Codebook(nn.Module):
    """`n_dict_components` codes of width `input_size`, drawn from a standard normal distribution."""

    def __init__(self, input_size: int, n_dict_components: int, k: int, generator: torch.Generator | None = None):
        """
        Args:
            k: how many codes are summed.
            generator: source of the random numbers; None: torch's global one.

        Raises:
            UserError: k is below 1 or above the number of codes.
        """
        if not 1 <= k <= n_dict_components:
            raise UserError(f"a codebook needs 1 <= k <= number of codes: got k={k} of {n_dict_components} codes")
        super().__init__()
        self.k = k
        self.codebook = nn.Parameter(torch.randn(n_dict_components, input_size, generator=generator))

    def similarities(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_codes"]:
        """Returns the cosine of the angle between each activation and each code; 0 for a zero vector."""
        return F.normalize(x, dim=-1) @ F.normalize(self.codebook, dim=-1).T

    @torch.no_grad()
    def chosen(self, x: Float[Tensor, "*batch d_in"]) -> Bool[Tensor, "*batch n_codes"]:
        """Returns which k codes stand for each activation."""
        similarities = self.similarities(x)
        mask = torch.zeros_like(similarities, dtype=torch.bool)
        return mask.scatter_(-1, similarities.topk(self.k, dim=-1).indices, True)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch d_in"], None]:
        """Returns (reconstruction, None): the choice has no gradient, the sum has one in the chosen codes."""
        return self.chosen(x).to(self.codebook.dtype) @ self.codebook, None

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codebook.device
