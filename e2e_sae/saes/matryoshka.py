"""Matryoshka: nested dictionaries, each made of the first latents of the next (Bussmann et al. 2025, arXiv 2503.17547).

    recon_m = latents[:m] D[:m] + b_dec,   m = the ends of the groups of latents
    loss   += prefix_coeff * mean over the ends m < d_sae of ||x - recon_m||^2 / d_out

so that the first latents must do without the later ones, which have no reason to take over parts of what they stand
for. From the paper: one selection of latents for all prefixes, BatchTopK for it, an L2 loss at every prefix, all with
equal weights, the groups' sizes. Ours: ReLU and TopK as further choices; the loss is per width, as all of this
library's are; the whole dictionary's reconstruction is left to the loss mix, so that the nesting goes with any (with
`out_to_in` alone, all prefixes and the whole weigh the same at prefix_coeff = number of groups - 1); x is what the SAE
replaces in the run that it is part of, as a constant: no gradient goes to it as a target.
"""

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor

from e2e_sae.acts import SAEPass
from e2e_sae.errors import UserError
from e2e_sae.ops.tokens import at_least_float32
from e2e_sae.saes.base import SAEConfig, selection
from e2e_sae.saes.batch_topk import RunningThreshold, batch_top_k
from e2e_sae.saes.topk import KSparseConfig, KSparseSAE, top_k

PAPERS_GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
"""Dictionaries of 2048, 6144, 14336, 30720 and 65536 latents, as shares of the largest: those on Gemma 2 2B."""


class MatryoshkaConfig(KSparseConfig):
    """Options of Matryoshka SAEs."""

    architecture: str = "matryoshka"
    """`matryoshka`."""
    inside: Literal["batch_topk", "topk", "relu"] = "batch_topk"
    """Which latents are active: as in the architecture of that name. `relu` needs `loss.sparsity`, the others `k`."""
    k: PositiveInt | None = None
    """Active latents per token, with `inside: batch_topk` or `topk`."""
    group_fractions: list[PositiveFloat] = Field(default=list(PAPERS_GROUPS), min_length=2)
    """Shares of the latents, which sum to 1: the first group is the smallest dictionary, the first two are the next."""
    prefix_coeff: PositiveFloat = 1.0
    """Weight of the mean loss of the dictionaries smaller than the whole."""

    @property
    def final_k(self) -> int | None:
        """`k`."""
        return self.k

    @field_validator("group_fractions")
    @classmethod
    def _sum_to_1(cls, fractions: list[float]) -> list[float]:
        if not math.isclose(sum(fractions), 1, rel_tol=1e-6):
            raise ValueError(f"the shares must sum to 1 (their sum: {sum(fractions):g})")
        return fractions

    @model_validator(mode="after")
    def _check_k(self) -> "MatryoshkaConfig":
        if self.inside != "relu" and self.k is None:
            raise ValueError(f"inside: {self.inside} needs k: active latents per token")
        if self.inside == "relu" and (self.k is not None or self.k_anneal_samples):
            raise ValueError("inside: relu has no k: leave out k and k_anneal_samples, or choose topk or batch_topk")
        return self


class MatryoshkaSAE(KSparseSAE):
    """Latents whose first groups reconstruct the activation by themselves."""

    Config = MatryoshkaConfig
    config: MatryoshkaConfig
    doubles_with_latents = {"threshold.value": True, "threshold.n_batches": False}

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        config: MatryoshkaConfig,
        generator: torch.Generator | None = None,
        d_out: int | None = None,
    ):
        super().__init__(d_in, d_sae, config, generator, d_out)
        ends = [round(end * d_sae) for end in accumulate(config.group_fractions)]
        self.groups = [slice(*ends) for ends in pairwise([0, *ends])]
        """The latents of each group."""
        if any(group.start == group.stop for group in self.groups):
            raise UserError(
                f"d_sae={d_sae} latents are too few for group_fractions={config.group_fractions}: a group would be "
                "empty; use fewer groups or a larger dictionary"
            )
        self.threshold = RunningThreshold() if config.inside == "batch_topk" else None

    @classmethod
    def is_penalty_needed(cls, config: SAEConfig) -> bool:
        """Returns whether `inside` is `relu`."""
        assert isinstance(config, MatryoshkaConfig)
        return config.inside == "relu"

    @selection
    def activate(self, pre_acts: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns the latents, all groups together."""
        if self.config.inside == "relu":
            return torch.relu(pre_acts)
        if self.threshold is None:
            return top_k(pre_acts, self.k)
        return batch_top_k(pre_acts, self.k) if self.training else self.threshold(pre_acts)

    def extra_losses(self, acts: SAEPass) -> dict[str, Float[Tensor, "*tokens"]]:
        """Returns `prefixes`: the mean loss of the dictionaries smaller than the whole, times `prefix_coeff`."""
        return {"prefixes": self.config.prefix_coeff * mean_square_error(acts.target, self._prefix_recons(acts))}

    def follow(self, latents: Float[Tensor, "*tokens d_sae"]) -> None:
        """Updates the threshold, if there is one."""
        if self.threshold is not None:
            self.threshold.update(latents)

    def _prefix_recons(self, acts: SAEPass) -> Iterator[Float[Tensor, "*tokens d_out"]]:
        """Yields recon_m for every end m but the last; each latent is multiplied once."""
        recon, no_bias = self.b_dec + self.skipped(acts.input), torch.zeros_like(self.b_dec)
        for group in self.groups[:-1]:
            recon = recon + self.decode_with(acts.latents[..., group], self.W_dec[group], no_bias)
            yield recon


def mean_square_error(
    x: Float[Tensor, "*tokens d_out"], recons: Iterator[Float[Tensor, "*tokens d_out"]]
) -> Float[Tensor, "*tokens"]:
    """Returns the mean over reconstructions of ||x - recon||^2 / d_out of each token; x gets no gradient."""
    target = at_least_float32(x.detach())
    return torch.stack([(target - at_least_float32(recon)).square().mean(-1) for recon in recons]).mean(0)
