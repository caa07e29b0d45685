"""Gated: whether a latent is active and how strongly are two answers (Rajamanoharan et al. 2024, arXiv 2404.16014).

    gates      = pre_acts = (x - b_pre) W_enc + b_enc
    magnitudes = max(0, exp(r_mag) (x - b_pre) W_enc + b_mag)
    latents    = magnitudes where gates > 0, else 0
    penalty    = sum_j max(0, gates_j)
    auxiliary  = ||target - max(0, gates) D - b_dec||^2 / d_out     (D and b_dec are constants here)

Both answers share the weights: W_enc, with a scale and a bias of the magnitudes' own (section 3.2). The step has no
gradient, so whatever the loss mix, reconstruction and KL train the magnitudes, and penalty and auxiliary loss the
gates; the penalty then does not shrink the latents (section 3.3). The target, the activation that the output replaces,
is a constant too. At the start it is a ReLU SAE: r_mag is 0 and b_mag is b_enc. (The paper's has `subtract_b_dec`.)
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor, nn

from e2e_sae.acts import SAEPass
from e2e_sae.ops.tokens import at_least_float32
from e2e_sae.saes.base import SAE, SAEConfig


class GatedConfig(SAEConfig):
    """Options of Gated."""

    architecture: str = "gated"
    """`gated`."""
    auxiliary_coeff: PositiveFloat = 1.0
    """Weight of the auxiliary loss, which is a mean over width like `out_to_in` (1 beside its 1 in the paper). Nothing
    else tells a gate what to open for."""


class GatedSAE(SAE):
    """Latents with a gate each.

    Attributes:
        r_mag: [d_sae]; the logarithm of what the weights of the magnitudes are, in those of the gates.
        b_mag: [d_sae]; the bias of the magnitudes. (That of the gates is b_enc.)
    """

    r_mag: nn.Parameter
    b_mag: nn.Parameter

    Config = GatedConfig
    config: GatedConfig
    needs_penalty = True
    doubles_with_latents = {"r_mag": False, "b_mag": True}

    def latent_parameters(self) -> dict[str, Float[Tensor, " d_sae"]]:
        """Returns `r_mag` and `b_mag`, which make a ReLU of what the gates are at the start."""
        return {"r_mag": torch.zeros_like(self.b_enc), "b_mag": self.b_enc}

    def activate(self, pre_acts: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns the magnitudes where the gate is open, 0 elsewhere."""
        scale = self.r_mag.exp()
        magnitudes = torch.relu(scale * pre_acts + (self.b_mag - scale * self.b_enc))
        return torch.where(pre_acts > 0, magnitudes, 0)

    def penalised(self, acts: SAEPass) -> Float[Tensor, "*tokens d_sae"]:
        """Returns max(0, gates), times the norms of free decoder rows."""
        return super().penalised(replace(acts, latents=_opening(acts)))

    def extra_losses(self, acts: SAEPass) -> dict[str, Float[Tensor, "*tokens"]]:
        """Returns `auxiliary`."""
        recon = self.decode_with(_opening(acts), self.W_dec.detach(), self.b_dec.detach())
        with torch.no_grad():
            target = acts.target - self.skipped(acts.input)
        error = at_least_float32(target) - at_least_float32(recon)
        return {"auxiliary": self.config.auxiliary_coeff * error.square().mean(-1)}


def _opening(acts: SAEPass) -> Float[Tensor, "*tokens d_sae"]:
    """Returns max(0, gates)."""
    assert acts.pre_acts is not None, "gates are kept"
    return torch.relu(acts.pre_acts)
