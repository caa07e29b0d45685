"""Dead latents: how long each latent of a member's SAEs has been silent, and what is done about it (`revival.py`).

A latent is dead when it was active at none of the last `after_n_tokens` counted tokens of the training. They are
counted in whole batches: one that fires anywhere in a batch starts at 0 after it.

AuxK's candidates are the `n_candidates` latents that have been silent longest, so that a step costs so many columns of
products instead of d_sae of them. A revived one makes room for the next. With n_candidates >= d_sae each token chooses
among all dead latents, as in the paper.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from e2e_sae.acts import Mean, Pass, Position
from e2e_sae.base_config import BaseConfig
from e2e_sae.guarded_optimizer import GuardedOptimizer
from e2e_sae.revival import Directions, auxk_loss, counted_mask, resample_
from e2e_sae.saes.base import SAE
from e2e_sae.seeds import seed_for

CANDIDATES_PER_K = 4
"""AuxK's candidates for each latent that a token takes. By trial on the embedded model, with 8 of 2,048 latents active,
k 64: with 64, 256 and 2,048 candidates 1,307, 1,155 and 1,403 latents were dead in the end, and 1,584 without AuxK."""


class AuxKConfig(BaseConfig):
    """A loss that lets dead latents predict what the reconstruction misses."""

    coeff: NonNegativeFloat = 0.03125
    """Weight of the loss, which is 1 if they predict nothing; 1/32 in the paper."""
    k: PositiveInt | None = None
    """Dead latents per token; null: d_in // 2 (the paper: a power of two near that)."""
    n_candidates: PositiveInt | None = None
    """Latents, the longest silent, that these are chosen from; null: 4 k. The cost is proportional to it."""


class ResampleConfig(BaseConfig):
    """New directions for dead latents, from tokens that are reconstructed badly."""

    every_n_samples: PositiveInt
    """Samples between two times. (Bricken et al.: 25,000 steps, four times in all.)"""
    until_n_samples: PositiveInt | None = None
    """No later than so many samples, so that what is new can be trained; null: any time before the run's last step."""
    method: Directions = "inputs"
    """`inputs`: along the activation less b_dec. `residuals`: along what its reconstruction misses."""
    encoder_norm: PositiveFloat = 0.2
    """Norm of a new encoder column, in mean norms of the alive ones. With 0.2 a latent begins quietly; where the k
    largest are taken it will hardly be among them, and 1 is better."""


class DeadLatentsConfig(BaseConfig):
    """When a latent is dead and what is done about it: nothing, one of the repairs, or both."""

    after_n_tokens: PositiveInt = 10_000_000
    """Counted tokens of silence that make a latent dead (10 million in Gao et al. 2024); a tenth of the run, if that is
    less."""
    auxk: AuxKConfig | None = None
    """An auxiliary loss, such as `{coeff: 0.03125}`."""
    resample: ResampleConfig | None = None
    """New directions, such as `{every_n_samples: 25000}`."""

    def check(self, architecture: type[SAE]) -> None:
        """Checks that an architecture can be repaired.

        Raises:
            ValueError: its latents do not come from W_enc and b_enc.
        """
        repairs = [name for name in ("auxk", "resample") if getattr(self, name) is not None]
        if repairs and architecture.encode is not SAE.encode:
            raise ValueError(
                f"dead_latents.{repairs[0]} needs latents that come from W_enc and b_enc, and {architecture.__name__} "
                "encodes in another way: leave it out"
            )


class DeadLatents:
    """The latents of one member's SAEs that are trained. Only `log_values` waits for the device."""

    def __init__(
        self, config: DeadLatentsConfig, saes: Mapping[Position, SAE], seed: int = 0, n_samples: int | None = None
    ):
        """
        Args:
            config: when a latent is dead, and the repairs.
            saes: those in eval mode are left alone.
            seed: of the run.
            n_samples: length of the run; None: not known.
        """
        self._config = config
        self._saes = {position.name: sae for position, sae in saes.items() if sae.training}
        self._seed, self._end = seed, n_samples
        self._n_samples = 0
        """Samples trained on at the last step."""
        self.n_tokens_silent: dict[str, Int[Tensor, " S"]] = {
            name: torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device) for name, sae in self._saes.items()
        }
        """Counted tokens since each latent's last firing or resampling, by position name."""
        self._n_resampled = {name: torch.zeros_like(n_tokens[0]) for name, n_tokens in self.n_tokens_silent.items()}

    def is_dead(self, name: str) -> Bool[Tensor, " S"]:
        """Returns which latents of the SAE at a position are dead."""
        return self.n_tokens_silent[name] >= self._config.after_n_tokens

    @torch.no_grad()
    def update(self, spliced: Pass) -> None:
        """Counts a batch."""
        for name, n_tokens in self.n_tokens_silent.items():
            fired = spliced.sae_acts[name].latents != 0
            if spliced.batch.counted is not None:
                fired &= counted_mask(spliced.batch, fired)
            n_tokens.add_(spliced.batch.n_counted).masked_fill_(fired.flatten(0, -2).any(0), 0)

    def add_auxk(
        self, spliced: Pass, total: Float[Tensor, ""], values: dict[str, Mean]
    ) -> tuple[Float[Tensor, ""], dict[str, Mean]]:
        """Returns a batch's total loss and unweighted values by log name, with AuxK's if there is one."""
        config = self._config.auxk
        if config is None:
            return total, values
        for name, sae in self._saes.items():
            k = config.k or max(1, sae.d_in // 2)
            n_candidates = min(config.n_candidates or CANDIDATES_PER_K * k, sae.d_sae)
            # A fixed number: how many are dead, only the device knows.
            n_tokens, candidates = self.n_tokens_silent[name].topk(n_candidates)
            is_dead = n_tokens >= self._config.after_n_tokens
            loss = auxk_loss(spliced.sae_acts[name], spliced.batch, candidates, is_dead, k)
            values = {**values, f"auxk/{name}": loss}
            total = total + (config.coeff / max(1, loss.count)) * loss.sum.to(total.device)
        return total, values

    def resample(self, last: Pass, optimizer: GuardedOptimizer) -> None:
        """Gives dead latents new directions, if it is time.

        Args:
            last: the last batch of the step that was just made.
            optimizer: forgets the old ones.
        """
        before, self._n_samples = self._n_samples, last.batch.start + len(last.batch.tokens)
        config, now = self._config.resample, self._n_samples
        if config is None or now // config.every_n_samples == before // config.every_n_samples:
            return
        step_is_left = self._end is None or now + (now - before) <= self._end
        if now > (config.until_n_samples or now) or not step_is_left:
            return
        for name, sae in self._saes.items():
            generator = torch.Generator(sae.device).manual_seed(seed_for(self._seed, "resample", now, name))
            renewed = resample_(
                last.sae_acts[name], last.batch, self.is_dead(name), generator, config.method, config.encoder_norm
            )
            optimizer.forget(sae.W_dec, renewed[:, None])
            for parameter in ("W_enc", "b_enc", *sae.latent_parameters()):
                optimizer.forget(sae.get_parameter(parameter), renewed)
            self.n_tokens_silent[name].masked_fill_(renewed, 0)
            self._n_resampled[name].add_(renewed.sum())

    def log_values(self) -> dict[str, int]:
        """Returns by log key how many latents are dead now, and how many were resampled in all."""
        values = {f"sparsity/dead_latents/{name}": int(self.is_dead(name).sum()) for name in self._saes}
        if self._config.resample is not None:
            values |= {f"sparsity/resampled_latents/{name}": int(n) for name, n in self._n_resampled.items()}
        return values

    def state(self) -> dict[str, Any]:
        """Returns tensors and numbers for `load_state`."""
        return {"n_samples": self._n_samples, "silent": self.n_tokens_silent, "resampled": self._n_resampled}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`."""
        self._n_samples = state["n_samples"]
        for name in self._saes:
            self.n_tokens_silent[name].copy_(state["silent"][name])
            self._n_resampled[name].copy_(state["resampled"][name])
