"""Learning-rate schedules as functions of the step, and "every n samples".

The schedules are those of the paper's library (its golden curves are in the parity tests), with progress
clamped at the end: past the last planned step the learning rate stays at its minimum.
"""

import math
from typing import Literal, NamedTuple

from e2e_sae.errors import UserError

OptimizerName = Literal["adam", "adamw", "radam", "signum", "muon", "schedulefree_adamw", "adam8bit"]
"""`adam` and `adamw` are torch's, `adam8bit` is bitsandbytes'; the others: `update_rules.py`."""
LRScaling = Literal["none", "inverse_sqrt"]
"""How the learning rate goes with the number of latents: `lr_factor`."""
REFERENCE_D_SAE = 2**14
"""Latents at which `inverse_sqrt` leaves the learning rate as it is, as in dictionary_learning and sparsify."""


class Schedule(NamedTuple):
    """The learning rate as a factor of `lr`, by optimizer step."""

    kind: Literal["linear", "cosine"]
    """`cosine`: warm-up from 0 (the first step does nothing), then half a cosine down to `min_factor`.
    `linear`: warm-up from 1/n_warmup, a plateau at 1, then a line down to `min_factor`."""
    n_warmup: int
    """Steps of warm-up."""
    n_cooldown: int
    """Linear only: steps of the line down."""
    n_steps: int | None
    """Planned steps; None if unknown (linear without cool-down only)."""
    n_total: int | None
    """Linear only: where the cool-down ends, ceil(n_samples / effective_batch_size) + 1."""
    min_factor: float
    """The least factor after the warm-up."""

    def factor(self, step: int) -> float:
        """Returns the factor for the optimizer step with this number, counted from 0."""
        if self.kind == "cosine":
            return self._cosine(step)
        if step < self.n_warmup:
            return (step + 1) / self.n_warmup
        if self.n_total is None or self.n_cooldown == 0 or step < self.n_total - self.n_cooldown:
            return 1.0
        return max(self.min_factor, 1 - (step - (self.n_total - self.n_cooldown)) / self.n_cooldown)

    def _cosine(self, step: int) -> float:
        if step < self.n_warmup:
            return step / max(1, self.n_warmup)
        assert self.n_steps is not None, "a cosine schedule needs the number of steps"
        progress = min(1.0, (step - self.n_warmup) / max(1, self.n_steps - self.n_warmup))
        return cosine_factor(progress, self.min_factor)


def cosine_factor(progress: float, min_factor: float, n_cycles: float = 0.5) -> float:
    """Returns min_factor + (1 - min_factor) (1 + cos(2 pi n_cycles progress)) / 2; progress 1 is the planned end."""
    return min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(2 * math.pi * n_cycles * progress))


def make_schedule(
    kind: Literal["linear", "cosine"],
    *,
    n_samples: int | None,
    effective_batch_size: int,
    warmup_samples: int = 0,
    cooldown_samples: int = 0,
    min_factor: float = 0.1,
) -> Schedule:
    """Returns the schedule of a run of `n_samples`.

    Raises:
        UserError: the length is unknown and needed, or warm-up and cool-down overlap.
    """
    if n_samples is None and (kind == "cosine" or cooldown_samples):
        raise UserError(f"lr_schedule '{kind}' needs n_samples here: the data's length is not known")
    n_warmup, n_cooldown = warmup_samples // effective_batch_size, cooldown_samples // effective_batch_size
    n_steps = None if n_samples is None else n_samples // effective_batch_size
    n_total = None if n_samples is None else math.ceil(n_samples / effective_batch_size) + 1
    if kind == "linear" and n_cooldown and n_total is not None and n_total - n_cooldown <= n_warmup:
        raise UserError(
            f"warmup_samples={warmup_samples} and cooldown_samples={cooldown_samples} overlap in a run of "
            f"{n_samples} samples: make one of them shorter"
        )
    return Schedule(kind, n_warmup, n_cooldown, n_steps, n_total, min_factor)


def lr_factor(scaling: LRScaling, d_sae: int) -> float:
    """Returns what an SAE's learning rate is multiplied by: 1, or sqrt(2^14 / d_sae).

    The best learning rate falls with the square root of the number of latents (Gao et al. 2024, arXiv 2406.04093,
    section 3 and figure 3); 2^14 is where dictionary_learning and sparsify, which use the same law, put its 2e-4.

    >>> lr_factor("inverse_sqrt", 4 * 2**14)
    0.5
    """
    return 1.0 if scaling == "none" else math.sqrt(REFERENCE_D_SAE / d_sae)
