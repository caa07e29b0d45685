"""BatchTopK: of all pre-activations of a batch, the k per token that are largest (Bussmann et al. 2024, arXiv
2412.06410).

    in training:  latents = ReLU(the k n_tokens largest of the batch's n_tokens x d_sae pre-activations)
    in use:       latents = pre_acts where pre_acts > threshold, else 0
    threshold     = running mean over batches of the smallest active latent

A token may have more or fewer than k active latents; in use, none depends on the others. Every vector that the SAE
reads is a token here: with heads, those of all positions and heads compete. So do tokens that the losses leave out, of
which an SAE does not know. The batch is that of one forward pass: with gradient accumulation, not the whole step's.

From the paper: both rules, and the threshold as a mean over batches. Ours: how the mean runs (`DECAY`).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from e2e_sae.saes.base import selection
from e2e_sae.saes.topk import KSparseSAE, TopKConfig, top_k

DECAY = 0.9
"""What is kept of the threshold at an update, as in overcomplete (`threshold_momentum`; SAELens keeps 0.99,
dictionary_learning 0.999). The threshold moves while an SAE learns, and the running mean lags behind: after 400 steps
of `demos/local.yaml` with k = 16, a held-out token had 15.5 active latents with 0.9, 15.1 with 0.99, 14.2 with 0.999.
The first 1 / (1 - DECAY) batches weigh the same, so that the 0 before them counts for nothing."""


class BatchTopKConfig(TopKConfig):
    """Options of BatchTopK."""

    architecture: str = "batch_topk"
    """`batch_topk`."""


class BatchTopKSAE(KSparseSAE):
    """The largest latents of a batch, k per token on average."""

    Config = BatchTopKConfig
    doubles_with_latents = {"threshold.value": True, "threshold.n_batches": False}

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        config: BatchTopKConfig,
        generator: torch.Generator | None = None,
        d_out: int | None = None,
    ):
        super().__init__(d_in, d_sae, config, generator, d_out)
        self.threshold = RunningThreshold()

    @selection
    def activate(self, pre_acts: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns max(0, pre_acts) at the batch's largest; outside training, at what is above the threshold."""
        return batch_top_k(pre_acts, self.k) if self.training else self.threshold(pre_acts)

    def follow(self, latents: Float[Tensor, "*tokens d_sae"]) -> None:
        """Updates the threshold."""
        self.threshold.update(latents)


class RunningThreshold(nn.Module):
    """Lets through what is above the smallest active latent of a batch, in the mean over batches."""

    value: Float[Tensor, ""]
    """The threshold; 0 before the first update."""
    n_batches: Int[Tensor, ""]
    """Updates so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("n_batches", torch.zeros((), dtype=torch.int64))

    def forward(self, pre_acts: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns pre_acts where they are above the threshold, 0 elsewhere."""
        return torch.where(pre_acts > self.value, pre_acts, 0)

    @torch.no_grad()
    def update(self, latents: Float[Tensor, "*tokens d_sae"]) -> None:
        """Moves it towards the batch's smallest active latent (0 if none is), without waiting for the device."""
        smallest = F.threshold(latents, 0, math.inf).amin()
        smallest = torch.where(smallest.isinf(), 0, smallest).to(self.value.dtype)
        self.n_batches.add_(1)
        weight = (1 / self.n_batches).clamp_min(1 - DECAY)
        self.value.lerp_(smallest, weight.to(self.value.dtype))


def batch_top_k(pre_acts: Float[Tensor, "*tokens d_sae"], k: int) -> Float[Tensor, "*tokens d_sae"]:
    """Returns max(0, pre_acts) at the k n_tokens largest of all, 0 elsewhere."""
    n_tokens = pre_acts.numel() // pre_acts.shape[-1]
    return top_k(pre_acts.flatten(), k * n_tokens).view(pre_acts.shape)
