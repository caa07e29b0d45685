"""TopK: the k largest pre-activations of each token, where positive (Gao et al. 2024, arXiv 2406.04093, eq. 3).

    latents = ReLU(TopK(pre_acts))

L0 is k by construction, or less where fewer are positive; no sparsity penalty is needed. Here is also what every
architecture with a k has in common: k may start higher and fall linearly while it trains, as in EleutherAI's
sparsify. What is stored, and used outside training, is the k that it falls to.
"""

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from e2e_sae.errors import UserError
from e2e_sae.saes.base import SAE, SAEConfig, selection

START_PER_D_IN = 10
"""k starts at so many times d_in, or at d_sae if that is less, unless `k_start` says otherwise: sparsify's rule."""


class KSparseConfig(SAEConfig):
    """Options of every architecture with a k."""

    k_anneal_samples: NonNegativeInt = 0
    """Samples over which k falls linearly from `k_start`; 0: it does not change."""
    k_start: PositiveInt | None = None
    """Active latents per token at the first sample; null, with `k_anneal_samples`: 10 d_in, at most d_sae."""

    @property
    def final_k(self) -> int | None:
        """The k that training ends with; None: these options set none."""
        return None

    @property
    def trained(self) -> "KSparseConfig":
        """The same without annealing: k is what it has fallen to."""
        return self.model_copy(update={"k_anneal_samples": 0, "k_start": None})

    def check_length(self, n_samples: int) -> None:
        """Checks that k comes to its end before the run does.

        Raises:
            UserError: it does not.
        """
        if self.k_anneal_samples > n_samples:
            raise UserError(
                f"saes.sae.k_anneal_samples={self.k_anneal_samples} is longer than the run of {n_samples} samples: k "
                f"would not come down to {self.final_k}; make it shorter"
            )

    @model_validator(mode="after")
    def _check_annealing(self) -> "KSparseConfig":
        if self.k_start is not None and not self.k_anneal_samples:
            raise ValueError(f"k_start={self.k_start} needs k_anneal_samples: over how many samples k falls")
        if self.k_start is not None and self.final_k is not None and self.k_start < self.final_k:
            raise ValueError(f"k_start={self.k_start} is less than k={self.final_k}: k falls, it does not rise")
        return self


class KSparseSAE(SAE):
    """An SAE with a k."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        config: KSparseConfig,
        generator: torch.Generator | None = None,
        d_out: int | None = None,
    ):
        super().__init__(d_in, d_sae, config, generator, d_out)
        for name, k in {"k": config.final_k, "k_start": config.k_start}.items():
            if k is not None and k > d_sae:
                raise UserError(
                    f"{name}={k} is more than the {d_sae} latents there are: lower {name} or make d_sae larger"
                )
        self._n_samples: int | None = None

    @property
    def k(self) -> int:
        """Active latents per token: in training, what the annealing has come to."""
        config = self.config
        assert isinstance(config, KSparseConfig), f"options of an SAE with a k: got {config}"
        last, over = config.final_k, config.k_anneal_samples
        assert last is not None, "asked only where the options set a k"
        if not self.training or self._n_samples is None or self._n_samples >= over:
            return last
        start = config.k_start or max(last, min(self.d_sae, START_PER_D_IN * self.d_in))
        return start - (start - last) * self._n_samples // over

    def before_batch(self, n_samples: int) -> None:
        """Sets the k of a batch: k_start - (k_start - k) n_samples / k_anneal_samples, rounded up."""
        self._n_samples = n_samples


class TopKConfig(KSparseConfig):
    """Options of TopK."""

    architecture: str = "topk"
    """`topk`."""
    k: PositiveInt
    """Active latents per token."""

    @property
    def final_k(self) -> int:
        """`k`."""
        return self.k


class TopKSAE(KSparseSAE):
    """The k largest latents of each token."""

    Config = TopKConfig

    @selection
    def activate(self, pre_acts: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns max(0, pre_acts) at each token's k largest, 0 elsewhere."""
        return top_k(pre_acts, self.k)


def top_k(pre_acts: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows n"]:
    """Returns max(0, pre_acts) at each row's k largest, 0 elsewhere."""
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_acts).scatter_(-1, indices, values.relu_())
